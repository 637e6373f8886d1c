"""A probe: what a layer's hidden state says about the price of closing its heads, fitted as one sum over documents.

The logarithm of a pair's price is regressed, for each head, on the hidden state that its layer is given and on the
margin that the gate knows, the estimated log mass of the bulk minus the exact one of the local keys. Divided by the
slope of the margin, what the hidden state adds is an offset to the estimated log mass in nats: the gate compares as
before, and the margin from which a head closes says at which price. The less the price depends on the margin, the
further margins spread: each head has a scale, by which the margins of the grid are multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.moment import with_offsets
from patchattn.measuring.prices import Priced
from patchattn.measuring.statistics import MARGINS, Totals, closed_sums
from patchattn.moments.gaussian import Estimate
from patchattn.moments.prompt import bulk_log_mass_from_prompt

MOST_DIRECTIONS = 1024
"""Most directions of the hidden state that a probe looks at, so that sums stay small; random ones of wider models."""

_LEAST_PRICE = 1e-12
"""Added to prices before their logarithm is taken, nats."""

_PENALTY = 100.0
"""Of the regression: as if so many pairs said that no feature matters."""

_LEAST_SLOPE = 0.05
"""Of a log price on the margin, at least; a head whose price hardly depends on it would need endless offsets."""

_MEAN, _SPREAD = 3.0, 3.0
"""Mean and standard deviation of each head's margin over its scale: `MARGINS` reach 3.7 deviations to both sides."""

_LEAST_SCALE = 0.1
"""Nats; of a head whose margin hardly varies."""

_FURTHEST = 40.0
"""Margins are cut to this before they are a feature, nats."""


_HEAVIEST = torch.finfo(torch.float16).max
"""Of a weight; hidden states that are very small would ask for more than half precision can hold."""


