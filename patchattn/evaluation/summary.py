"""What the cells of one policy at one length add up to, beside those of dense attention on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from patchattn.evaluation.agreement import Agreement
from patchattn.evaluation.cells import Cell, PhaseCounts
from patchattn.evaluation.statistics import Interval, mean_of_means, ratio_of_sums, relative_change
from patchattn.evaluation.tasks import TEXT_LOSS
from patchattn.policy import PHASES


@dataclass(frozen=True)
class Closeness:
    """Agreement with dense, 95% intervals from a bootstrap over samples or documents.

    Args:
        top1: Share of the tokens for which both hold the same token the most likely.
        kl: Mean KL(dense || policy), nats per token.
    """

    top1: Interval
    kl: Interval

    @classmethod
    def of(cls, found: Sequence[Agreement]) -> Closeness | None:
        """Put samples or documents together; None without any token."""
        found = [one for one in found if one.tokens]
        if not found:
            return None
        tokens = [one.tokens for one in found]
        kl = sum(found, Agreement()).kl
        return cls(
            ratio_of_sums([one.agreed for one in found], tokens),
            ratio_of_sums([one.kl_sum for one in found], tokens) if math.isfinite(kl) else Interval(kl, kl, kl),
        )


@dataclass(frozen=True)
class Summary:
    """One policy at one length. Drops are scores of dense minus scores of the policy, sample by sample.

    Args:
        policy: Name of the policy.
        length: Tokens in prompt and answer.
        mean_score: Mean over the tasks that have a score; NaN without any.
        mean_by_seed: The same of each seed alone.
        drop: Mean drop over these tasks, bootstrap over the samples of each; None for dense.
        worst_task: The task that drops most; None where none drops.
        worst_drop: Its drop. As it was chosen for being the largest, it is rather too large.
        text_loss: Nats per token; NaN where it was not measured.
        loss_change: Relative change of it against dense, bootstrap over documents; None for dense.
        text: Agreement over the text; None for dense.
        answers: Agreement over the tokens of the right answers; None for dense.
        counts: What the gates did over all tasks, by phase.
        texts: Texts that were compared with dense's; 0 for dense.
        same: Those of them that are dense's, token for token.
        level: Those that are not, and differ first where dense attention itself is not stable; for drafts.
        drafted: Tokens that were drafted.
        kept: Drafted tokens that dense attention kept.
    """

    policy: str
    length: int
    mean_score: float
    mean_by_seed: tuple[float, ...]
    drop: Interval | None
    worst_task: str | None
    worst_drop: Interval | None
    text_loss: float
    loss_change: Interval | None
    text: Closeness | None
    answers: Closeness | None
    counts: dict[str, PhaseCounts]
    texts: int
    same: int
    level: int
    drafted: int
    kept: int

    def shares(self) -> dict[str, float | None]:
        """Open fraction and density of each phase by name; None where they are not known."""
        return {
            f"{phase}_{name}": _known(getattr(found, name))
            for phase, found in self.counts.items()
            for name in ("open_fraction", "realised_density")
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; None where there is no number. Intervals are value, low and high."""
        means = {"mean_score": _known(self.mean_score), "text_loss": _known(self.text_loss)}
        return {**asdict(self), **means, **self.shares()}


def summarize(policy: str, length: int, cells: Sequence[Cell], dense: Sequence[Cell]) -> Summary:
    """Add up the cells of one policy at one length.

    Args:
        policy: Name of the policy.
        length: Tokens in prompt and answer.
        cells: All of its cells, of all seeds.
        dense: The cells of dense attention, in the same order; the same ones for dense.
    """
    asked = [cell for cell in cells if cell.task != TEXT_LOSS]
    drops: dict[str, list[float]] = {}
    for cell, other in zip(cells, dense, strict=True):
        if cell.task != TEXT_LOSS and cell is not other:
            drops.setdefault(cell.task, []).extend(a - b for a, b in zip(other.scores, cell.scores, strict=True))
    worst = max(drops, key=lambda task: sum(drops[task]) / len(drops[task]), default=None)
    if worst is not None and sum(drops[worst]) <= 0:
        worst = None
    text, plain = (next((cell for cell in found if cell.task == TEXT_LOSS), None) for found in (cells, dense))
    change = None
    if text is not plain and text is not None and plain is not None:
        change = relative_change(text.document_losses, plain.document_losses)
    seeds = dict.fromkeys(cell.seed for cell in asked)
    return Summary(
        policy=policy,
        length=length,
        mean_score=_mean_score(asked),
        mean_by_seed=tuple(_mean_score([cell for cell in asked if cell.seed == seed]) for seed in seeds),
        drop=mean_of_means(list(drops.values())) if drops else None,
        worst_task=worst,
        worst_drop=None if worst is None else mean_of_means([drops[worst]]),
        text_loss=math.nan if text is None else text.loss,
        loss_change=change,
        text=None if text is None else Closeness.of(text.agreements),
        answers=Closeness.of([one for cell in asked for one in cell.agreements]),
        counts={
            phase: sum((cell.counts.get(phase, PhaseCounts()) for cell in cells), PhaseCounts()) for phase in PHASES
        },
        texts=sum(len(cell.same) for cell in cells),
        same=sum(sum(cell.same) for cell in cells),
        level=sum(cell.level for cell in cells),
        drafted=sum(cell.drafted for cell in cells),
        kept=sum(cell.kept for cell in cells),
    )


def _mean_score(cells: Sequence[Cell]) -> float:
    """Mean over the tasks of their mean scores; NaN without any."""
    scores: dict[str, list[float]] = {}
    for cell in cells:
        scores.setdefault(cell.task, []).extend(cell.scores)
    return sum(sum(found) / len(found) for found in scores.values()) / len(scores) if scores else math.nan


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
