"""What one attention call adds to a calibration: exact masses beside the estimates, slab by slab, summed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import exact_attention
from patchattn.moments.gaussian import Estimate
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.moments.text import RotaryMoments, Rotation, bulk_log_mass_from_text

MARGINS = torch.cat([torch.arange(-8, -2, 0.5), torch.arange(-2, 6, 0.25), torch.arange(6, 14.1, 0.5)])
"""Margins in nats that curves are measured at: shares from 0.0003 to 0.999999, finest where gates are used."""

ESTIMATES: tuple[Estimate, ...] = ("guarded", "saturating", "lognormal")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        layers: Indices of the layers.
        query_heads: Query heads per layer.
        kv_heads: KV heads per layer.
        head_dim: Dimension of the keys.
        key_moments: Whether moments of the keys are taken.
        oracle_margin: Margin in nats below which the exact gate opens, for recall and precision.
    """

    layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    key_moments: bool
    oracle_margin: float


class Totals:
    """Sums over documents, float64. Sums of disjoint sets of documents add up to those of all.

    Args:
        settings: What is measured.
        rotations: By layer, for moments of the keys.
        moments: Moments of other text by layer, which curves are measured with; None takes those of the prompt.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        rotations: dict[int, Rotation] | None = None,
        moments: dict[int, RotaryMoments] | None = None,
    ) -> None:
        layers, heads = len(settings.layers), settings.query_heads
        curves = (len(ESTIMATES), layers, heads, len(MARGINS) + 2)
        keys = (layers if settings.key_moments else 0, settings.kv_heads, settings.head_dim)
        shapes = {
            "documents": (2,),
            "missed_mass": (2, *curves),
            "open_fraction": curves,
            "open_pairs": curves,
            "hits": curves,
            "oracle_pairs": (layers, heads),
            "oracle_open_fraction": (layers, heads),
            "asked": (layers,),
            "errors": (3, *curves[:3]),
            "key_count": keys[:1],
            "key_total": keys,
            "key_outer": (*keys, settings.head_dim),
        }
        self.settings, self.rotations, self.moments = settings, rotations, moments
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add_document(self, index: int) -> Document:
        """Start a document; even and odd indices are kept apart where it matters."""
        self.sums["documents"][index % 2] += 1
        return Document(self, index % 2, keys=self.settings.key_moments and self.moments is None)

    def add_keys_of_document(self) -> Document:
        """Start a document that gives moments of the keys and nothing else."""
        return Document(self, None, keys=True)


@dataclass(frozen=True)
class Document:
    """One document of the totals, which collects its attention calls.

    Args:
        totals: What it is added to.
        half: 0 or 1: to which curves it is added; None for none.
        keys: Whether moments of its keys are added.
    """

    totals: Totals
    half: int | None
    keys: bool

    def attend(self, layer: int, inputs: AttentionInputs) -> Attended:
        """Attend densely and add what this call shows about each head.

        Args:
            layer: Index of the layer.
            inputs: All tokens of one document without padding, [1, heads, tokens, dim].

        Returns:
            Dense attention.
        """
        at = self.totals.settings.layers.index(layer)
        output, local, bulk = exact_attention(inputs)
        asked = inputs.regions.asked[0]
        if self.half is not None and asked.any():
            self._add_curves(at, inputs, local[0][:, asked], bulk[0][:, asked], asked)
        if self.keys:
            self._add_keys(layer, inputs)
        opened = inputs.regions.asked[:, None].expand(inputs.query.shape[:3])
        return Attended(output, opened, inputs.regions.n_causal.sum() * inputs.query.shape[1])

    def _add_curves(self, at: int, inputs: AttentionInputs, local: Tensor, bulk: Tensor, asked: Tensor) -> None:
        sums, settings = self.totals.sums, self.totals.settings
        n_asked = int(asked.sum())
        share = torch.sigmoid(bulk.double() - local.double())
        needed = local - bulk < settings.oracle_margin
        sums["asked"][at] += n_asked
        sums["oracle_pairs"][at] += needed.sum(-1).cpu()
        sums["oracle_open_fraction"][at] += needed.double().mean(-1).cpu()
        for index, estimate in enumerate(ESTIMATES):
            mass = self._estimated(at, inputs, estimate)[0][:, asked]
            missed, closed, closed_needed = (
                closed_sums(local - mass, weight) for weight in (share, torch.ones_like(share), needed.double())
            )
            sums["missed_mass"][self.half, index, at] += missed / n_asked
            sums["open_fraction"][index, at] += 1 - closed / n_asked
            sums["open_pairs"][index, at] += n_asked - closed
            sums["hits"][index, at] += closed_needed[:, :1] - closed_needed
            known = mass.isfinite() & bulk.isfinite()
            error = torch.where(known, mass.double() - bulk.double(), 0)
            for power, values in enumerate((known.double(), error, error.square())):
                sums["errors"][power, index, at] += values.sum(-1).cpu()

    def _estimated(self, at: int, inputs: AttentionInputs, estimate: Estimate) -> Tensor:
        moments = self.totals.moments
        if moments is None:
            return bulk_log_mass_from_prompt(inputs, estimate=estimate)[0]
        of_layer = moments[self.totals.settings.layers[at]].to(inputs.query.device)
        return bulk_log_mass_from_text(inputs, of_layer, estimate=estimate)

    def _add_keys(self, layer: int, inputs: AttentionInputs) -> None:
        sums, regions, rotations = self.totals.sums, inputs.regions, self.totals.rotations
        slots = torch.arange(regions.sink_size, inputs.key.shape[2] - regions.window_size, device=inputs.key.device)
        if rotations is None or not len(slots):
            return
        at = self.totals.settings.layers.index(layer)
        keys = rotations[layer].undone(inputs.key[0].index_select(1, slots), slots)
        sums["key_count"][at] += len(slots)
        sums["key_total"][at] += keys.sum(1).cpu()
        sums["key_outer"][at] += (keys.mT @ keys).cpu()


def closed_sums(margin: Tensor, weight: Tensor) -> Tensor:
    """Sum weights over the queries that each rung closes.

    Args:
        margin: [heads, query] nats; NaN opens.
        weight: [heads, query] float64.

    Returns:
        [heads, rungs] on the CPU: over all queries, over those with margin >= each margin of the grid, and 0.
    """
    margins = MARGINS.to(margin.device, margin.dtype)
    reached = torch.bucketize(torch.where(margin.isnan(), -torch.inf, margin), margins, right=True)
    by_margin = torch.zeros(*margin.shape[:1], len(margins) + 1, dtype=torch.float64, device=margin.device)
    by_margin.scatter_add_(1, reached, weight)
    closed = by_margin.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(closed, (0, 1)).cpu()
