"""What an evaluation found: cells by policy, task and length, what they add up to, and the files it is saved as."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from patchattn.errors import ReportError
from patchattn.evaluation.page import escaped, number, table, with_interval
from patchattn.evaluation.picture import Panel, save_picture
from patchattn.evaluation.policies import DENSE
from patchattn.evaluation.rows import csv_text as csv_of_rows
from patchattn.evaluation.statistics import Interval, wilson_interval
from patchattn.evaluation.tasks import TEXT_LOSS
from patchattn.policy import PHASES, Phase, Policy
from patchattn.report import GateReport
from patchattn.report.counts import ratio
from patchattn.writing import made, write_text

_NOTHING = "-"


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


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Args:
        model: Name of the model.
        tasks: Tasks in the order of the table, `"text"` among them if text loss was measured.
        lengths: Lengths in tokens.
        policies: Policies by name, every `"auto"` resolved; None for dense, which is the first.
        backend: Backend that computed the patched runs.
        samples: Samples of each task.
        seed: What everything random followed from.
        cells: The results; none for a task that does not fit a length.
        notes: What a reader has to know: tasks left out, texts repeated, gates never asked.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    policies: dict[str, Policy | None]
    backend: str
    samples: int
    seed: int
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    def cell(self, policy: str, task: str, length: int) -> Cell | None:
        """Return one cell; None if there is none."""
        return next((cell for cell in self._of(policy, length) if cell.task == task), None)

    def mean_score(self, policy: str, length: int) -> float:
        """Mean over the tasks that have a score; NaN without any."""
        scores = [cell.score for cell in self._of(policy, length) if cell.task != TEXT_LOSS]
        return sum(scores) / len(scores) if scores else math.nan

    def counts(self, policy: str, length: int, phase: Phase) -> PhaseCounts:
        """What the gates did over all tasks."""
        return sum((cell.counts[phase] for cell in self._of(policy, length) if phase in cell.counts), PhaseCounts())

    def _of(self, policy: str, length: int) -> list[Cell]:
        return [cell for cell in self.cells if cell.policy == policy and cell.length == length]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; `summary` holds the numbers of the table, None where there is none."""
        return {
            "model": self.model,
            "backend": self.backend,
            "tasks": list(self.tasks),
            "lengths": list(self.lengths),
            "samples": self.samples,
            "seed": self.seed,
            "policies": {name: policy and policy.model_dump(mode="json") for name, policy in self.policies.items()},
            "notes": list(self.notes),
            "summary": [self._summary(name, length) for length in self.lengths for name in self.policies],
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def _summary(self, policy: str, length: int) -> dict[str, Any]:
        text = self.cell(policy, TEXT_LOSS, length)
        return {
            "policy": policy,
            "length": length,
            "mean_score": _known(self.mean_score(policy, length)),
            "text_loss": _known(math.nan if text is None else text.loss),
            **_shares(lambda phase: self.counts(policy, length, phase)),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write `evaluation.md`, `evaluation.csv`, `evaluation.json` and `evaluation.png` into a folder.

        Raises:
            ReportError: The folder can't be made or written into.
            MissingPackageError: matplotlib is not installed.
        """
        folder = Path(folder)
        texts = {"md": markdown(self), "csv": csv_text(self), "json": json.dumps(self.to_dict(), indent=1) + "\n"}
        title = f"{self.model}: {self.samples} samples of each task"
        panels = [_panel(self, length) for length in self.lengths]
        try:
            with made(folder):
                paths = [write_text(folder / f"evaluation.{kind}", text) for kind, text in texts.items()]
                return [*paths, save_picture(title, panels, folder / "evaluation.png")]
        except OSError as error:
            raise ReportError(
                f"Can't make the folder {folder} or write into it: {error.strerror}.", fix="Choose another one."
            ) from error

    def __str__(self) -> str:
        """Return the table in Markdown."""
        return markdown(self)


def rows(found: Evaluation, length: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of the table at one length: what is shown, and a text for each policy."""
    for task in found.tasks:
        if task != TEXT_LOSS:
            cells = (found.cell(policy, task, length) for policy in found.policies)
            yield task, [_score(cell) if cell else _NOTHING for cell in cells]
    if found.tasks != (TEXT_LOSS,):
        yield "mean", [_number(found.mean_score(policy, length), ".3f") for policy in found.policies]
    if TEXT_LOSS in found.tasks:
        dense = found.cell(DENSE, TEXT_LOSS, length)
        yield "text loss", [_loss(found.cell(policy, TEXT_LOSS, length), dense) for policy in found.policies]
    for phase in PHASES:
        counts = [found.counts(policy, length, phase) for policy in found.policies]
        yield f"open, {phase}", [_number(count.open_fraction, ".1%") for count in counts]
        yield f"density, {phase}", [_number(count.realised_density, ".1%") for count in counts]


def about(found: Evaluation) -> list[str]:
    """Say what the rows mean."""
    return [
        f"{found.samples} samples of each task, seed {found.seed}, backend {found.backend}.",
        "Scores: from 0 to 1, with the 95% Wilson interval. Text loss: nats per token, and the change against dense.",
        "Open: of the (query head, query) pairs that were asked, how many read keys beyond sink and window.",
        "Density: keys scored, of those that dense attention scores. Both are over all rows of the table.",
    ]


def markdown(found: Evaluation) -> str:
    """Write the table, what it was measured with, and the notes, in Markdown."""
    lines = [f"# Evaluation of {escaped(found.model)}", "", " ".join(about(found)), ""]
    for length in found.lengths:
        texts = ((escaped(name), *cells) for name, cells in rows(found, length))
        head = ("measured", *map(escaped, found.policies))
        lines += [f"## {length:,} tokens", "", table(head, texts, numbers=True), ""]
    lines += [f"- {escaped(note)}" for note in found.notes]
    lines += ["", "Policies:", ""]
    lines += [f"- {escaped(name)}: `{it.model_dump_json()}`" for name, it in found.policies.items() if it is not None]
    return "\n".join(lines) + "\n"


def csv_text(found: Evaluation) -> str:
    """Write one line for each cell."""

    def row(cell: Cell) -> dict[str, Any]:
        is_text = cell.task == TEXT_LOSS
        score = (None, None, None) if is_text else (cell.score, *cell.interval)
        return {
            "policy": cell.policy,
            "length": cell.length,
            "task": cell.task,
            "samples": len(cell.losses if is_text else cell.scores),
            **dict(zip(("score", "low", "high"), score, strict=True)),
            "text_loss": cell.loss if is_text else None,
            **_shares(lambda phase: cell.counts.get(phase, PhaseCounts())),
        }

    return csv_of_rows(map(row, found.cells), ".5f", score=".4f", low=".4f", high=".4f")


def never_asked(found: Evaluation) -> list[str]:
    """Say where a policy made no decision, so that it is dense attention under another name."""
    notes = []
    for name, policy in found.policies.items():
        for length in found.lengths:
            if policy is None or any(found.counts(name, length, phase).asked_pairs for phase in PHASES):
                continue
            fewest = min(map(policy.break_even, policy.phases))
            enough = f"{fewest} keys" if fewest else "keys"
            notes.append(
                f"{name} at {length:,} tokens: no query had {enough} beyond sink "
                f"{policy.sink_size} and window {policy.window_size}, so no gate was asked and attention was dense."
            )
    return notes


def _panel(found: Evaluation, length: int) -> Panel:
    """Gather what is drawn of one length."""

    def label(policy: str) -> str:
        shares = [found.counts(policy, length, phase).open_fraction for phase in PHASES]
        asked = not all(map(math.isnan, shares))
        return f"{policy}\nopen: {' / '.join(_number(share, '.0%') for share in shares)}" if asked else policy

    scores = {}
    for task in found.tasks:
        if task != TEXT_LOSS:
            cells = (found.cell(policy, task, length) for policy in found.policies)
            scores[task] = [cell.score if cell else math.nan for cell in cells]
    if scores:
        scores["mean"] = [found.mean_score(policy, length) for policy in found.policies]
    texts = {policy: found.cell(policy, TEXT_LOSS, length) for policy in found.policies}
    losses = {policy: cell.loss_by_position for policy, cell in texts.items() if cell}
    dense = losses.pop(DENSE, [])
    changes = {name: [a - b for a, b in zip(parts, dense, strict=True)] for name, parts in losses.items()}
    return Panel(length, [*map(label, found.policies)], scores, changes if TEXT_LOSS in found.tasks else None)


def _score(cell: Cell) -> str:
    return with_interval(Interval(cell.score, *cell.interval), ".2f")


def _loss(cell: Cell | None, dense: Cell | None) -> str:
    if cell is None or dense is None:
        return _NOTHING
    return f"{cell.loss:.4f}" + ("" if cell is dense else f" ({cell.loss / dense.loss - 1:+.1%})")


def _shares(counts: Callable[[Phase], PhaseCounts]) -> dict[str, float | None]:
    """Open fraction and density of each phase by name; None where they are not known."""
    names = ("open_fraction", "realised_density")
    return {f"{phase}_{name}": _known(getattr(counts(phase), name)) for phase in PHASES for name in names}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float, how: str) -> str:
    return number(value, how, unknown=_NOTHING)
