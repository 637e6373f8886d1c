"""What an evaluation found: cells by policy, task and length, what they add up to, and the files it is saved as."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from patchattn.errors import ReportError
from patchattn.evaluation.cells import Cell, PhaseCounts, together
from patchattn.evaluation.page import escaped, number, table
from patchattn.evaluation.picture import Panel, save_picture
from patchattn.evaluation.policies import DENSE, Drafts
from patchattn.evaluation.rows import csv_text as csv_of_rows
from patchattn.evaluation.statistics import Interval
from patchattn.evaluation.summary import Summary, summarize
from patchattn.evaluation.table import DRAFTS_MEAN, MEANINGS, Row, rows
from patchattn.evaluation.tasks import TEXT_LOSS
from patchattn.policy import PHASES, Phase, Policy
from patchattn.writing import made, write_text


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Args:
        model: Name of the model.
        tasks: Tasks in the order of the table, `"text"` among them if text loss was measured.
        lengths: Lengths in tokens.
        policies: Policies and drafts by name, every `"auto"` resolved; None for dense, which is the first.
        backend: Backend that computed the patched runs.
        samples: Samples of each task and seed.
        seeds: What everything random followed from.
        cells: The results, one for each seed; none for a task that does not fit a length.
        notes: What a reader has to know: tasks left out, texts repeated, gates never asked.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    policies: dict[str, Policy | Drafts | None]
    backend: str
    samples: int
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    def cell(self, policy: str, task: str, length: int) -> Cell | None:
        """Return one cell, the samples of all seeds together; None if there is none."""
        found = [cell for cell in self._of(policy, length) if cell.task == task]
        return together(found) if found else None

    def summary(self, policy: str, length: int) -> Summary:
        """What the cells of a policy add up to, beside dense."""
        return self._summaries[policy, length]

    def mean_score(self, policy: str, length: int) -> float:
        """Mean over the tasks that have a score; NaN without any."""
        return self.summary(policy, length).mean_score

    def counts(self, policy: str, length: int, phase: Phase) -> PhaseCounts:
        """What the gates did over all tasks."""
        return self.summary(policy, length).counts[phase]

    def rows(self, length: int) -> Iterator[Row]:
        """Yield the rows of the table at one length: what is shown, and a text for each policy."""
        cells = [{task: self.cell(policy, task, length) for task in self.tasks} for policy in self.policies]
        summaries = [self.summary(policy, length) for policy in self.policies]
        return rows(self.tasks, cells, summaries, drafts=any(isinstance(it, Drafts) for it in self.policies.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; `summary` holds the numbers of the table, None where there is none."""
        return {
            "model": self.model,
            "backend": self.backend,
            "tasks": list(self.tasks),
            "lengths": list(self.lengths),
            "samples": self.samples,
            "seeds": list(self.seeds),
            "policies": {name: policy and policy.model_dump(mode="json") for name, policy in self.policies.items()},
            "notes": list(self.notes),
            "summary": [self.summary(name, length).to_dict() for length in self.lengths for name in self.policies],
            "cells": [cell.to_dict() for cell in self.cells],
        }

    @cached_property
    def _summaries(self) -> Mapping[tuple[str, int], Summary]:
        return {
            (policy, length): summarize(policy, length, self._of(policy, length), self._of(DENSE, length))
            for policy in self.policies
            for length in self.lengths
        }

    def _of(self, policy: str, length: int) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.policy == policy and cell.length == length)

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


def about(found: Evaluation) -> list[str]:
    """Say what the rows mean."""
    seeds = f"seed{'s' * (len(found.seeds) > 1)} {', '.join(map(str, found.seeds))}"
    drafts = [it for it in found.policies.values() if isinstance(it, Drafts)]
    of_drafts = [DRAFTS_MEAN.format(drafts[0].tokens)] if drafts else []
    return [f"{found.samples} samples of each task, {seeds}, backend {found.backend}.", *MEANINGS, *of_drafts]


