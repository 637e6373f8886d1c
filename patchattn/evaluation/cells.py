"""One cell of an evaluation: what one policy gave on one task at one length."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from patchattn.evaluation.statistics import wilson_interval
from patchattn.policy import Phase
from patchattn.report import GateReport


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
        layers = [by_phase[phase] for by_phase in report.layers.values()]
        return cls(
            open_pairs=sum(sum(layer.open_pairs) for layer in layers),
            asked_pairs=sum(layer.asked * len(layer.open_pairs) for layer in layers),
            scored_keys=sum(layer.scored_keys for layer in layers),
            causal_keys=sum(layer.causal_keys for layer in layers),
        )

    @property
    def open_fraction(self) -> float:
        """Open pairs of those asked; NaN where none was."""
        return self.open_pairs / self.asked_pairs if self.asked_pairs else math.nan

    @property
    def realised_density(self) -> float:
        """Keys scored of the causal ones; NaN where no call was gated."""
        return self.scored_keys / self.causal_keys if self.causal_keys else math.nan


@dataclass(frozen=True)
class Cell:
    """One task at one length under one policy.

    Args:
        policy: Name of the policy.
        task: Name of the task.
        length: Tokens in prompt and answer.
        scores: Score of each sample, 0 to 1; empty for text loss.
        losses: For text loss, the mean loss of each document in equal parts by position, nats per token.
        counts: What the gates did, by phase; empty for dense.
        key: Names everything that the result depends on.
    """

    policy: str
    task: str
    length: int
    scores: tuple[float, ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    counts: dict[str, PhaseCounts] = field(default_factory=dict)
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
