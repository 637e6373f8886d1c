"""Show an evaluation: a table of tasks and policies in Markdown, all numbers as CSV and JSON, and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from patchattn.errors import ReportError
from patchattn.evaluation.results import PHASES, Cell, Evaluation
from patchattn.evaluation.tasks import TEXT_LOSS
from patchattn.writing import made, write_text

_NOTHING = "-"
_MARKDOWN_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#"})


def rows(found: Evaluation, length: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of the table at one length: what is shown, and a text for each policy."""
    for task in found.tasks:
        if task != TEXT_LOSS:
            yield task, [_score(found.cell(policy, task, length)) for policy in found.policies]
    if found.tasks != (TEXT_LOSS,):
        yield "mean", [_number(found.mean_score(policy, length), "{:.3f}") for policy in found.policies]
    if TEXT_LOSS in found.tasks:
        dense, *_ = (found.cell(policy, TEXT_LOSS, length) for policy in found.policies)
        cells = [found.cell(policy, TEXT_LOSS, length) for policy in found.policies]
        yield "text loss", [_loss(cell, dense) for cell in cells]
    for phase in PHASES:
        counts = [found.counts(policy, length, phase) for policy in found.policies]
        yield f"open, {phase}", [_share(count.open_fraction) for count in counts]
        yield f"density, {phase}", [_share(count.realised_density) for count in counts]


def markdown(found: Evaluation) -> str:
    """Write the table, what it was measured with, and the notes, in Markdown."""
    names = [_escaped(name) for name in found.policies]
    lines = [f"# Evaluation of {_escaped(found.model)}", "", " ".join(about(found)), ""]
    for length in found.lengths:
        lines += [
            f"## {length:,} tokens",
            "",
            f"| measured | {' | '.join(names)} |",
            "|---|" + "---:|" * len(names),
            *(f"| {_escaped(name)} | {' | '.join(texts)} |" for name, texts in rows(found, length)),
            "",
        ]
    lines += [f"- {_escaped(note)}" for note in found.notes]
    lines += ["", "Policies:", ""]
    lines += [
        f"- {_escaped(name)}: `{policy.model_dump_json()}`"
        for name, policy in found.policies.items()
        if policy is not None
    ]
    return "\n".join(lines) + "\n"


def about(found: Evaluation) -> list[str]:
    """Say what the rows mean."""
    return [
        f"{found.samples} samples of each task, seed {found.seed}, backend {found.backend}.",
        "Scores: from 0 to 1, with the 95% Wilson interval. Text loss: nats per token, and the change against dense.",
        "Open: of the (query head, query) pairs that were asked, how many read keys beyond sink and window.",
        "Density: keys scored, of those that dense attention scores. Both are over all rows of the table.",
    ]


def csv_text(found: Evaluation) -> str:
    """Write one line for each cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ["policy", "length", "task", "samples", "score", "low", "high", "text_loss"]
    header += [f"{phase}_{name}" for phase in PHASES for name in ("open_fraction", "realised_density")]
    writer.writerow(header)
    for cell in found.cells:
        is_text = cell.task == TEXT_LOSS
        score = ["", "", ""] if is_text else [f"{value:.4f}" for value in (cell.score, *cell.interval)]
        row = [cell.policy, cell.length, cell.task, len(cell.losses if is_text else cell.scores), *score]
        row.append(f"{cell.loss:.5f}" if is_text else "")
        for phase in PHASES:
            counts = cell.counts.get(phase)
            shares = (math.nan, math.nan) if counts is None else (counts.open_fraction, counts.realised_density)
            row += ["" if math.isnan(share) else f"{share:.5f}" for share in shares]
        writer.writerow(row)
    return file.getvalue()


def save(found: Evaluation, folder: Path) -> list[Path]:
    """Write all files; see `Evaluation.save`."""
    from patchattn.evaluation.picture import save_picture

    writers: dict[str, Callable[[Evaluation], str]] = {
        "evaluation.md": markdown,
        "evaluation.csv": csv_text,
        "evaluation.json": lambda found: json.dumps(found.to_dict(), indent=1) + "\n",
    }
    try:
        with made(folder):
            paths = [write_text(folder / name, write(found)) for name, write in writers.items()]
            return [*paths, save_picture(found, folder / "evaluation.png")]
    except OSError as error:
        raise ReportError(
            f"Can't make the folder {folder} or write into it: {error.strerror}.", fix="Choose another one."
        ) from error


def _score(cell: Cell | None) -> str:
    if cell is None:
        return _NOTHING
    low, high = cell.interval
    return f"{cell.score:.2f} ({low:.2f}-{high:.2f})"


def _loss(cell: Cell | None, dense: Cell | None) -> str:
    if cell is None or dense is None:
        return _NOTHING
    change = "" if cell is dense else f" ({cell.loss / dense.loss - 1:+.1%})"
    return f"{cell.loss:.4f}{change}"


def _share(share: float) -> str:
    return _number(share, "{:.1%}")


def _number(number: float, pattern: str) -> str:
    return _NOTHING if math.isnan(number) else pattern.format(number)


def _escaped(text: str) -> str:
    return " ".join(text.translate(_MARKDOWN_SPECIAL).split())