def markdown(found: Evaluation) -> str:
    """Write the table, what it was measured with, and the notes, in Markdown."""
    lines = [f"# Evaluation of {escaped(found.model)}", "", " ".join(about(found)), ""]
    for length in found.lengths:
        texts = ([*map(escaped, (name, *cells))] for name, cells in found.rows(length))
        head = ("measured", *map(escaped, found.policies))
        lines += [f"## {length:,} tokens", "", table(head, texts, numbers=True), ""]
    lines += [f"- {escaped(note)}" for note in found.notes]
    lines += ["", "Policies:", ""]
    lines += [f"- {escaped(name)}: `{it.model_dump_json()}`" for name, it in found.policies.items() if it is not None]
    return "\n".join(lines) + "\n"


def csv_text(found: Evaluation) -> str:
    """Write one line for each cell."""
    dense = {(cell.task, cell.length, cell.seed): cell for cell in found.cells if cell.policy == DENSE}

    def row(cell: Cell) -> dict[str, Any]:
        alone = summarize(cell.policy, cell.length, [cell], [dense[cell.task, cell.length, cell.seed]])
        is_text = cell.task == TEXT_LOSS
        close = alone.text if is_text else alone.answers
        return {
            "policy": cell.policy,
            "length": cell.length,
            "task": cell.task,
            "seed": cell.seed,
            "samples": len(cell.losses if is_text else cell.scores),
            **_three("score", None if is_text else Interval(cell.score, *cell.interval)),
            **_three("drop", alone.drop),
            "text_loss": cell.loss if is_text else None,
            **_three("loss_change", alone.loss_change),
            **_three("agreement", close and close.top1),
            **_three("kl", close and close.kl),
            "same_text": sum(cell.same) / len(cell.same) if cell.same else None,
            "drafts_kept": cell.kept / cell.drafted if cell.drafted else None,
            **alone.shares(),
        }

    return csv_of_rows(map(row, found.cells), ".5f", score=".4f", score_low=".4f", score_high=".4f")


def _three(name: str, found: Interval | None) -> dict[str, float | None]:
    """Columns of an estimate and its interval; None where there is none."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), found or (None,) * 3, strict=True))


def never_asked(found: Evaluation) -> list[str]:
    """Say where a policy made no decision, so that it is dense attention under another name."""
    notes = []
    for name, policy in found.policies.items():
        for length in found.lengths:
            if policy is None or any(found.counts(name, length, phase).asked_pairs for phase in PHASES):
                continue
            if isinstance(policy, Drafts):
                notes.append(
                    f"{name} at {length:,} tokens: nothing was drafted, as no answer of two tokens or more was written "
                    f"beyond sink {policy.policy.sink_size} and window {policy.policy.window_size}."
                )
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
    summaries = [found.summary(policy, length) for policy in found.policies]
    scores = {}
    for task in found.tasks:
        if task != TEXT_LOSS:
            cells = (found.cell(policy, task, length) for policy in found.policies)
            scores[task] = [cell.score if cell else math.nan for cell in cells]
    if scores:
        scores["mean"] = [summary.mean_score for summary in summaries]
    texts = {policy: found.cell(policy, TEXT_LOSS, length) for policy in found.policies}
    losses = {policy: cell.loss_by_position for policy, cell in texts.items() if cell}
    dense = losses.pop(DENSE, [])
    changes = {name: [a - b for a, b in zip(parts, dense, strict=True)] for name, parts in losses.items()}
    return Panel(
        length,
        [*map(_label, summaries)],
        scores,
        changes if TEXT_LOSS in found.tasks else None,
        worst=[summary.worst_task for summary in summaries],
    )


def _label(summary: Summary) -> str:
    """Name a policy, with its open pairs and its agreement with dense, as far as they are known."""
    opened = [summary.counts[phase].open_fraction for phase in PHASES]
    agreed = [math.nan if close is None else close.top1.value for close in (summary.text, summary.answers)]
    parts = (
        (name, values) for name, values in (("open", opened), ("agree", agreed)) if not all(map(math.isnan, values))
    )
    lines = (f"{name}: {' / '.join(number(value, '.0%', unknown='-') for value in values)}" for name, values in parts)
    return "\n".join((summary.policy, *lines))