class Probe:
    """Sums over documents, what is fitted to them, and the prices that follow.

    Args:
        totals: Where the sums are kept.
        hidden: Size of the hidden state.
        estimate: Estimate of the bulk log mass that is corrected.
    """

    def __init__(self, totals: Totals, hidden: int, estimate: Estimate) -> None:
        self._totals, self._layers = totals, totals.settings.layers
        self._estimate: Estimate = estimate
        self._directions = directions(hidden)
        layers, heads, n_rungs = len(self._layers), totals.settings.query_heads, len(MARGINS) + 2
        features = self._directions.shape[1] + heads + 1
        shapes = {
            "probe_gram": (layers, features, features),
            "probe_log_price": (layers, features, heads),
            "price": (layers, heads, n_rungs),
            "priced_open_fraction": (layers, heads, n_rungs),
            "slope": (layers, heads, n_rungs),
        }
        totals.sums |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def fit_to(self, layer: int, priced: Priced) -> None:
        """Add what one layer of a document says to the regression."""
        at, asked = self._layers.index(layer), priced.inputs.regions.asked[0]
        # The guarded estimate opens where it says nothing else than this one, which leaves nothing to learn there.
        estimate = "lognormal" if self._estimate == "guarded" else self._estimate
        bulk, _ = bulk_log_mass_from_prompt(priced.inputs, estimate=estimate)
        # Before the first chunk of keys is full there is no estimate.
        known = asked & bulk[0].isfinite().all(0)
        margin = (bulk - priced.local)[0][:, known].T.clamp(-_FURTHEST, _FURTHEST).float()
        seen = priced.hidden[0][known].float() @ self._directions.to(priced.hidden.device)
        features = torch.cat([seen, margin, torch.ones_like(margin[:, :1])], dim=1)
        log_price = (priced.cost[0][:, known].T + _LEAST_PRICE).log().float()
        self._totals.sums["probe_gram"][at] += (features.T @ features).double().cpu()
        self._totals.sums["probe_log_price"][at] += (features.T @ log_price).double().cpu()

    def tensors(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit to documents.

        Args:
            sums: Those of all processes.

        Returns:
            `probe` [layers, heads, hidden] in half precision, `probe_offset` [layers, heads] nats, and `probe_scale`
            [layers, heads], by which the margins of the grid are multiplied.
        """
        found = [
            self._of_layer(gram, log_price)
            for gram, log_price in zip(sums["probe_gram"], sums["probe_log_price"], strict=True)
        ]
        probe, offset, scale = (torch.stack(parts) for parts in zip(*found, strict=True))
        return {"probe": probe.half(), "probe_offset": offset.float(), "probe_scale": scale.float()}

    def _of_layer(self, gram: Tensor, log_price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fit the heads of a layer: [heads, hidden], [heads] and [heads]."""
        size, heads = self._directions.shape[1], log_price.shape[1]
        count = gram[-1, -1].clamp(min=1)
        means = gram[-1] / count
        variance = (gram.diagonal() / count - means.square()).clamp(min=0)
        variance[-1] = 1e-6
        covariance = gram / count - means[:, None] * means
        weights, offsets, scales = [], [], []
        for head in range(heads):
            features = torch.tensor([*range(size), size + head, size + heads])
            of_head = gram[features][:, features] + torch.diag(_PENALTY * variance[features])
            solved = torch.linalg.lstsq(of_head, log_price[features, head, None], driver="gelsd").solution[:, 0]
            slope = solved[size].clamp(min=_LEAST_SLOPE)
            weight = (self._directions.double() @ (solved[:size] / slope)).clamp(-_HEAVIEST, _HEAVIEST).half()
            weights.append(weight)
            # Of the bulk log mass with what the hidden state adds, less the local one: the margin, but for its sign.
            parts = torch.cat([self._directions.double().T @ weight.double(), gram.new_ones(1)])
            variance_of_margin = parts @ covariance[features[:-1]][:, features[:-1]] @ parts
            scales.append((variance_of_margin.clamp(min=0).sqrt() / _SPREAD).clamp(min=_LEAST_SCALE))
            offsets.append(-parts @ means[features[:-1]] - _MEAN * scales[-1])
        return torch.stack(weights), torch.stack(offsets), torch.stack(scales)

    def margin(
        self, tensors: dict[str, Tensor], layer: int, inputs: AttentionInputs, hidden: Tensor, local: Tensor
    ) -> Tensor:
        """Return the margin that the probe gives, over its scale, [1, heads, query].

        It is what the margins of the grid are compared with; -inf before the first chunk of keys is full.

        Args:
            tensors: What `tensors` returned, from other documents.
            layer: Index of the layer.
            inputs: The attention call.
            hidden: [1, query, hidden].
            local: [1, heads, query] nats; exact log mass of the local keys.
        """
        bulk, _ = bulk_log_mass_from_prompt(inputs, estimate=self._estimate)
        at = self._layers.index(layer)
        names = ("probe", "probe_offset", "probe_scale")
        probe, offset, scale = (tensors[name][at].to(bulk.device, bulk.dtype) for name in names)
        # As the gate adds it.
        added = MeasuredHeads(offset, probe=probe).offsets(hidden, bulk.dtype)
        assert added is not None
        return (local - with_offsets(bulk, added)) / scale[:, None]

    def price_with(self, tensors: dict[str, Tensor], layer: int, priced: Priced) -> None:
        """Add the prices of one layer of a document, by the margin that the probe gives."""
        at, asked = self._layers.index(layer), priced.inputs.regions.asked[0]
        margin = self.margin(tensors, layer, priced.inputs, priced.hidden, priced.local)[0][:, asked]
        cost = priced.cost[0][:, asked]
        closed = closed_sums(margin, torch.ones_like(cost)) / asked.sum().cpu()
        self._totals.sums["price"][at] += closed_sums(margin, cost) / priced.cost.shape[2]
        self._totals.sums["priced_open_fraction"][at] += 1 - closed

    def add_slopes(self, layer: int, margin: Tensor, slope: Tensor) -> None:
        """Add what changing the pairs of a layer does to the KL of the gated model, by margin.

        Args:
            layer: Index of the layer.
            margin: [heads, query]; see `margin`.
            slope: [heads, query]; the first-order change of the KL, nats per token of the document, of closing a pair.
        """
        self._totals.sums["slope"][self._layers.index(layer)] += closed_sums(margin, slope.double())


def directions(hidden: int) -> Tensor:
    """Return the directions of a hidden state that a probe looks at, [hidden, directions] float32, orthonormal."""
    if hidden <= MOST_DIRECTIONS:
        return torch.eye(hidden)
    drawn = torch.randn(hidden, MOST_DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()
