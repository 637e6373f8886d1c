"""Gates that are decided beforehand: some heads, all or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.gates.base import HeadGate, Known
from patchattn.gates.decision import all_open, forced
from patchattn.moments.prompt import PromptMoments


class StaticGate(HeadGate):
    """Open the listed heads for every query and close all others, as DuoAttention (arXiv 2410.10819) does.

    Args:
        open_heads: Pairs of (layer, query head), both counted from 0.
    """

    kind: Literal["static"] = "static"
    open_heads: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] = ()

    @field_validator("open_heads")
    @classmethod
    def _sorted_and_unique(cls, heads: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(set(heads)))

    @classmethod
    def from_calibration(cls, calibration: Any, *, heads: int, by: Literal["mass", "price"] = "mass") -> StaticGate:
        """Open the heads that need the bulk keys most.

        Args:
            calibration: A `patchattn.Calibration`.
            heads: Number of heads to keep open, at most all that were measured.
            by: How heads are ranked. `"mass"`: by how often the exact share opens them. `"price"`: by the KL that
                closing them costs, of a calibration that was measured with prices.
        """
        ranked = calibration.heads_by_price() if by == "price" else calibration.heads_by_oracle()
        return cls(open_heads=tuple(ranked[:heads]))

    def weigh(self, inputs: AttentionInputs, known: Known) -> tuple[Tensor, PromptMoments | None]:
        """Open the listed heads and close the others for certain; see `HeadGate.weigh`."""
        listed = {head for layer, head in self.open_heads if layer == known.layer}
        opened = [head in listed for head in range(inputs.query.shape[1])]
        return forced(torch.tensor(opened, device=inputs.query.device)[:, None], inputs), known.moments

    def of_layers(self, heads: int) -> Tensor:
        """Say what `weigh` does of every layer at once, [layers, heads] nats; the last one is any without open heads.

        Args:
            heads: Query heads of each.
        """
        mass = torch.full((2 + max((layer for layer, _ in self.open_heads), default=-1), heads), -torch.inf)
        for layer, head in self.open_heads:
            mass[layer, head] = torch.inf
        return mass

    def unknown_heads(self, heads: Mapping[int, int]) -> list[tuple[int, int]]:
        """List the heads that the gate names and a model does not have; see `HeadGate.unknown_heads`."""
        return [(layer, head) for layer, head in self.open_heads if head >= heads.get(layer, 0)]

    def of_heads(self, heads: range) -> StaticGate:
        """Return the gate for some of the query heads of every layer; see `HeadGate.of_heads`."""
        if not heads.start:
            return self
        pairs = tuple((layer, head - heads.start) for layer, head in self.open_heads if head in heads)
        return self.model_copy(update={"open_heads": pairs})


class OpenGate(HeadGate):
    """Open every head for every query: dense attention, computed by the library."""

    kind: Literal["open"] = "open"

    def weigh(self, inputs: AttentionInputs, known: Known) -> tuple[Tensor, PromptMoments | None]:
        """Open for certain; see `HeadGate.weigh`."""
        return all_open(inputs), known.moments


class ClosedGate(HeadGate):
    """Close every head for every query: sink and window only, as StreamingLLM (arXiv 2309.17453) does."""

    kind: Literal["closed"] = "closed"

    def weigh(self, inputs: AttentionInputs, known: Known) -> tuple[Tensor, PromptMoments | None]:
        """Close for certain; see `HeadGate.weigh`."""
        return -all_open(inputs), known.moments
