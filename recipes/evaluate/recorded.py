"""What the gates weigh up on documents that are read densely, reduced to one row for each document.

`classification`, `gaussian` and `heads` are made of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import getitem
from typing import Any

import numpy as np
import torch
from context import LENGTHS, SINK, TASKS, WINDOWS, Context, Job, Measurement, calibration, document, load, tasks_of
from numpy.typing import ArrayLike
from torch import Tensor

from patchattn.evaluation.margins import Margins, record_margins
from patchattn.evaluation.statistics import Interval, bootstrap

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DOCUMENTS = {1024: 16, 2048: 12, 4096: 4}
PLACE = (4096, 256)
"""Length and window that pages show in full."""

DEFAULT = 0.6
"""Threshold of the default gate."""

_BINS = len(THRESHOLDS) + 1


def bins(margin: Tensor) -> Tensor:
    """Number of thresholds that close each pair, the lowest first; NaN and -inf close at none."""
    edges = torch.tensor([math.log(t / (1 - t)) for t in THRESHOLDS], dtype=margin.dtype)
    return torch.bucketize(margin.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf), edges, right=True)


def reduce_layer(margins: Margins, task: Tensor) -> dict[str, Any]:
    """Reduce one layer of one document.

    Args:
        margins: What was recorded.
        task: [queries] int64; index into `TASKS`.

    Returns:
        Nested lists, heads first, by name; all but `of_task` also by estimate.
        `pairs`: numbers of pairs [heads, tasks, oracle bins, gate bins].
        `missed`: sums of the bulk share [heads, bins]; also by "oracle".
        `errors`: number, sum and sum of squares of the estimated minus the exact log mass [heads, tasks, 3].
        `ranks`: Spearman correlation of the exact and the estimated margin [heads].
        `of_task`: number, sum and sum of squares of the exact margin; sum of the share of the bulk mass on its top key,
        and sum of the bulk share [heads, tasks, 5].
    """
    exact = margins.local - margins.bulk
    oracle, share = bins(exact), margins.bulk_share.double()
    known = torch.where(exact.isfinite(), exact, torch.nan)
    by_task = torch.nn.functional.one_hot(task, len(TASKS)).double()

    def summed(x: Tensor, *more: Tensor) -> list[Any]:
        finite = x.isfinite()
        x = torch.where(finite, x.double(), 0)
        return torch.einsum("hqc,qt->htc", torch.stack([finite.double(), x, x.square(), *more], -1), by_task).tolist()

    row: dict[str, Any] = {"pairs": {}, "missed": {"oracle": _sums(oracle, share, (_BINS,))}, "errors": {}, "ranks": {}}
    for name, mass in margins.estimates.items():
        estimate, gate = "/".join(name), bins(margins.local - mass)
        cell = (task * _BINS + oracle) * _BINS + gate
        row["pairs"][estimate] = _sums(cell, torch.ones_like(cell), (len(TASKS), _BINS, _BINS))
        row["missed"][estimate] = _sums(gate, share, (_BINS,))
        row["errors"][estimate] = summed(torch.where(known.isnan(), torch.nan, mass.double() - margins.bulk.double()))
        guess = torch.where(mass.isfinite(), margins.local - mass, torch.nan)
        row["ranks"][estimate] = [spearman(*pair) for pair in zip(known, guess, strict=True)]
    row["of_task"] = summed(known, (margins.top - margins.bulk).double().exp().nan_to_num(), share)
    return row


def _sums(cell: Tensor, weight: Tensor, shape: tuple[int, ...]) -> list[Any]:
    """Sum weights [heads, queries] by cell, a flat index into [heads, *shape]."""
    return weight.new_zeros(len(cell), math.prod(shape)).scatter_add_(1, cell, weight).unflatten(1, shape).tolist()


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation of two samples without many ties, missing values left out; NaN for fewer than ten pairs."""
    both = np.stack([np.asarray(first), np.asarray(second)], axis=1)
    both = both[~np.isnan(both).any(1)]
    return float(np.corrcoef(both.argsort(0).argsort(0).T)[0, 1]) if len(both) >= 10 else math.nan


@dataclass
class Recording:
    """One document: what `reduce_layer` gives for each layer, by window."""

    length: int
    document: int
    layers: dict[int, list[Any]]


def _jobs(_: Context) -> list[Job]:
    return [(length, index) for length in LENGTHS for index in range(DOCUMENTS[length])]


def _measure(_: Context, length: int, index: int) -> Recording:
    one = document("facts", length, f"margins/{index}")
    task = tasks_of(one)
    found = record_margins(load()[0], one.token_ids, sink_size=SINK, windows=WINDOWS, calibration=calibration())
    layers = {
        window: [reduce_layer(margins, task[margins.positions]) for _, margins in sorted(of_window.items())]
        for window, of_window in found.items()
    }
    return Recording(length, index, layers)


