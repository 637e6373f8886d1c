"""Which thresholds give which open fraction, and which heads matter: measured on documents that are not scored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from context import LENGTHS, SINK, TASKS, WINDOWS, Context, Job, Measurement, calibration, document, load, tasks_of
from torch import Tensor

from patchattn.evaluation.margins import Margins, record_margins

FRACTIONS = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
DOCUMENTS = {1024: 12, 2048: 6, 4096: 4}
ORACLE_THRESHOLD = 0.8


@dataclass
class Ranking:
    """What the margins of some documents say about one window.

    Args:
        quantiles: By gate ("oracle", "prompt/guarded", ...) and fraction, the margin in nats below which that fraction
            of all pairs lies.
        floor: By gate, the fraction that opens whatever the threshold.
        heads: All (layer, head), the one that the oracle opens most often first.
        heads_answering: The one first that has most of its attention on bulk keys while answers are predicted.
    """

    quantiles: dict[str, dict[float, float]]
    floor: dict[str, float]
    heads: list[tuple[int, int]]
    heads_answering: list[tuple[int, int]]

    @classmethod
    def of(cls, documents: list[tuple[dict[int, Margins], Tensor]]) -> Ranking:
        """Rank by the margins of each document, by layer, and the task of each of its tokens, an index into `TASKS`."""
        pooled: dict[str, list[Tensor]] = {}
        opened: dict[tuple[int, int], float] = {}
        answering: dict[tuple[int, int], float] = {}
        for layers, task in documents:
            for layer, margins in layers.items():
                masses = {"oracle": margins.bulk} | {"/".join(name): mass for name, mass in margins.estimates.items()}
                for gate, mass in masses.items():
                    pooled.setdefault(gate, []).append((margins.local - mass).flatten())
                answers = task[margins.positions] == TASKS.index("answer")
                fractions = margins.opens(ORACLE_THRESHOLD).double().mean(1)
                shares = margins.bulk_share[:, answers].double().mean(1)
                for ranks, values in ((opened, fractions), (answering, shares)):
                    for head, value in enumerate(values.tolist()):
                        ranks[layer, head] = ranks.get((layer, head), 0.0) + value
        ordered = {gate: torch.cat(parts).sort().values for gate, parts in pooled.items()}
        return cls(
            {gate: {share: quantile(values, share) for share in FRACTIONS} for gate, values in ordered.items()},
            {gate: (values == -math.inf).double().mean().item() for gate, values in ordered.items()},
            *(sorted(ranks, key=lambda head: -ranks[head]) for ranks in (opened, answering)),
        )

    def threshold(self, gate: str, fraction: float) -> float | None:
        """Local share from which a gate must close to open a fraction of the pairs; None below what it can reach."""
        margin = self.quantiles[gate][fraction]
        # A fraction that lies at the floor can't be hit: the pairs above it are decided by other things.
        if margin == -math.inf or fraction < self.floor[gate] * 1.02:
            return None
        return 1 / (1 + math.exp(-margin))


def quantile(ordered: Tensor, fraction: float) -> float:
    """Margin in nats that so large a fraction of ascending values lies below."""
    return ordered[min(math.ceil(fraction * len(ordered)), len(ordered) - 1)].item()


@dataclass
class Rankings:
    """The rankings of one length, by window."""

    length: int
    windows: dict[int, Ranking]


def _jobs(_: Context) -> list[Job]:
    return [(length,) for length in LENGTHS]


def _measure(_: Context, length: int) -> Rankings:
    documents = [document("facts", length, f"rank/{index}") for index in range(DOCUMENTS[length])]
    margins = [
        record_margins(load()[0], one.token_ids, sink_size=SINK, windows=WINDOWS, calibration=calibration())
        for one in documents
    ]
    tasks = [tasks_of(one) for one in documents]
    return Rankings(
        length,
        {
            window: Ranking.of([(of[window], task) for of, task in zip(margins, tasks, strict=True)])
            for window in WINDOWS
        },
    )


RANKINGS = Measurement("ranking", Rankings, ("length",), _jobs, _measure)


def rankings(context: Context) -> dict[tuple[int, int], Ranking]:
    """Read the rankings by length and window."""
    return {(row.length, window): found for row in RANKINGS.rows(context) for window, found in row.windows.items()}
