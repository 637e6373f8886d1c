"""What the gates weigh up on documents that are read densely, reduced to one row for each document and window.

`classification.py`, `gaussian.py` and `heads.py` are made of these rows; the first of them to run measures them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from shipped import LENGTHS, SINK, TASKS, WINDOWS, calibration, document, load, tasks_of
from store import Row, Store, share_out
from torch import Tensor

from patchattn.evaluation.margins import Margins, record_margins

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DOCUMENTS = {1024: 16, 2048: 12, 4096: 4}
_BINS = len(THRESHOLDS) + 1


def bins(margin: Tensor) -> Tensor:
    """Number of thresholds that close each pair, the lowest first; NaN and -inf close at none."""
    edges = torch.tensor([math.log(t / (1 - t)) for t in THRESHOLDS], dtype=margin.dtype)
    return torch.bucketize(margin.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf), edges, right=True)


def reduce_layer(margins: Margins, task: Tensor) -> Row:
    """Reduce one layer of one document.

    Args:
        margins: What was recorded.
        task: [queries] int64; index into `TASKS`.

    Returns:
        By name, nested lists with heads first.
        `joint`: by estimate, pairs [heads, oracle bins, gate bins].
        `joint_answering`: by estimate, pairs that predict answers [oracle bins, gate bins], of all heads together.
        `missed`: by estimate, sums of the bulk share [heads, bins].
        `oracle_by_task`, `guarded_by_task`: pairs [heads, tasks, bins].
        `margin_by_task`: count, sum and sum of squares of the exact margin [heads, tasks, 3].
        `errors`: by estimate, the same of the estimated minus the exact log mass.
        `ranks`: by estimate, Spearman correlation of the margins [heads].
        `top_share`: sums of the share of the bulk mass on its top key, and of the bulk share [heads, tasks, 2].
    """
    exact = margins.local - margins.bulk
    oracle, share = bins(exact), margins.bulk_share.double()
    row: Row = {"joint": {}, "joint_answering": {}, "missed": {}, "errors": {}, "ranks": {}}
    row["missed"]["oracle"] = _sums(oracle, share, _BINS).tolist()
    for (source, estimate), mass in margins.estimates.items():
        name = f"{source}/{estimate}"
        gate = bins(margins.local - mass)
        row["joint"][name] = _counts(oracle * _BINS + gate, _BINS * _BINS).unflatten(1, (_BINS, _BINS)).tolist()
        row["missed"][name] = _sums(gate, share, _BINS).tolist()
        pairs = (oracle * _BINS + gate)[:, task == TASKS.index("answer")].flatten()
        row["joint_answering"][name] = _counts(pairs[None], _BINS * _BINS).view(_BINS, _BINS).tolist()
        known = mass.isfinite() & margins.bulk.isfinite() & margins.local.isfinite()
        error = torch.where(known, mass.double() - margins.bulk.double(), 0)
        row["errors"][name] = _sums_by_task(torch.stack([known.double(), error, error.square()], -1), task)
        row["ranks"][name] = [
            spearman(exact[head, known[head]], (margins.local - mass)[head, known[head]]) for head in range(len(mass))
        ]
        if name == "prompt/guarded":
            row["guarded_by_task"] = _by_task(gate, task)
    row["oracle_by_task"] = _by_task(oracle, task)
    top = (margins.top - margins.bulk).double().exp().nan_to_num()
    finite = torch.where(exact.isfinite(), exact.double(), 0)
    parts = torch.stack([exact.isfinite().double(), finite, finite.square()], -1)
    row["margin_by_task"] = _sums_by_task(parts, task)
    row["top_share"] = _sums_by_task(torch.stack([top, share], -1), task)
    return row


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Rank correlation of two samples without many ties; None for fewer than ten values."""
    if len(first) < 10:
        return None
    ranks = torch.stack([x.argsort().argsort().double() for x in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item()


def _counts(index: Tensor, size: int) -> Tensor:
    """Count values 0 .. size - 1 along the last axis, [heads, size]."""
    return _sums(index, torch.ones_like(index, dtype=torch.double), size).long()


def _sums(index: Tensor, weight: Tensor, size: int) -> Tensor:
    return weight.new_zeros(len(index), size).scatter_add_(1, index, weight)


def _sums_by_task(parts: Tensor, task: Tensor) -> list[list[list[float]]]:
    """Sum [heads, queries, parts] over the queries of each task, [heads, tasks, parts]."""
    one_hot = torch.nn.functional.one_hot(task, len(TASKS)).double()
    return torch.einsum("hqc,qt->htc", parts, one_hot).tolist()


def _by_task(bin_of: Tensor, task: Tensor) -> list[list[list[int]]]:
    return _counts(task * _BINS + bin_of, len(TASKS) * _BINS).unflatten(1, (len(TASKS), _BINS)).tolist()


def recorded(folder: Path, processes: int) -> list[Row]:
    """Return one row for each document and window, measuring those that are missing.

    Returns:
        Rows with `length`, `window`, `document` and `layers`: what `reduce_layer` gives, by layer.
    """
    store = Store(folder, "margins")
    if _missing(store):
        share_out(work, processes, folder)
    return [row for row in store.rows() if row["document"] < DOCUMENTS[row["length"]]]


def _missing(store: Store) -> list[tuple[int, int]]:
    done = {(row["length"], row["document"]) for row in store.rows()}
    every = ((length, index) for length in LENGTHS for index in range(DOCUMENTS[length]))
    return [place for place in every if place not in done]


def work(part: int, parts: int, folder: Path) -> None:
    """Measure one process's part of the missing documents."""
    model, *_ = load()
    store = Store(folder, "margins", part)
    for length, index in _missing(store):
        if index % parts != part:
            continue
        one = document("facts", length, f"margins/{index}")
        task = tasks_of(one)
        found = record_margins(model, one.token_ids, sink_size=SINK, windows=WINDOWS, calibration=calibration())
        store.add(_rows(found, task, length, index))
        print(f"process {part}: document {index} of {length} tokens", flush=True)


def _rows(found: dict[int, dict[int, Margins]], task: Tensor, length: int, index: int) -> Iterable[Row]:
    # All windows of a document at once, or none: a document is missing or complete.
    return [
        {
            "length": length,
            "window": window,
            "document": index,
            "layers": [reduce_layer(margins, task[margins.positions]) for _, margins in sorted(layers.items())],
        }
        for window, layers in found.items()
    ]
