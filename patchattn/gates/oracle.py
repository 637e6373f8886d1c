"""The gate that knows: what moment gates are judged by."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.gates.base import HeadGate, Known
from patchattn.gates.thresholds import DEFAULT_SHARE, LocalShare, margin_of
from patchattn.moments.prompt import PromptMoments


class OracleGate(HeadGate):
    """Close a head for a query when its exact local share is at least `threshold`.

    Needs the exact mass of the bulk keys, so it saves no time: it is what the moment gate is judged by.
    """

    kind: Literal["oracle"] = "oracle"
    threshold: LocalShare = DEFAULT_SHARE

    @property
    def margin(self) -> float:
        """Margin in nats from which the gate closes."""
        return margin_of(self.threshold)

    @property
    def reads_keys(self) -> bool:
        """The exact mass is that of the keys."""
        return True

    def weigh(self, inputs: AttentionInputs, known: Known) -> tuple[Tensor, PromptMoments | None]:
        """Compute the bulk log mass; see `HeadGate.weigh`."""
        return exact_masses(inputs)[0].bulk, known.moments
