"""Each candidate on each document that is judged: what is left unpaid at shares of pairs open and of keys read."""

from __future__ import annotations

from dataclasses import dataclass

from context import Context, Job, Measurement
from studies.towards_the_oracle.ranking import Found, Outcome, Ranker, candidates, left_at
from studies.towards_the_oracle.reading import COUNTS, JUDGED, PRICED, REAL, SHIPPED, documents, model_of, tensors

SHARES = (0.1, 0.17, 0.22, 0.3)
"""Of pairs open, and of bulk keys read."""

PROBE = "probe"


@dataclass(frozen=True)
class Judged:
    """One candidate on one document: nats per token that are left, for each of `SHARES`; NaN where it can't be had.

    `by_open` is at shares of the pairs open, `by_read` at shares of the bulk keys read, what estimates read included.
    `cost` is what the estimate reads where it is asked, as a share of all keys and values, and `closed` the price of
    closing every pair.
    """

    model: str
    candidate: str
    document: int
    kind: str
    cost: float
    closed: float
    by_open: tuple[float, ...]
    by_read: tuple[float, ...]


DIMENSIONS = {REAL: 64, SHIPPED: 32}
"""Of a head's keys and values."""


def found_on(context: Context, name: str, part: str, index: int) -> Found:
    """Return what was found on a document, heads of all layers side by side."""
    found = tensors(context, name, part, index)
    return {key: values.flatten(0, 1) if values.dim() == 3 else values for key, values in found.items()}


class Rankers:
    """Candidates of a model, fitted to its priced documents when they are asked for."""

    def __init__(self, context: Context, name: str) -> None:
        self._priced = [found_on(context, name, PRICED, at) for at in range(COUNTS[name][PRICED])]
        self._candidates = candidates(DIMENSIONS[name])
        self._known: dict[str, Ranker] = {}
        self._outcomes: dict[str, list[Outcome]] = {}

    def __getitem__(self, name: str) -> Ranker:
        """Return one of them."""
        if name not in self._known:
            candidate = self._candidates[name]
            first = None if candidate.asked == "everywhere" else self[PROBE]
            self._known[name] = Ranker(candidate, self._priced, first)
        return self._known[name]

    def on_priced(self, name: str) -> list[Outcome]:
        """Judge one of them on the documents that it was fitted to."""
        if name not in self._outcomes:
            self._outcomes[name] = [self[name].judge(one) for one in self._priced]
        return self._outcomes[name]


_rankers: dict[str, Rankers] = {}


def rankers(context: Context, name: str) -> Rankers:
    """Return the candidates of a model; one model's at a time is kept."""
    if name not in _rankers:
        _rankers.clear()
        _rankers[name] = Rankers(context, name)
    return _rankers[name]


def judge(context: Context, name: str, candidate: str, index: int) -> Judged:
    """Judge one candidate on one document."""
    kind = documents(name, JUDGED, model_of(name, context.options["real_model"])[1])[index].kind
    found = found_on(context, name, JUDGED, index)
    outcome = rankers(context, name)[candidate].judge(found)
    known = candidates(DIMENSIONS[name])[candidate]
    left = (left_at(outcome, by, SHARES) for by in ("open", "read"))
    return Judged(name, candidate, index, kind, known.cost + known.choosing, float(found["price"].sum()), *left)


def _jobs(context: Context) -> list[Job]:
    models = (REAL, SHIPPED)
    return [
        (name, candidate, at)
        for name in models
        for candidate in candidates(DIMENSIONS[name])
        for at in range(COUNTS[name][JUDGED])
    ]


JUDGED_ROWS = Measurement("towards_the_oracle", Judged, ("model", "candidate", "document"), _jobs, judge)
