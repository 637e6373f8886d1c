"""Where a gate closes: a share of the mass, or a target that a calibration turns into one for each head."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

LocalShare = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
"""A share of the softmax mass held by the local keys, strictly between 0 and 1."""

DEFAULT_SHARE = 0.8
"""Why: docs/decisions/0005-the-default-estimate.md."""


class Frozen(BaseModel):
    """A part of a policy: it does not change, and takes no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RiskTarget(Frozen):
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


class OpenFractionTarget(Frozen):
    """Ask a calibration for the best thresholds while at most `fraction` of the pairs are open.

    One budget for all heads: those that lose most by closing get most of it. What is lost is KL to the dense model
    where the calibration has prices for the gate's estimate, else attention mass that is missed. No promise about
    either.

    Args:
        fraction: Open fraction over all measured heads on the documents of the calibration, in (0, 1).
    """

    kind: Literal["open_fraction"] = "open_fraction"
    fraction: LocalShare


KL_BOUND = 0.1
"""Most nats per token that a document's KL counts for in a promise."""


class KLTarget(Frozen):
    """Ask a calibration for the cheapest thresholds that keep the model's predictions this close to the dense model's.

    Thresholds then weigh what closing a pair does to the model's output: the calibration must have been measured with
    prices.

    Args:
        nats: KL(dense || patched), mean over tokens, nats per token.
        promised: False: the KL that is expected, from what was measured on documents that chose nothing. True: a bound
            on it, for documents like these in source and length, where a document's KL is counted as at most
            `KL_BOUND`, so that `nats` must be less. It needs `KL_BOUND / nats - 1` such documents and more.

    Source of the bound: conformal risk control, arXiv 2208.02814, theorem 1.
    """

    kind: Literal["kl"] = "kl"
    nats: Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
    promised: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> KLTarget:
        if self.promised and self.nats >= KL_BOUND:
            raise ValueError(
                f"a promise counts a document's KL as {KL_BOUND:g} nats at most, so {self.nats:g} promise nothing; ask "
                "for less, or leave promised out"
            )
        return self


Target = RiskTarget | OpenFractionTarget | KLTarget


def _kind_of_threshold(threshold: Any) -> str:
    if isinstance(threshold, dict):
        return str(threshold.get("kind", "risk"))
    return getattr(threshold, "kind", "share")


Threshold = Annotated[
    Annotated[LocalShare, Tag("share")]
    | Annotated[RiskTarget, Tag("risk")]
    | Annotated[OpenFractionTarget, Tag("open_fraction")]
    | Annotated[KLTarget, Tag("kl")],
    Discriminator(_kind_of_threshold),
]


def margin_of(threshold: float) -> float:
    """Margin in nats at which the local keys hold the share `threshold`: its logit."""
    return math.log(threshold) - math.log1p(-threshold)
