"""What the user wants: small, frozen, serialisable policies without tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_serializer, field_validator

from patchattn.gates import Gate, MomentGate
from patchattn.gates.thresholds import Frozen

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

MOST_TOKENS = 2**31 - 1
"""The most tokens of a sequence: slots are 32-bit numbers."""

DEFAULT_WINDOW = 2048
"""Window of a policy that names none, tokens; see docs/decisions/0014-a-window-of-a-quarter.md."""


def phase_of(query_length: int) -> Phase:
    """Name the phase of a call: decode has one query per sequence."""
    return "decode" if query_length == 1 else "prefill"


NumberOfKeys = Annotated[int, Field(ge=0, le=MOST_TOKENS)]


class MinBulk(Frozen):
    """Numbers of bulk keys below which a query opens without being asked, one for each phase.

    Args:
        prefill: For calls with several queries per sequence.
        decode: For calls with one query per sequence.
    """

    prefill: NumberOfKeys
    decode: NumberOfKeys


class Policy(Frozen):
    """How a patched model decides which heads read the long context.

    Args:
        sink_size: Number of first tokens that are always attended.
        window_size: Number of last tokens that are always attended, the query's own included; at least 1.
        gate: The head gate: `MomentGate`, `OracleGate`, `StaticGate`, `OpenGate` or `ClosedGate`.
        layers: Indices of the layers to patch, at least one; None means every layer that can be.
        phases: Phases in which the gate decides; in the others attention is dense. A call with one query per
            sequence is decode, any other is prefill.
        min_bulk: Queries with fewer bulk keys than this are opened without asking, because there the gated path
            can't win: one number, or `MinBulk` with one for each phase. `"auto"` leaves it to the backend at hand,
            whose numbers `patch` puts in place; calls that are too short to pay are then dense, too.
        whole_groups: In decode, open all query heads of a KV group where one opens: its keys are read anyway. False
            decides each head on its own, as in prefill.
        schema_version: Version of this schema.

    Example:
        >>> policy = Policy(window_size=256, gate=MomentGate(threshold=0.8))
        >>> Policy.model_validate_json(policy.model_dump_json()) == policy
        True
    """

    schema_version: Literal[1] = 1
    sink_size: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 16
    window_size: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = DEFAULT_WINDOW
    gate: Gate = MomentGate()
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    phases: frozenset[Phase] = frozenset({"prefill", "decode"})
    min_bulk: NumberOfKeys | MinBulk | Literal["auto"] = "auto"
    whole_groups: bool = False

    def break_even(self, phase: Phase) -> int:
        """Return `min_bulk` as the number of keys of a phase; 0 while it is `"auto"`, which `patch` resolves."""
        if isinstance(self.min_bulk, MinBulk):
            return self.min_bulk.prefill if phase == "prefill" else self.min_bulk.decode
        return 0 if self.min_bulk == "auto" else self.min_bulk

    @field_validator("layers")
    @classmethod
    def _layers_sorted_and_unique(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers == ():
            raise ValueError("layers is empty, so the gate would never decide; name layers, or None for all")
        return None if layers is None else tuple(sorted(set(layers)))

    @field_validator("phases")
    @classmethod
    def _some_phase(cls, phases: frozenset[Phase]) -> frozenset[Phase]:
        if not phases:
            raise ValueError('phases is empty, so the gate would never decide; name "prefill", "decode" or both')
        return phases

    # The order of a set changes from run to run, and with it the file and its digest.
    @field_serializer("phases", when_used="json")
    def _phases_in_one_order(self, phases: frozenset[Phase]) -> list[Phase]:
        return sorted(phases, reverse=True)
