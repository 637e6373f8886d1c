"""What was measured: one task at one length under one policy, and what the gates did meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any

from pydantic import TypeAdapter

from patchattn.evaluation.agreement import Agreement
from patchattn.evaluation.statistics import wilson_interval
from patchattn.policy import Phase
from patchattn.report import GateReport
from patchattn.report.counts import ratio


@dataclass(frozen=True)
class PhaseCounts:
    """Counts of one phase, over all layers and heads.

    Args:
        open_pairs: Pairs (query head, query) that were asked and opened.
        asked_pairs: Pairs that were asked.
        scored_keys: Keys whose score was computed, of all pairs.
        causal_keys: Keys that dense attention has to score.
    """

    open_pairs: int = 0
    asked_pairs: int = 0
    scored_keys: int = 0
    causal_keys: int = 0

    def __add__(self, other: PhaseCounts) -> PhaseCounts:
        """Add count by count."""
        return PhaseCounts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @classmethod
    def of(cls, report: GateReport, phase: Phase) -> PhaseCounts:
        """Add up a report."""
        layers = report.counts(phase).values()
        return cls(
            open_pairs=sum(sum(layer.open_pairs) for layer in layers),
            asked_pairs=sum(layer.asked_pairs for layer in layers),
            scored_keys=sum(layer.scored_keys for layer in layers),
            causal_keys=sum(layer.causal_keys for layer in layers),
        )

    @property
    def open_fraction(self) -> float:
        """Open pairs of those asked; NaN where none was."""
        return ratio(self.open_pairs, self.asked_pairs)

    @property
    def realised_density(self) -> float:
        """Keys scored of the causal ones; NaN where no call was gated."""
        return ratio(self.scored_keys, self.causal_keys)


@dataclass(frozen=True)
class Cell:
    """One task at one length under one policy.

    Args:
        policy: Name of the policy.
        task: Name of the task.
        length: Tokens in prompt and answer.
        seed: What the samples were drawn from; None for text loss, which is the same for all, and for several.
        scores: Score of each sample, 0 to 1; empty for text loss.
        losses: For text loss, the mean loss of each document in equal parts by position, nats per token.
        agreements: Agreement with dense of each sample's right answer, or of each document; empty for dense.
        counts: What the gates did, by phase; empty for dense.
        same: For each sample whether the text that was written is dense's, token for token; empty for dense.
        level: Texts that are not, and differ first where dense attention itself is not stable; looked for with drafts.
        drafted: Tokens that were drafted.
        kept: Drafted tokens that dense attention kept.
        key: Names everything that the result depends on.
    """

    policy: str
    task: str
    length: int
    seed: int | None = None
    scores: tuple[float, ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    agreements: tuple[Agreement, ...] = ()
    counts: dict[str, PhaseCounts] = field(default_factory=dict)
    same: tuple[bool, ...] = ()
    level: int = 0
    drafted: int = 0
    kept: int = 0
    key: str = ""

    @property
    def score(self) -> float:
        """Mean score over the samples."""
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of the mean score, 95%.

        A sample with several answers can be partly right. The interval takes it for all or nothing, which is wider.
        """
        return wilson_interval(sum(self.scores), len(self.scores))

    @property
    def document_losses(self) -> list[float]:
        """Mean loss of each document, nats per token."""
        return [sum(parts) / len(parts) for parts in self.losses]

    @property
    def loss_by_position(self) -> list[float]:
        """Mean over the documents, by position."""
        return [sum(part) / len(part) for part in zip(*self.losses, strict=True)]

    @property
    def loss(self) -> float:
        """Mean loss, nats per token."""
        parts = self.loss_by_position
        return sum(parts) / len(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Cell:
        """Read what `to_dict` gave."""
        return TypeAdapter(cls).validate_python(found)


def together(cells: Sequence[Cell]) -> Cell:
    """Put the samples of several seeds together, in the order of the cells."""
    first, *others = cells
    if not others:
        return first
    return Cell(
        policy=first.policy,
        task=first.task,
        length=first.length,
        scores=reduce(add, (cell.scores for cell in cells)),
        losses=reduce(add, (cell.losses for cell in cells)),
        agreements=reduce(add, (cell.agreements for cell in cells)),
        counts={phase: reduce(add, (cell.counts[phase] for cell in cells)) for phase in first.counts},
        same=reduce(add, (cell.same for cell in cells)),
        level=sum(cell.level for cell in cells),
        drafted=sum(cell.drafted for cell in cells),
        kept=sum(cell.kept for cell in cells),
    )
