"""From measured curves to thresholds: conformal risk control, and one budget over all heads.

Curves have one entry per *rung*, from "closed for every query" over the margins of the grid to "open for every query".
Along the rungs the missed mass falls to 0 and the open fraction rises to 1.

Source: Angelopoulos et al., Conformal Risk Control, arXiv 2208.02814, theorem 1 with B = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.errors import CalibrationError
from patchattn.gates.thresholds import OpenFractionTarget, RiskTarget

_STEPS = 60


@dataclass(frozen=True)
class Curves:
    """Curves of one estimate.

    Args:
        margins: [rungs] nats, from -inf (closed for every query) to +inf (open for every query).
        missed_mass: [2, layers, query_heads, rungs]; mean over the documents of even and of odd index.
        open_fraction: [layers, query_heads, rungs]; mean over all documents.
        documents: Number of documents of even and of odd index.
    """

    margins: Tensor
    missed_mass: Tensor
    open_fraction: Tensor
    documents: tuple[int, int]

    @property
    def missed_mass_of_all(self) -> Tensor:
        """Mean over all documents, [layers, query_heads, rungs]."""
        even, odd = self.documents
        return (even * self.missed_mass[0] + odd * self.missed_mass[1]) / (even + odd)


def rung_margins(margins: Tensor) -> Tensor:
    """Return the margin of every rung, [rungs] nats, from "closed for every query" to "open for every query"."""
    ends = torch.tensor([torch.inf])
    return torch.cat([-ends, margins, ends])


def rungs(curves: Curves, target: RiskTarget | OpenFractionTarget) -> Tensor:
    """Choose a rung for each head, [layers, query_heads] int64.

    Raises:
        CalibrationError: The target promises more than so few documents can carry.
    """
    if isinstance(target, OpenFractionTarget):
        return _within_budget(curves.missed_mass_of_all, curves.open_fraction, target.fraction)
    if target.scope == "head":
        _check_documents(target, sum(curves.documents), sum(curves.documents))
        return _first(_bounded(curves.missed_mass_of_all, sum(curves.documents), target.alpha))
    return _shared_risk(curves, target)


def documents_needed(target: RiskTarget) -> int:
    """Number of documents that a promise needs: for `scope="model"` in both halves together."""
    # Rounding must not ask for 50 documents where 1 / 0.02 - 1 = 49 will do.
    needed = math.ceil(round(1 / target.alpha - 1, 9))
    return needed if target.scope == "head" else 2 * needed


def _check_documents(target: RiskTarget, carrying: int, documents: int) -> None:
    if 1 / (carrying + 1) > target.alpha * (1 + 1e-12):
        least = 1 / (documents + 1 if target.scope == "head" else documents // 2 + 1)
        raise CalibrationError(
            f"RiskTarget(alpha={target.alpha}, scope={target.scope!r}) needs {documents_needed(target)} documents; "
            f"the calibration has {documents}.",
            fix=f"measure more documents, or ask for alpha >= {least:.3g}",
        )


def _bounded(missed: Tensor, documents: int, alpha: float) -> Tensor:
    """Where the risk of the next document is at most alpha: (n R + 1) / (n + 1) <= alpha."""
    return (documents * missed.double() + 1) / (documents + 1) <= alpha * (1 + 1e-12)


def _first(good: Tensor) -> Tensor:
    """Index of the first True along the rungs; the last rung misses nothing, so there always is one."""
    return good.int().argmax(-1)


def at_price(missed: Tensor, opened: Tensor, price: float) -> Tensor:
    """For each head the rung with the least missed mass + price * open fraction; the more open one among equals."""
    cost = missed.double() + price * opened.double()
    # Rounding in the file makes rungs differ by less than this without meaning.
    cheapest = cost <= cost.amin(-1, keepdim=True) + 1e-12
    order = torch.arange(cost.shape[-1])
    return torch.where(cheapest, order, -1).amax(-1)


def _within_budget(missed: Tensor, opened: Tensor, fraction: float) -> Tensor:
    """Choose rungs with the least missed mass in all, at most `fraction` open on average over heads.

    The price of opening is the same for all heads: at the best allocation no head could spend a bit of the budget
    better than another. What is left of the budget because rungs are steps goes to whichever single step gains most.
    """
    chosen = cheapest_within(missed, opened, fraction)
    left = (fraction - _mean_at(opened, chosen)) * chosen.numel()
    while True:
        now_open, now_missed = _at(opened, chosen), _at(missed, chosen)
        cost, gain = opened.double() - now_open, now_missed - missed.double()
        gain = torch.where((cost <= left) & (gain > 1e-12), gain, 0)
        best = int(gain.argmax())
        if gain.flatten()[best] <= 0:
            return chosen
        left -= float(cost.flatten()[best])
        chosen.view(-1)[best // missed.shape[-1]] = best % missed.shape[-1]


def cheapest_within(missed: Tensor, opened: Tensor, fraction: float) -> Tensor:
    """Choose rungs at one price of opening, the lowest at which at most `fraction` is open on average over heads."""
    low, high = 1e-9, 1e9
    for _ in range(_STEPS):
        price = math.sqrt(low * high)
        fits = _mean_at(opened, at_price(missed, opened, price)) <= fraction
        low, high = (low, price) if fits else (price, high)
    return at_price(missed, opened, high)


def _shared_risk(curves: Curves, target: RiskTarget) -> Tensor:
    """Bound the mean over heads: the odd documents order the allocations by price, the even ones choose the price."""
    even, odd = curves.documents
    if odd == 0:
        _check_documents(target, 0, even)
    _check_documents(target, even, even + odd)

    def at(price: float) -> tuple[Tensor, bool]:
        chosen = at_price(curves.missed_mass[1], curves.open_fraction, price)
        risk = torch.tensor(_mean_at(curves.missed_mass[0], chosen))
        return chosen, bool(_bounded(risk, even, target.alpha))

    low, high = 1e-9, 1e9
    best, good = at(low)
    if not good:
        # What the odd documents never missed the even ones did: only all open is safe.
        return torch.full_like(best, curves.margins.shape[0] - 1)
    for _ in range(_STEPS):
        price = math.sqrt(low * high)
        chosen, good = at(price)
        low, high = (price, high) if good else (low, price)
        best = chosen if good else best
    return best


def _at(curve: Tensor, chosen: Tensor) -> Tensor:
    return curve.double().gather(-1, chosen[..., None])


def _mean_at(curve: Tensor, chosen: Tensor) -> float:
    return float(_at(curve, chosen).mean())
