"""Which thresholds give which open fraction, and which heads matter: measured on documents that are not scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

# Before patchattn: this puts the checkout on the path.
from shipped import SINK, TASKS, WINDOWS, calibration, document, load, tasks_of
from store import kept
from torch import Tensor

from patchattn.evaluation.margins import Margins, record_margins

FRACTIONS = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
DOCUMENTS = {1024: 12, 2048: 6, 4096: 4}
ORACLE_THRESHOLD = 0.8


def ranking(folder: Path, length: int) -> dict[str, Any]:
    """Return what one length's ranking documents say, by window; see `of_window`."""
    return kept(folder / f"ranking-{length}.json", lambda: _measure(length))


def _measure(length: int) -> dict[str, Any]:
    model, *_ = load()
    found: dict[int, list[tuple[dict[int, Margins], Tensor]]] = {window: [] for window in WINDOWS}
    for index in range(DOCUMENTS[length]):
        one = document("facts", length, f"rank/{index}")
        recorded = record_margins(model, one.token_ids, sink_size=SINK, windows=WINDOWS, calibration=calibration())
        for window, layers in recorded.items():
            found[window].append((layers, tasks_of(one)))
    return {str(window): of_window(documents) for window, documents in found.items()}


def of_window(documents: list[tuple[dict[int, Margins], Tensor]]) -> dict[str, Any]:
    """Summarise the margins of several documents.

    Args:
        documents: For each, its margins by layer, and for each token its task, an index into `shipped.TASKS`.

    Returns:
        `quantiles`: by gate ("oracle", "prompt/guarded", ...) and fraction, the margin in nats below which that
        fraction of all pairs lies; `floor`: by gate, the fraction that opens whatever the threshold; `heads`: all
        (layer, head), the one that the oracle opens most often first; `heads_answering`: the one first that has most of
        its attention on bulk keys while answers are predicted.
    """
    pooled: dict[str, list[Tensor]] = {}
    opened: dict[tuple[int, int], float] = {}
    answering: dict[tuple[int, int], float] = {}
    for layers, task in documents:
        for layer, margins in layers.items():
            pooled.setdefault("oracle", []).append(margins.local - margins.bulk)
            for (source, estimate), mass in margins.estimates.items():
                pooled.setdefault(f"{source}/{estimate}", []).append(margins.local - mass)
            for head, fraction in enumerate(margins.opens(ORACLE_THRESHOLD).double().mean(1).tolist()):
                opened[layer, head] = opened.get((layer, head), 0.0) + fraction
            shares = margins.bulk_share[:, task[margins.positions] == TASKS.index("answer")].double().mean(1)
            for head, share in enumerate(shares.tolist()):
                answering[layer, head] = answering.get((layer, head), 0.0) + share
    ordered = {gate: torch.cat([part.flatten() for part in parts]).sort().values for gate, parts in pooled.items()}
    return {
        "quantiles": {gate: {str(f): quantile(values, f) for f in FRACTIONS} for gate, values in ordered.items()},
        "floor": {gate: (values == -math.inf).double().mean().item() for gate, values in ordered.items()},
        "heads": sorted(opened, key=lambda place: -opened[place]),
        "heads_answering": sorted(answering, key=lambda place: -answering[place]),
    }


def quantile(ordered: Tensor, fraction: float) -> float:
    """Margin in nats that so large a fraction of ascending values lies below."""
    return ordered[min(math.ceil(fraction * len(ordered)), len(ordered) - 1)].item()


def threshold(found: dict[str, Any], gate: str, fraction: float) -> float | None:
    """Local share from which a gate must close to open a fraction of the pairs; None below what it can reach."""
    margin = found["quantiles"][gate][str(fraction)]
    # A fraction that lies at the floor can't be hit: the pairs above it are decided by other things.
    if margin == -math.inf or fraction < found["floor"][gate] * 1.02:
        return None
    return 1 / (1 + math.exp(-margin))
