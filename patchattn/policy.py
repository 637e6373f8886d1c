"""What the user wants: small, frozen, serialisable policies without tensors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    field_validator,
)

LocalShare = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
"""A share of the softmax mass held by the local keys, strictly between 0 and 1."""

Estimate = Literal["guarded", "saturating", "lognormal"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

_MOST_TOKENS = 2**31 - 1  # slots are 32-bit numbers


def phase_of(query_length: int) -> Phase:
    """Name the phase of a call: decode has one query per sequence."""
    return "decode" if query_length == 1 else "prefill"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RiskTarget(_Frozen):
    """Ask a calibration for the cheapest thresholds that keep the missed attention mass at `alpha`.

    The promise is in expectation over documents like those of the calibration, in source and length, on dense
    activations: the mean missed mass of a document is at most `alpha`. It needs `1 / alpha - 1` documents.

    Args:
        alpha: Share of a query's attention that may be missed on average, in (0, 1).
        scope: `"head"`: the promise holds for every head by itself. `"model"`: for the mean over all heads, which
            leaves heads that gain much by closing more of the risk; half of the documents choose how it is shared,
            the other half carries the promise, so it needs twice as many documents.

    Source: conformal risk control, arXiv 2208.02814, theorem 1.
    """

    kind: Literal["risk"] = "risk"
    alpha: LocalShare
    scope: Literal["head", "model"] = "head"


class OpenFractionTarget(_Frozen):
    """Ask a calibration for the thresholds that miss least while at most `fraction` of the pairs are open.

    One budget for all heads: those that lose most by closing get most of it. No promise about the missed mass.

    Args:
        fraction: Open fraction over all measured heads, in (0, 1).
    """

    kind: Literal["open_fraction"] = "open_fraction"
    fraction: LocalShare


Target = RiskTarget | OpenFractionTarget


def _kind_of_threshold(threshold: Any) -> str:
    if isinstance(threshold, dict):
        return str(threshold.get("kind", "risk"))
    return getattr(threshold, "kind", "share")


Threshold = Annotated[
    Annotated[LocalShare, Tag("share")]
    | Annotated[RiskTarget, Tag("risk")]
    | Annotated[OpenFractionTarget, Tag("open_fraction")],
    Discriminator(_kind_of_threshold),
]


class MomentGate(_Frozen):
    """Close a head for a query when the moments of the far keys say that the local keys hold enough mass.

    The bulk keys of a sequence are summarised by their count, mean and covariance; the softmax mass of a query over
    them has a closed form (`estimate`). The head gate closes where the local keys' share of the mass, exact for the
    local keys and estimated for the bulk, is at least `threshold`.

    Args:
        threshold: Local share in (0, 1) from which a gate closes, the same for all heads: lower is cheaper, higher is
            safer. Or `RiskTarget` or `OpenFractionTarget`, which take a threshold for each head from a calibration.
        moments: Where the moments come from. `"prompt"`: from the sequence's own cached keys. `"calibration"`: from
            the calibration, measured on other text. A target needs a calibration that was measured with the same.
        estimate: `"guarded"` opens where the spread of the scores is so large that single keys rule the sum, which
            moments can't see; `"saturating"` predicts a Gaussian maximum there (Derrida 1980); `"lognormal"` is the
            estimate of QAdA (arXiv 2502.09647), an expectation over infinitely many keys. Elsewhere all three agree.
    """

    kind: Literal["moment"] = "moment"
    threshold: Threshold = 0.6
    moments: Literal["prompt", "calibration"] = "prompt"
    estimate: Estimate = "guarded"

    @property
    def needs_calibration(self) -> bool:
        """Whether the gate can't work without a calibration."""
        return self.moments == "calibration" or not isinstance(self.threshold, float)


class OracleGate(_Frozen):
    """Close a head for a query when its exact local share is at least `threshold`.

    Needs the exact mass of the bulk keys, so it saves no time: it is what the moment gate is judged by.
    """

    kind: Literal["oracle"] = "oracle"
    threshold: LocalShare = 0.6


class StaticGate(_Frozen):
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
    def from_calibration(cls, calibration: Any, *, heads: int) -> StaticGate:
        """Open the heads that need the bulk keys most often.

        Args:
            calibration: A `patchattn.Calibration`; its heads are ranked by how often the exact share opens them.
            heads: Number of heads to keep open, at most all that were measured.
        """
        return cls(open_heads=tuple(calibration.heads_by_oracle()[:heads]))


class OpenGate(_Frozen):
    """Open every head for every query: dense attention, computed by the library."""

    kind: Literal["open"] = "open"


class ClosedGate(_Frozen):
    """Close every head for every query: sink and window only, as StreamingLLM (arXiv 2309.17453) does."""

    kind: Literal["closed"] = "closed"


Gate = Annotated[MomentGate | OracleGate | StaticGate | OpenGate | ClosedGate, Field(discriminator="kind")]


NumberOfKeys = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]


class MinBulk(_Frozen):
    """Numbers of bulk keys below which a query opens without being asked, one for each phase.

    Args:
        prefill: For calls with several queries per sequence.
        decode: For calls with one query per sequence.
    """

    prefill: NumberOfKeys
    decode: NumberOfKeys


class Policy(_Frozen):
    """How a patched model decides which heads read the long context.

    Args:
        sink_size: Number of first tokens that are always attended.
        window_size: Number of last tokens that are always attended, the query's own included; at least 1.
        gate: The head gate: `MomentGate`, `OracleGate`, `StaticGate`, `OpenGate` or `ClosedGate`.
        layers: Indices of the layers to patch, at least one; None means every layer that can be.
        phases: Phases in which the gate decides; in the others attention is dense. A call with one query per
            sequence is decode, any other is prefill.
        min_bulk: Queries with fewer bulk keys than this are opened without asking, because there the gated path
            can't win: one number, or `MinBulk` with one for each phase. `"auto"` is resolved by `patch` for the
            backend at hand.
        schema_version: Version of this schema.

    Example:
        >>> policy = Policy(window_size=256, gate=MomentGate(threshold=0.8))
        >>> Policy.model_validate_json(policy.model_dump_json()) == policy
        True
    """

    schema_version: Literal[1] = 1
    sink_size: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] = 16
    window_size: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] = 1024
    gate: Gate = MomentGate()
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    phases: frozenset[Phase] = frozenset({"prefill", "decode"})
    min_bulk: NumberOfKeys | MinBulk | Literal["auto"] = "auto"

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
