"""What an evaluation found: cells by policy, task and length, and what they add up to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patchattn.errors import ReportError
from patchattn.evaluation.statistics import wilson_interval
from patchattn.evaluation.tasks import TEXT_LOSS
from patchattn.policy import Phase, Policy
from patchattn.report import GateReport
from patchattn.writing import made

PHASES: tuple[Phase, ...] = ("prefill", "decode")


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
        return cls(
            **{
                **found,
                "scores": tuple(found["scores"]),
                "losses": tuple(map(tuple, found["losses"])),
                "counts": {phase: PhaseCounts(**counts) for phase, counts in found["counts"].items()},
            }
        )


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
        wanted = (policy, task, length)
        return next((cell for cell in self.cells if (cell.policy, cell.task, cell.length) == wanted), None)

    def mean_score(self, policy: str, length: int) -> float:
        """Mean over the tasks that have a score; NaN without any."""
        scores = [cell.score for cell in self._of(policy, length) if cell.task != TEXT_LOSS]
        return sum(scores) / len(scores) if scores else math.nan

    def counts(self, policy: str, length: int, phase: Phase) -> PhaseCounts:
        """What the gates did over all tasks."""
        found = [cell.counts[phase] for cell in self._of(policy, length) if phase in cell.counts]
        return sum(found, PhaseCounts())

    def _of(self, policy: str, length: int) -> Iterable[Cell]:
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
            "policies": {
                name: None if policy is None else policy.model_dump(mode="json")
                for name, policy in self.policies.items()
            },
            "notes": list(self.notes),
            "summary": [self._summary(name, length) for length in self.lengths for name in self.policies],
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def _summary(self, policy: str, length: int) -> dict[str, Any]:
        text = self.cell(policy, TEXT_LOSS, length)
        found = {"mean_score": self.mean_score(policy, length), "text_loss": math.nan if text is None else text.loss}
        for phase in PHASES:
            counts = self.counts(policy, length, phase)
            found |= {
                f"{phase}_open_fraction": counts.open_fraction,
                f"{phase}_realised_density": counts.realised_density,
            }
        known = {name: None if math.isnan(number) else number for name, number in found.items()}
        return {"policy": policy, "length": length, **known}

    def save(self, folder: str | Path) -> list[Path]:
        """Write `evaluation.json`, `evaluation.csv`, `evaluation.md` and `evaluation.png` into a folder.

        Raises:
            ReportError: The folder can't be made or written into.
            MissingPackageError: matplotlib is not installed.
        """
        from patchattn.evaluation.tables import save

        return save(self, Path(folder))

    def __str__(self) -> str:
        """Return the table in Markdown."""
        from patchattn.evaluation.tables import markdown

        return markdown(self)


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


def append_cell(path: Path, cell: Cell) -> None:
    """Add a cell to a file as a line of JSON; makes the folder.

    Raises:
        ReportError: The file can't be written.
    """
    try:
        with made(path.parent), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell.to_dict()) + "\n")
    except OSError as error:
        raise ReportError(f"Can't write {path}: {error.strerror}.", fix="Choose another place.") from error


def read_cells(path: Path) -> dict[str, Cell]:
    """Read the cells of a file by their keys; none if there is no file. A last line that was broken off is left out.

    Raises:
        ReportError: The file holds something else.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        cells = [Cell.from_dict(json.loads(line)) for line in lines[:-1]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReportError(f"{path} is not a file of results.", fix="Delete it, or choose another place.") from error
    if lines[-1]:
        path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    return {cell.key: cell for cell in cells}
