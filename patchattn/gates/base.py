"""What every kind of gate can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.thresholds import Frozen
from patchattn.moments.prompt import PromptMoments


@dataclass(frozen=True)
class Known:
    """What a gate may use beside the attention call.

    Args:
        layer: Index of the layer.
        moments: Running prompt moments of the cache; None if there are none yet.
        max_chunks: See `bulk_log_mass_from_prompt`.
        measured: What a calibration says about the layer's heads; None without one.
        positions: [batch or 1, query] int64; positions that the model gives the queries. None where they are not known.
        reach_query: Whether `moments` are known to go up to the first query.
        hidden: [batch, query, hidden]; what the attention module was given. None where no probe asks for it.
    """

    layer: int = 0
    moments: PromptMoments | None = None
    max_chunks: int | None = None
    measured: MeasuredHeads | None = None
    positions: Tensor | None = None
    reach_query: bool = False
    hidden: Tensor | None = None


class HeadGate(Frozen):
    """A rule that opens and closes heads, query by query."""

    @property
    def margin(self) -> float:
        """Margin in nats from which the gate closes; 0 where `weigh` says it all."""
        return 0.0

    @property
    def keeps_moments(self) -> bool:
        """Whether the gate needs the running moments of the prompt's own keys."""
        return False

    @property
    def reads_keys(self) -> bool:
        """Whether `weigh` looks at the keys of a call, where moments go up to its query."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether the gate can't work without a calibration."""
        return bool(self.of_calibration())

    def of_calibration(self) -> str:
        """Say what the gate takes from a calibration, as its argument is written; empty for nothing."""
        return ""

    def weigh(self, inputs: AttentionInputs, known: Known) -> tuple[Tensor, PromptMoments | None]:
        """Find the bulk log mass that is compared with the exact local log mass.

        Args:
            inputs: The attention call.
            known: What else is known.

        Returns:
            [batch, heads, query] nats: exact, estimated, or +inf to open and -inf to close for certain; NaN opens. Of
            queries that are not asked it says nothing. And the prompt moments after this call, None without any.
        """
        raise NotImplementedError

    def unknown_heads(self, heads: Mapping[int, int]) -> list[tuple[int, int]]:
        """List the heads that the gate names and a model does not have; `heads` is their number by patched layer."""
        return []

    def of_heads(self, heads: range) -> HeadGate:
        """Return the gate for some of the query heads of every layer, counted from the first of them."""
        return self
