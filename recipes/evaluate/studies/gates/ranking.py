"""Which thresholds give which open fraction, and which heads matter: measured on documents that are not scored."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from context import LENGTHS, SINK, TASKS, WINDOWS, Context, Measurement, calibration, documents, load, tasks_of
from torch import Tensor

from patchattn.evaluation.margins import Margins, record_margins

FRACTIONS = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
DOCUMENTS = {1024: 12, 2048: 6, 4096: 4}
ORACLE_THRESHOLD = 0.8


@dataclass
class Ranking:
    """What the margins of some documents say about one length and window.

    Args:
        length: Tokens.
        window: Tokens.
        quantiles: By gate ("oracle", "prompt/guarded", ...) and fraction, the margin in nats below which that fraction
            of all pairs lies.
        floor: By gate, the fraction that opens whatever the threshold.
        heads: All (layer, head), the one that the oracle opens most often first.
        heads_answering: The one first that has most of its attention on bulk keys while answers are predicted.
    """

    length: int
    window: int
    quantiles: dict[str, dict[float, float]]
    floor: dict[str, float]
    heads: list[tuple[int, int]]
    heads_answering: list[tuple[int, int]]

    def threshold(self, gate: str, fraction: float) -> float | None:
        """Local share from which a gate must close to open a fraction of the pairs; None below what it can reach."""
        margin = self.quantiles[gate][fraction]
        # A fraction that lies at the floor can't be hit: the pairs above it are decided by other things.
        if margin == -math.inf or fraction < self.floor[gate] * 1.02:
            return None
        return 1 / (1 + math.exp(-margin))


def rank(length: int, window: int, read: Iterable[tuple[Mapping[int, Margins], Tensor]]) -> Ranking:
    """Rank by the margins of each document, by layer, and the task of each of its tokens, an index into `TASKS`."""
    pooled: dict[str, list[Tensor]] = {}
    opened: Counter[tuple[int, int]] = Counter()
    answering: Counter[tuple[int, int]] = Counter()
    for layers, task in read:
        for layer, margins in layers.items():
            estimates = {"/".join(name): mass for name, mass in margins.estimates.items()}
            for gate, mass in {"oracle": margins.bulk, **estimates}.items():
                pooled.setdefault(gate, []).append((margins.local - mass).flatten())
            shares = margins.bulk_share[:, task[margins.positions] == TASKS.index("answer")]
            for ranks, values in ((opened, margins.opens(ORACLE_THRESHOLD)), (answering, shares)):
                ranks.update({(layer, head): value for head, value in enumerate(values.double().mean(1).tolist())})
    ordered = {gate: torch.cat(parts).sort().values for gate, parts in pooled.items()}
    quantiles = {
        gate: {share: values[min(math.ceil(share * len(values)), len(values) - 1)].item() for share in FRACTIONS}
        for gate, values in ordered.items()
    }
    floor = {gate: (values == -math.inf).double().mean().item() for gate, values in ordered.items()}
    heads, heads_answering = ([head for head, _ in ranks.most_common()] for ranks in (opened, answering))
    return Ranking(length, window, quantiles, floor, heads, heads_answering)


def _measure(_: Context, length: int, window: int) -> Ranking:
    read = documents("rank", DOCUMENTS[length], length=length)
    margins = partial(record_margins, load()[0], sink_size=SINK, windows=(window,), calibration=calibration())
    return rank(length, window, ((margins(one.token_ids)[window], tasks_of(one)) for one in read))


RANKINGS = Measurement(
    "ranking", Ranking, ("length", "window"), lambda _: list(itertools.product(LENGTHS, WINDOWS)), _measure
)
