"""From measured prices to thresholds: what closing costs in KL to the dense model, and the cheapest way to a target.

Curves have rungs as in `patchattn.calibration.risk`. The price of a pair is what closing it costs where nothing else is
closed, its value what it costs in a model that is gated already, measured at one open fraction. In between, what it
costs goes from the one to the other in proportion to what is closed, for KL is of second order. What the KL of the
patched model really was on documents that chose nothing says how far that holds.

Source of the promise: Angelopoulos et al., Conformal Risk Control, arXiv 2208.02814, theorem 1 with B = `KL_BOUND`.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchattn.calibration.risk import cheapest_within, rung_margins
from patchattn.errors import CalibrationError
from patchattn.gates.thresholds import KL_BOUND, KLTarget, OpenFractionTarget

TRIED = (0.6, 0.45, 0.3, 0.2, 0.13, 0.08)
"""Open fractions that are tried on held-out documents, the safest first."""

_FINENESS = 200
"""Open fractions that a KL target chooses from: multiples of one over this."""


@dataclass(frozen=True)
class Prices:
    """Prices of closing, and what came of them.

    Args:
        margins: [rungs]; margins over the scale of a head's probe, from -inf (closed for every query) to +inf (open for
            every query).
        price: [layers, query_heads, rungs]; what closing at this rung costs, each pair as if it were the only one, nats
            of KL per token.
        value: [layers, query_heads, rungs]; what it costs where the other heads are gated too.
        open_fraction: [layers, query_heads, rungs].
        tried: [settings] open fractions that were tried, none above the one before it.
        kl: [documents, settings]; KL(dense || patched) on held-out documents, nats per token.
        kl_open_fraction: [documents, settings]; open fraction there.
        gated: Open fraction of the model in which values were measured.
    """

    margins: Tensor
    price: Tensor
    value: Tensor
    open_fraction: Tensor
    tried: Tensor
    kl: Tensor
    kl_open_fraction: Tensor
    gated: float

    @classmethod
    def of(cls, tensors: dict[str, Tensor], gated: float) -> Prices:
        """Read them from the tensors of a calibration."""
        names = ("price", "value", "priced_open_fraction", "tried", "kl", "kl_open_fraction")
        found = {name.removeprefix("priced_"): tensors[name].float() for name in names}
        return cls(margins=rung_margins(tensors["margins"]), gated=gated, **found)

    def rungs(self, target: KLTarget | OpenFractionTarget) -> Tensor:
        """Choose a rung for each head, [layers, query_heads] int64.

        Raises:
            CalibrationError: The target promises more than so few held-out documents can carry.
        """
        if isinstance(target, OpenFractionTarget):
            return self.at(target.fraction)
        return self.at(self._promised(target.nats) if target.promised else self._expected(target.nats))

    def at(self, fraction: float) -> Tensor:
        """Choose the rungs that cost least while at most so many pairs are open, [layers, query_heads] int64."""
        if fraction not in self._chosen:
            share = self._share_of_gated(fraction)
            cost = (1 - share) * self.price.double() + share * self.value.double()
            # Of the size of missed masses, for which the search is made.
            whole = cost[..., 0].sum().clamp(min=1e-30)
            self._chosen[fraction] = cheapest_within(cost / whole * cost[..., 0].numel(), self.open_fraction, fraction)
        return self._chosen[fraction]

    @cached_property
    def _chosen(self) -> dict[float, Tensor]:
        return {1.0: torch.full(self.price.shape[:2], self.price.shape[-1] - 1)}

    def _share_of_gated(self, fraction: float) -> float:
        """Say how much is closed, as a share of what was closed where values were measured; at most 1."""
        return min((1 - fraction) / (1 - self.gated), 1.0)

    def opened(self, rungs: Tensor) -> float:
        """Return the open fraction, mean over heads."""
        return float(self.open_fraction.double().gather(-1, rungs[..., None]).mean())

    def predicted(self, rungs: Tensor, layers: list[int] | None = None) -> float:
        """Predict the KL of what is closed, nats per token: costs on average along the way from the dense model.

        Args:
            rungs: [layers, query_heads] int64.
            layers: Only what these contribute; None means all.
        """
        half = self._share_of_gated(self.opened(rungs)) / 2
        cost = ((1 - half) * self.price.double() + half * self.value.double()).gather(-1, rungs[..., None])
        return float(cost.sum() if layers is None else cost[layers].sum())

    def expected(self, rungs: Tensor, layers: list[int] | None = None) -> float:
        """Say which KL is to be expected: the predicted one, by the factor that held-out documents show there."""
        return self.predicted(rungs, layers) * self.factor(self.opened(rungs))

    def factor(self, opened: float) -> float:
        """Return measured over predicted KL near an open fraction; 1 where nothing was held out."""
        found = self._factors
        if not found:
            return 1.0
        after = bisect.bisect([at for at, _ in found], opened)
        (low, of_low), (high, of_high) = found[max(after - 1, 0)], found[min(after, len(found) - 1)]
        share = (opened - low) / (high - low) if high > low else 0.0
        return of_low ** (1 - share) * of_high**share

    @cached_property
    def _factors(self) -> list[tuple[float, float]]:
        """(open fraction, measured over predicted KL) where both say something, ascending."""
        at = [self.opened(self.at(float(fraction))) for fraction in self.tried]
        both = zip(at, self.measured(), strict=False)
        return sorted((opened, kl / predicted) for opened, (predicted, kl) in both if predicted > 0 and kl > 0)

    def measured(self) -> list[tuple[float, float]]:
        """Return (predicted, measured) KL of each setting that was tried, nats per token; empty if none was."""
        if not len(self.kl):
            return []
        predicted = [self.predicted(self.at(float(fraction))) for fraction in self.tried]
        return list(zip(predicted, self.kl.double().mean(0).tolist(), strict=True))

    def _expected(self, nats: float) -> float:
        """Return an open fraction of `_FINENESS` whose expected KL is at most so many nats, where one step less is not.

        There may be several, for expected KL rises here and there as more opens. More nats never give a larger one.
        """

        def is_enough(step: int) -> bool:
            return self.expected(self.at(step / _FINENESS)) <= nats

        return bisect.bisect_left(range(_FINENESS), 1, key=is_enough) / _FINENESS

    def _promised(self, nats: float) -> float:
        """Return the least open fraction that was tried and is bounded by so many nats, and by all that are safer."""
        documents = len(self.kl)
        if (needed := documents_needed(nats)) > documents:
            raise CalibrationError(
                f"KLTarget(nats={nats:g}, promised=True) needs {needed} held-out documents; the calibration has "
                f"{documents}.",
                fix="measure more documents, ask for more nats, or leave promised out",
            )
        kept = int((self.bounds() <= nats * (1 + 1e-12)).sum())
        if not kept:
            raise CalibrationError(
                f"KLTarget(nats={nats:g}, promised=True) is not kept by any thresholds that were tried; the safest, "
                f"with {float(self.tried[0]):.0%} open, can be promised for {_rounded_up(float(self.bounds()[0])):g} "
                "nats.",
                fix="ask for as many nats, measure more documents, or leave promised out",
            )
        return float(self.tried[kept - 1])

    def bounds(self) -> Tensor:
        """Bound the KL of the next document for each setting, [settings] nats per token, none below the one before."""
        # A document's KL must not fall as less is open, or the bound would not hold.
        kl = self.kl.double().clamp(0, KL_BOUND).cummax(-1).values
        return (kl.sum(0) + KL_BOUND) / (len(kl) + 1)


def _rounded_up(nats: float) -> float:
    """Return the next number of two digits above."""
    step = 10.0 ** (math.floor(math.log10(nats)) - 1)
    return float(f"{math.ceil(nats / step) * step:.2g}")


def documents_needed(nats: float) -> int:
    """Number of held-out documents that a promise of so many nats needs."""
    return max(math.ceil(round(KL_BOUND / nats - 1, 9)), 1)
