"""From measured prices to thresholds: what closing costs in KL to the dense model, and the cheapest way to a target.

Curves have rungs as in `patchattn.calibration.risk`. Prices of pairs are added up; what the patched model's KL really
was on documents that chose nothing says how far that holds.

Source of the promise: Angelopoulos et al., Conformal Risk Control, arXiv 2208.02814, theorem 1 with B = `KL_BOUND`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from patchattn.calibration.risk import at_price, within_budget
from patchattn.errors import CalibrationError
from patchattn.gates.thresholds import KL_BOUND, KLTarget, OpenFractionTarget

TRIED = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08)
"""Predicted KL of the thresholds that are tried on held-out documents, nats per token."""

_HIGHEST = 1e6


@dataclass(frozen=True)
class Prices:
    """Prices of closing, and what came of them.

    Args:
        margins: [rungs] nats, from -inf (closed for every query) to +inf (open for every query).
        price: [layers, query_heads, rungs]; what closing at this rung costs, nats of KL per token.
        open_fraction: [layers, query_heads, rungs].
        exchanges: [settings]; the rates that were tried, see `at_exchange`, none below the one before it.
        kl: [documents, settings]; KL(dense || patched) on held-out documents, nats per token.
        kl_open_fraction: [documents, settings]; open fraction there.
    """

    margins: Tensor
    price: Tensor
    open_fraction: Tensor
    exchanges: Tensor
    kl: Tensor
    kl_open_fraction: Tensor

    def rungs(self, target: KLTarget | OpenFractionTarget) -> Tensor:
        """Choose a rung for each head, [layers, query_heads] int64.

        Raises:
            CalibrationError: The target promises more than so few held-out documents can carry.
        """
        if isinstance(target, OpenFractionTarget):
            return within_budget(self._scaled, self.open_fraction, target.fraction)
        return self._promised(target.nats) if target.promised else self._expected(target.nats)

    @cached_property
    def _scaled(self) -> Tensor:
        """Prices as shares of what closing everything costs: of the size that the search for a budget is made for."""
        return self.price.double() / self.price[..., 0].double().sum().clamp(min=1e-30) * self.price[..., 0].numel()

    def at_exchange(self, exchange: float) -> Tensor:
        """Return the rungs at which no opening gains less than the rate; [layers, query_heads].

        Args:
            exchange: What an open fraction of 1 has to gain, as a share of what closing everything costs.
        """
        return at_price(self._scaled, self.open_fraction, exchange)

    def predicted(self, rungs: Tensor) -> float:
        """Add up the prices of what is closed, nats of KL per token."""
        return float(self.price.double().gather(-1, rungs[..., None]).sum())

    def opened(self, rungs: Tensor) -> float:
        """Return the open fraction, mean over heads."""
        return float(self.open_fraction.double().gather(-1, rungs[..., None]).mean())

    def expected(self, rungs: Tensor) -> float:
        """Say which KL is to be expected: the prices, by the factor that held-out documents show at this size."""
        predicted = self.predicted(rungs)
        return predicted * self.factor(predicted)

    def factor(self, predicted: float) -> float:
        """Return measured over predicted KL near a predicted one; 1 where nothing was held out."""
        known = [(p, m) for p, m in self.measured() if p > 0 and m > 0]
        if not known:
            return 1.0
        known.sort()
        if predicted <= known[0][0]:
            return known[0][1] / known[0][0]
        for (low, of_low), (high, of_high) in pairwise(known):
            if predicted <= high:
                share = math.log(predicted / low) / math.log(high / low) if high > low else 0.0
                return (of_low / low) ** (1 - share) * (of_high / high) ** share
        return known[-1][1] / known[-1][0]

    def measured(self) -> list[tuple[float, float]]:
        """Return (predicted, measured) KL of each setting that was tried, nats per token; empty if none was."""
        return self._measured

    @cached_property
    def _measured(self) -> list[tuple[float, float]]:
        if not len(self.kl):
            return []
        predicted = [self.predicted(self.at_exchange(float(exchange))) for exchange in self.exchanges]
        return list(zip(predicted, self.kl.double().mean(0).tolist(), strict=True))

    def exchange_for(self, nats: float, kl: Callable[[Tensor], float]) -> float:
        """Return the highest rate at which a KL, found from rungs, is at most so many nats; 0 where none is.

        The rate is a number of float32, as files keep it: it stands right at a step of some head, and the next number
        is another policy.
        """
        if kl(self.at_exchange(_HIGHEST)) <= nats:
            return _HIGHEST
        low, high = _float32(1 / _HIGHEST), _HIGHEST
        if kl(self.at_exchange(low)) > nats:
            return 0.0
        while low < (middle := _float32(math.sqrt(low * high))) < high:
            low, high = (middle, high) if kl(self.at_exchange(middle)) <= nats else (low, middle)
        return low

    def _expected(self, nats: float) -> Tensor:
        return self.at_exchange(self.exchange_for(nats, self.expected))

    def _promised(self, nats: float) -> Tensor:
        documents = len(self.kl)
        if (needed := documents_needed(nats)) > documents:
            raise CalibrationError(
                f"KLTarget(nats={nats:g}, promised=True) needs {needed} held-out documents; the calibration has "
                f"{documents}.",
                fix=f"measure more documents, ask for at least {KL_BOUND / (documents + 1):.2g} nats, or leave "
                "promised out",
            )
        best = self.at_exchange(0.0)
        for exchange, bound in zip(self.exchanges.tolist(), self.bounds().tolist(), strict=True):
            if bound > nats * (1 + 1e-12):
                break
            best = self.at_exchange(exchange)
        return best

    def bounds(self) -> Tensor:
        """Bound the KL of the next document for each setting, [settings] nats per token."""
        documents = len(self.kl)
        return (self.kl.double().clamp(max=KL_BOUND).sum(0) + KL_BOUND) / (documents + 1)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def documents_needed(nats: float) -> int:
    """Number of held-out documents that a promise of so many nats needs."""
    return max(math.ceil(round(KL_BOUND / nats - 1, 9)), 1)
