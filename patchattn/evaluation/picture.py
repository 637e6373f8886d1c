"""Draw an evaluation: scores of tasks and policies, and text loss by position; matplotlib is imported when it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from patchattn.errors import MissingPackageError
from patchattn.evaluation.policies import DENSE
from patchattn.evaluation.results import PHASES, Evaluation
from patchattn.evaluation.tasks import TEXT_LOSS

_COLOURS = ("#2a78d6", "#eb6834", "#2f9e62", "#8a56c2", "#c23b5e", "#8c7a2e", "#1f9aa8", "#666666")
_MEAN = "mean"


def save_picture(found: Evaluation, path: Path) -> Path:
    """Draw scores as a map of tasks and policies for each length, and text loss against that of dense below.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "Pictures need matplotlib, which is not installed.", fix='pip install "patchattn[plot]"'
        ) from error

    tasks = [task for task in found.tasks if task != TEXT_LOSS]
    has_scores, has_text = bool(tasks), TEXT_LOSS in found.tasks
    heights = [0.34 * (len(tasks) + 1) + 1.6] * has_scores + [3.0] * has_text
    width = max(3.6, 1.15 * len(found.policies) + 1.9) * len(found.lengths) + 0.6
    figure = Figure(figsize=(min(max(width, 6.0), 26), sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), len(found.lengths), squeeze=False, height_ratios=heights)
    for column, length in enumerate(found.lengths):
        if has_scores:
            _draw_scores(grid[0, column], found, length, tasks)
        if has_text:
            _draw_losses(grid[-1, column], found, length)
    if has_text:
        grid[-1, 0].set_ylabel("text loss minus dense\n(nats per token)")
        handles, labels = grid[-1, 0].get_legend_handles_labels()
        if handles:
            grid[-1, -1].legend(handles, labels, fontsize=8, frameon=False)
    figure.suptitle(f"{_plain(found.model)}: {found.samples} samples of each task", fontsize=12)
    figure.savefig(path, dpi=150)
    return path


def _draw_scores(axes: Any, found: Evaluation, length: int, tasks: list[str]) -> None:
    policies = list(found.policies)
    values = [[_score(found, policy, task, length) for policy in policies] for task in tasks]
    values.append([found.mean_score(policy, length) for policy in policies])
    axes.set_facecolor("#e4e4e0")
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            known = not math.isnan(value)
            colour = "black" if value > 0.6 or not known else "white"
            label = f"{value:.2f}" if known else "-"
            axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=9)
    axes.axhline(len(tasks) - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(policies)), [_label(found, policy, length) for policy in policies], fontsize=9)
    axes.set_yticks(range(len(tasks) + 1), [*tasks, _MEAN], fontsize=9)
    axes.set_title(f"{length:,} tokens: score; open pairs in prefill / decode", fontsize=11)


def _draw_losses(axes: Any, found: Evaluation, length: int) -> None:
    dense = found.cell(DENSE, TEXT_LOSS, length)
    for colour, policy in zip(_COLOURS * len(found.policies), (p for p in found.policies if p != DENSE), strict=False):
        cell = found.cell(policy, TEXT_LOSS, length)
        if cell is not None and dense is not None:
            changes = [a - b for a, b in zip(cell.loss_by_position, dense.loss_by_position, strict=True)]
            at = [length * (part + 0.5) / len(changes) for part in range(len(changes))]
            axes.plot(at, changes, "o-", color=colour, markersize=3.5, label=_plain(policy))
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set_xlim(0, length)
    axes.set_xlabel("position in the text, tokens")
    axes.set_title(f"{length:,} tokens: text loss", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _label(found: Evaluation, policy: str, length: int) -> str:
    """Name a column, with the open fractions below."""
    shares = [found.counts(policy, length, phase).open_fraction for phase in PHASES]
    if all(map(math.isnan, shares)):
        return _plain(policy)
    return _plain(policy) + "\nopen: " + " / ".join("-" if math.isnan(share) else f"{share:.0%}" for share in shares)


def _score(found: Evaluation, policy: str, task: str, length: int) -> float:
    cell = found.cell(policy, task, length)
    return math.nan if cell is None else cell.score


def _plain(text: str) -> str:
    """Keep matplotlib from reading a text as a formula."""
    return text.replace("$", r"\$")
