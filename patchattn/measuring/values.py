"""What pairs are worth in a model that is gated already: heads stand in for one another, which prices don't see.

Let `x` be the change of the log-probabilities that closing a pair brings. In the dense model closing it costs
`x^2 / 2`. In a gated model, where closed pairs have brought `X` together, opening one of them saves `x X - x^2 / 2`,
and closing one more costs `x X + x^2 / 2`: the slope of KL(dense || gated) along the pair, and half of its curvature.
One backward pass of the gated model gives the slope, without drawn labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchattn.backends.blockwise import closed_attention
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.with_graph import dense_with_graph, local_with_graph
from patchattn.hf.architecture import without_head
from patchattn.hf.weights import input_device
from patchattn.measuring.prices import Backward, all_attended, exactly
from patchattn.measuring.probe import Probe
from patchattn.measuring.reading import seen_by


class Valuing(Backward):
    """Find what each pair of a document is worth in a gated model.

    Args:
        model: The model, in evaluation mode and not patched.
        layers: Indices of the layers.
        local: Sink and window, tokens.
        probe: Gives margins, and takes slopes.
        tensors: What was fitted to other documents.
        margins: [layers, query_heads]; from which each head closes, of the grid.
    """

    def __init__(
        self,
        model: Any,
        layers: tuple[int, ...],
        local: tuple[int, int],
        probe: Probe,
        tensors: dict[str, Tensor],
        margins: Tensor,
    ) -> None:
        super().__init__(model, layers, local)
        self._probe, self._tensors = probe, tensors
        self._margins = dict(zip(layers, margins, strict=True))

    def value(self, ids: Tensor, dense: Tensor | None = None) -> None:
        """Value the pairs of one document.

        Args:
            ids: [tokens] ids.
            dense: What `Pricing.price` returned for it; None reads it again.

        Raises:
            CalibrationError: See `run`.
        """
        ids = ids[None].to(input_device(self.model))
        hidden = self._read_densely(ids) if dense is None else dense.to(ids.device)

        def loss(logits_of: Any, rows: slice, logits: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = exactly(logits_of(ids[:, rows], hidden[:, rows])[0]).softmax(-1)
            return -(wanted * exactly(logits).log_softmax(-1)).sum() / ids.shape[1]

        self.run(ids, loss)

    @torch.no_grad()
    def _read_densely(self, ids: Tensor) -> Tensor:
        def attend(_: int, inputs: AttentionInputs, __: Callable[[], Attended]) -> Attended:
            return all_attended(inputs, dense_with_graph(inputs))

        with seen_by(attend, self.model, self._layers, local=self._local):
            return without_head(self.model)(input_ids=ids, use_cache=False).last_hidden_state

    def attend(self, layer: int, inputs: AttentionInputs, bare: AttentionInputs, hidden: Tensor) -> tuple[Tensor, Any]:
        """Attend as the gates say."""
        dense, closed = dense_with_graph(inputs), local_with_graph(inputs)
        with torch.no_grad():
            _, local = closed_attention(bare)
            margin = self._probe.margin(self._tensors, layer, bare, hidden, local)
            is_closed = margin >= self._margins[layer].to(margin.device, margin.dtype)[:, None]
        output = torch.where(is_closed[..., None], closed, dense)
        asked = inputs.regions.asked[0]
        return output, (margin[0][:, asked], (closed - dense).detach()[0][:, asked], asked)

    def visit(self, layer: int, given: Any, gradient: Tensor) -> None:
        """Add the slopes of a layer."""
        margin, change, asked = given
        slope = (gradient[0][:, asked].double() * change.double()).sum(-1)
        self._probe.add_slopes(layer, margin, slope)


def values_of(price: Tensor, slope: Tensor, chosen: Tensor) -> Tensor:
    """Put slopes and prices together, [layers, query_heads, rungs] nats per token.

    Args:
        price: [layers, query_heads, rungs]; sums over what is closed at each rung, in the dense model.
        slope: The same of the slopes, in the gated model.
        chosen: [layers, query_heads] int64; the rungs of the gated model.
    """
    here = price.gather(-1, chosen[..., None])
    is_closed_there = torch.arange(price.shape[-1]) >= chosen[..., None]
    # What is closed at a rung is closed at every lower one: half of the curvature is taken off for pairs that are
    # closed in the gated model, and added for the others.
    return slope + torch.where(is_closed_there, -price, price - 2 * here)
