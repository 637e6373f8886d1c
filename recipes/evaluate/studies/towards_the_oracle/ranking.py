"""What is left unpaid when pairs are opened by what a candidate says of them: prices of what is closed, added up.

A score is turned into the price that it makes us expect, head by head, by a curve that rises, from other documents. A
pair is opened where that is more than a price that all heads share, so that thresholds are by price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from studies.towards_the_oracle.estimates import AJAR, BOX, TOP
from torch import Tensor

from patchattn.moments.gaussian import CHUNK

Found = Mapping[str, Tensor]
"""What `Pass.read` returned for a document; heads of all layers side by side, [heads, rows]."""

_LOW, _HIGH = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84), (0.87, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
_QUANTILES = (*_LOW, *_HIGH, 0.985, 0.99, 0.995)
_LEAST_PRICE = 1e-15
_PENALTY = 1e-3
PRICES = torch.logspace(-10, -4, 49, dtype=torch.float64)
"""Prices that pairs are opened at, nats per token."""

KAPPA = 4.0
"""A gate is unsure where the price that it expects is within this factor of the one at which pairs open."""


@dataclass(frozen=True)
class Candidate:
    """One way to rank pairs.

    Args:
        features: Whose weighted sum ranks, with weights fitted to the logarithm of the price of each head; or one by
            itself.
        cost: What it reads of a query's bulk, as a share of all keys and values in it.
        asked: Where it is asked, after the probe: everywhere, where the probe is unsure, or beyond freezing.
        ajar: How blocks are chosen for the third state; None has two states.
        choosing: What choosing blocks reads, as a share.
    """

    features: tuple[str, ...]
    cost: float = 0.0
    asked: str = "everywhere"
    ajar: str | None = None
    choosing: float = 0.0


class Outcome(NamedTuple):
    """What opening pairs at each of `PRICES` comes to on a document, [prices] each.

    Args:
        open: Share of the pairs.
        read: Share of the bulk keys that are read, what estimates read included.
        left: Prices of what is not read, nats per token.
    """

    open: np.ndarray
    read: np.ndarray
    left: np.ndarray


class Expected:
    """The price that a score makes us expect, a rising step function for each head."""

    def __init__(self, score: Tensor, price: Tensor) -> None:
        self._edges = score.quantile(torch.tensor(_QUANTILES, dtype=score.dtype), dim=1).T.sort(1).values.contiguous()
        at = torch.searchsorted(self._edges, score)
        sums = torch.zeros(2, len(score), len(_QUANTILES) + 1, dtype=torch.float64)
        sums.scatter_add_(2, at.expand(2, -1, -1), torch.stack([price.double(), torch.ones_like(price).double()]))
        self._values = rising(*sums)

    def of_heads(self, heads: slice) -> Expected:
        """Return the steps of some of the heads."""
        part = copy(self)
        part._edges, part._values = self._edges[heads], self._values[heads]
        return part

    def at(self, score: Tensor) -> Tensor:
        """Return what scores make us expect, [heads, rows] nats per token."""
        return self._values.gather(1, torch.searchsorted(self._edges, score.contiguous()))


def rising(total: Tensor, count: Tensor) -> Tensor:
    """Fit rising steps to bins by least squares: largest of smallest means, [heads, bins]."""
    sums, counts = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (total, count))
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / (counts[:, None, 1:] - counts[:, :-1, None]).clamp(min=1e-9)
    # From bin `j`, rows, up to bin `k`, columns.
    upwards = torch.ones(means.shape[1:], dtype=torch.bool).triu()
    means = means.masked_fill(~upwards, torch.inf)
    least = means.flip(2).cummin(2).values.flip(2)
    return least.masked_fill(~upwards, -torch.inf).amax(1)


class Ranker:
    """A candidate that was fitted to some documents.

    Args:
        candidate: What it is.
        priced: Documents.
        first: What is asked before it, already fitted; None where it is asked everywhere.
    """

    def __init__(self, candidate: Candidate, priced: Sequence[Found], first: Ranker | None = None) -> None:
        self._candidate, self._first = candidate, first
        price = together(priced, "price")
        self._weights = self._fit(priced, price)
        scores = torch.cat([self.score(one) for one in priced], 1)
        self._expected = Expected(scores, price)
        if candidate.ajar:
            self._ajar = Expected(scores, together(priced, f"price, ajar by {candidate.ajar}"))

    def _fit(self, priced: Sequence[Found], price: Tensor) -> Tensor | None:
        names = self._candidate.features
        if len(names) == 1:
            return None
        x = torch.stack([together(priced, name) for name in names] + [torch.ones_like(price)], -1).double()
        y = (price.double() + _LEAST_PRICE).log()[..., None]
        gram = x.mT @ x
        penalty = _PENALTY * price.shape[1] * torch.diag_embed(x.var(1).clamp(min=1e-9))
        penalty[:, -1] = 0
        return torch.linalg.solve(gram + penalty, x.mT @ y)[..., :-1, 0]

    def score(self, found: Found) -> Tensor:
        """Rank the pairs of a document, [heads, rows] float32."""
        values = torch.stack([found[name].float() for name in self._candidate.features], -1)
        return values[..., 0] if self._weights is None else (values * self._weights[:, None].float()).sum(-1)

    def expected(self, found: Found) -> Tensor:
        """Return the price that is expected of each pair, [heads, rows]."""
        if self._candidate.features == ("price",):
            return found["price"].double()
        return self._expected.at(self.score(found))

    def prices(self, found: Found) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what is expected of each pair, [heads, rows]: closed, closed by what is asked before, and ajar."""
        before = None if self._first is None else self._first.expected(found)
        return self.expected(found), before, self._ajar.at(self.score(found)) if self._candidate.ajar else None

    def decide(
        self, found: Found, at: Tensor | float, prices: tuple[Tensor, Tensor | None, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Open pairs at one price.

        Args:
            found: What the candidate ranks by, and `n`.
            at: The price, nats per token.
            prices: What `prices` returns; None computes them.

        Returns:
            Which pairs are open, and which ajar, [heads, rows] bool; and the share of its bulk that each reads, what
            estimates read included.
        """
        candidate, (expected, before, ajar) = self._candidate, prices or self.prices(found)
        asked = torch.ones_like(expected, dtype=torch.bool)
        if before is not None:
            asked = found["spread"] > 1
            if candidate.asked == "unsure":
                asked = (before > at / KAPPA) & (before < at * KAPPA)
            expected = torch.where(asked, expected, before)
        is_open, is_ajar = expected > at, torch.zeros_like(asked)
        reads = is_open + candidate.cost * asked.double()
        if ajar is not None:
            n = found["n"].double()
            full = CHUNK * (found["n"] // CHUNK)
            share = ((n - full + full.clamp(max=TOP * AJAR)) / n + candidate.choosing).clamp(max=1)
            # The cheapest of the three, what is read and what is left together.
            is_ajar = ajar + at * share < expected.clamp(max=float(at))
            is_open = is_open & ~is_ajar
            reads = torch.where(is_ajar, share, is_open.double())
        return is_open, is_ajar, reads

    def judge(self, found: Found) -> Outcome:
        """Open pairs of a document at every price."""
        n, price, outcomes = found["n"].double(), found["price"].double(), []
        partly = found[f"price, ajar by {self._candidate.ajar}"].double() if self._candidate.ajar else price
        prices = self.prices(found)
        for at in PRICES:
            is_open, is_ajar, reads = self.decide(found, at, prices)
            left = torch.where(is_ajar, partly, price).masked_fill(is_open, 0)
            outcomes.append((is_open.double().mean(), (reads * n).sum() / (n.sum() * len(price)), left.sum()))
        return Outcome(*(np.array(part) for part in zip(*outcomes, strict=True)))

    def of_heads(self, heads: slice) -> Ranker:
        """Return the ranker for some of the heads."""
        part = copy(self)
        for name in ("_expected", "_ajar"):
            if hasattr(self, name):
                setattr(part, name, getattr(self, name).of_heads(heads))
        part._weights = None if self._weights is None else self._weights[heads]
        part._first = None if self._first is None else self._first.of_heads(heads)
        return part


def together(priced: Sequence[Found], name: str) -> Tensor:
    """Put what was found on several documents side by side, [heads, rows] float32."""
    return torch.cat([one[name].float() for one in priced], 1)


def price_for(outcomes: Sequence[Outcome], by: str, share: float) -> float:
    """Return the price at which so large a share of the pairs is `open`, or of the bulk keys `read`, on average."""
    shares = np.mean([getattr(one, by) for one in outcomes], 0)
    return float(np.exp(np.interp(share, shares[::-1], PRICES.log().flip(0).numpy())))


def left_at(outcome: Outcome, by: str, shares: Sequence[float]) -> tuple[float, ...]:
    """Return the price that is left at shares of pairs open or of keys read; NaN where that is not reached."""
    x, y = getattr(outcome, by)[::-1], outcome.left[::-1]
    return tuple(np.interp(shares, x, y, left=np.nan, right=np.nan).tolist())


def candidates(dim: int) -> dict[str, Candidate]:
    """List the candidates by name, for a head dimension."""

    def sketch(rank: int) -> float:
        return (rank + dim / BOX) / (2 * dim)

    box = 3 / (2 * BOX)
    found = {
        "margin": Candidate(("margin",)),
        "exact margin": Candidate(("exact, margin",), 0.5),
        "probe": Candidate(("probe",)),
        "change, one Gaussian of keys and values": Candidate(("values, change",)),
        "probe, and that change": Candidate(("probe", "values, change")),
    }
    for rank in (4, 8, 16):
        found[f"change by sketch of {rank}"] = Candidate((f"sketch {rank}, change",), sketch(rank))
    found["probe, and mass by sketch of 8"] = Candidate(("probe", "sketch 8, margin"), 8 / (2 * dim))
    for rank in (4, 8, 16):
        found[f"probe, and change by sketch of {rank}"] = Candidate(_both(f"sketch {rank}"), sketch(rank))
    for count in (2, 4):
        found[f"change by {count} clusters"] = Candidate((f"clusters {count}, change",))
        found[f"probe, and change by {count} clusters"] = Candidate(_both(f"clusters {count}"))
    found["change by boxes of 16"] = Candidate(("boxes, change",), box)
    found["probe, and change by boxes of 16"] = Candidate(_both("boxes"), box)
    for back in (1, 4, 16):
        found[f"probe, and what the bulk gave {back} before"] = Candidate(("probe", f"before {back}"))
    found["probe, and what the last open query got"] = Candidate(("probe", "last", "since"))
    for rank in (8, 16):
        both = _both(f"sketch {rank}")
        found[f"probe, sketch of {rank} where unsure"] = Candidate(both, sketch(rank), "unsure")
        found[f"probe, sketch of {rank} beyond freezing"] = Candidate(both, sketch(rank), "frozen")
    found["probe, boxes of 16 where unsure"] = Candidate(_both("boxes"), box, "unsure")
    found |= {
        "probe, and exact margin": Candidate(("probe", "exact, margin"), 0.5),
        "exact change": Candidate(("exact, change",), 1.0),
        "probe, and exact change": Candidate(_both("exact"), 1.0),
        "exact price": Candidate(("price",), 1.0),
    }
    for by, choosing in (("moments", 1 / AJAR), ("bounds", 1 / AJAR), ("sketch 8", 8 / (2 * dim)), ("scores", 0.0)):
        found[f"probe, ajar by {by}"] = Candidate(("probe",), ajar=by, choosing=choosing)
    return found


def _both(name: str) -> tuple[str, str, str]:
    return "probe", f"{name}, change", f"{name}, margin"