MARGINS = Measurement("margins", Recording, ("length", "document"), _jobs, _measure)


MEASURES = {
    "open": ((0, 1), (0, 1, 2, 3)),
    "oracle_open": ((0, 2), (0, 1, 2, 3)),
    "accuracy": ((0, 3), (0, 1, 2, 3)),
    "recall": ((0,), (0, 2)),
    "precision": ((0,), (0, 1)),
    "false_negatives": ((2,), (0, 2)),
    "false_positives": ((1,), (1, 3)),
    "missed_mass": ((4,), (0, 1, 2, 3)),
}
"""Shares of some of `Confusion.sums` in others; `missed_mass`: of the attention, what closed heads do not read."""


@dataclass(frozen=True)
class Confusion:
    """How a gate's decisions compare with the oracle's, over some documents and heads; measures by name.

    Args:
        sums: [documents, 5] pairs: both open, only the gate, only the oracle, both closed; and the bulk shares of the
            pairs that the gate closes, NaN if not known.
    """

    sums: np.ndarray

    def _parts(self, measure: str) -> list[np.ndarray]:
        return [self.sums[:, list(cells)].sum(1) for cells in MEASURES[measure]]

    def value(self, measure: str) -> float:
        """A measure over all documents."""
        above, below = self._parts(measure)
        return float(above.sum() / max(below.sum(), 1e-12))

    def __getitem__(self, measure: str) -> Interval:
        """A measure with its interval, bootstrap over documents."""
        above, below = self._parts(measure)
        return bootstrap(self.sums, lambda w: (w @ above) / np.maximum(w @ below, 1e-12))


class Recorded:
    """The rows of one length and window as arrays.

    Args:
        rows: Those of one length.
        window: Tokens.
    """

    def __init__(self, rows: Sequence[Recording], window: int) -> None:
        self.documents = [row.layers[window] for row in rows]
        self.layers = len(self.documents[0])
        self.estimates = tuple(self.documents[0][0]["pairs"])

    @cache  # noqa: B019 - lives as long as the rows
    def array(self, *names: str) -> np.ndarray:
        """Stack one entry over documents and layers, [documents, layers, heads, ...]."""
        picked = [[reduce(getitem, names, layer) for layer in layers] for layers in self.documents]
        return np.array(picked, dtype=float)

    def pairs(self, gate: str) -> np.ndarray:
        """Count pairs of an estimate or "oracle", [documents, layers, heads, tasks, oracle bins, gate bins]."""
        if gate == "oracle":
            return self.array("pairs", self.estimates[0]).sum(-1, keepdims=True) * np.eye(_BINS)
        return self.array("pairs", gate)

    def confusion(
        self, gate: str, threshold: float, *, layer: int | None = None, oracle: float = 0, answering: bool = False
    ) -> Confusion:
        """Compare a gate with the oracle, at the same threshold unless `oracle` names another.

        `answering` looks at the queries that predict answers only, for which the missed mass is not known.
        """
        # A pair opens at a threshold where no more than the thresholds below it close it.
        at, oracle_at = THRESHOLDS.index(threshold) + 1, THRESHOLDS.index(oracle or threshold) + 1
        layers = slice(layer, None if layer is None else layer + 1)
        tasks = slice(TASKS.index("answer") if answering else 0, None)
        pairs = self.pairs(gate)[:, layers, :, tasks].sum((1, 2, 3))  # [documents, oracle bins, gate bins]
        missed = self.array("missed", gate)[:, layers, :, at:].sum((1, 2, 3))
        opened, closed = pairs[:, :oracle_at].sum(1), pairs[:, oracle_at:].sum(1)  # [documents, gate bins]
        cells = [part.sum(1) for part in (opened[:, :at], closed[:, :at], opened[:, at:], closed[:, at:])]
        return Confusion(np.stack([*cells, missed * (np.nan if answering else 1)], axis=1))


def mean_and_deviation(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation from numbers, sums and sums of squares, [..., 3] -> [...]."""
    count, total, squares = np.moveaxis(sums, -1, 0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def by_head(columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Turn values of heads, [layers, heads] each, into one row for each head."""
    shape = next(iter(columns.values())).shape
    return [
        {"layer": layer, "head": head} | {name: float(values[layer, head]) for name, values in columns.items()}
        for layer, head in np.ndindex(shape)
    ]


def recorded(context: Context) -> dict[tuple[int, int], Recorded]:
    """Read what was recorded, by length and window."""
    rows = MARGINS.rows(context)
    of_length = {length: [row for row in rows if row.length == length] for length in LENGTHS}
    return {(length, window): Recorded(of_length[length], window) for length in LENGTHS for window in WINDOWS}


def by_window(found: Mapping[tuple[int, int], Recorded], length: int, gate: str) -> dict[int, Confusion]:
    """What a gate decides at one length and the default threshold."""
    return {window: found[length, window].confusion(gate, DEFAULT) for window in WINDOWS}
