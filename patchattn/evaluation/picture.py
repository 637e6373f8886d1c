"""Draw an evaluation: scores of tasks and policies, and text loss by position; matplotlib is imported when it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchattn.errors import MissingPackageError

_COLOURS = ("#2a78d6", "#eb6834", "#2f9e62", "#8a56c2", "#c23b5e", "#8c7a2e", "#1f9aa8", "#666666")
_FRAME = "#c23b5e"


@dataclass(frozen=True)
class Panel:
    """What is drawn of one length.

    Args:
        length: Tokens.
        policies: A label for each column of the map.
        scores: A row of the map for each task, 0 to 1, NaN where there is none; the last one is their mean.
        changes: By policy, text loss minus dense's in equal parts by position, nats per token; None for no text loss.
        worst: For each policy the task that drops most against dense, which is framed; None for none.
    """

    length: int
    policies: list[str]
    scores: dict[str, list[float]]
    changes: dict[str, list[float]] | None
    worst: list[str | None]


def save_picture(title: str, panels: Sequence[Panel], path: Path) -> Path:
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

    first = panels[0]
    has_scores, has_text = bool(first.scores), first.changes is not None
    heights = [0.34 * len(first.scores) + 1.6] * has_scores + [3.0] * has_text
    width = max(3.6, 1.15 * len(first.policies) + 1.9) * len(panels) + 0.6
    figure = Figure(figsize=(min(max(width, 6.0), 26), sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), len(panels), squeeze=False, height_ratios=heights)
    for column, panel in enumerate(panels):
        if has_scores:
            _draw_scores(grid[0, column], panel)
        if has_text:
            _draw_losses(grid[-1, column], panel)
    if has_text:
        grid[-1, 0].set_ylabel("text loss minus dense\n(nats per token)")
        handles, labels = grid[-1, 0].get_legend_handles_labels()
        if handles:
            grid[-1, -1].legend(handles, labels, fontsize=8, frameon=False)
    figure.suptitle(_plain(title), fontsize=12)
    figure.savefig(path, dpi=150)
    return path


def _draw_scores(axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    values = list(panel.scores.values())
    axes.set_facecolor("#e4e4e0")
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            known = not math.isnan(value)
            colour = "black" if value > 0.6 or not known else "white"
            label = f"{value:.2f}" if known else "-"
            axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=9)
    for column, task in enumerate(panel.worst):
        if task is not None:
            corner = (column - 0.47, list(panel.scores).index(task) - 0.45)
            axes.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, edgecolor=_FRAME, linewidth=2))
    axes.axhline(len(values) - 1.5, color="white", linewidth=3)
    axes.set_xticks(range(len(panel.policies)), [*map(_plain, panel.policies)], fontsize=9)
    axes.set_yticks(range(len(values)), list(panel.scores), fontsize=9)
    title = (
        f"{panel.length:,} tokens: score, worst drop framed\nopen: prefill / decode; agree with dense: text / answers"
    )
    axes.set_title(title, fontsize=10)


def _draw_losses(axes: Any, panel: Panel) -> None:
    changes = panel.changes or {}
    for colour, (policy, parts) in zip(_COLOURS * len(changes), changes.items(), strict=False):
        at = [panel.length * (part + 0.5) / len(parts) for part in range(len(parts))]
        axes.plot(at, parts, "o-", color=colour, markersize=3.5, label=_plain(policy))
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set_xlim(0, panel.length)
    axes.set_xlabel("position in the text, tokens")
    axes.set_title(f"{panel.length:,} tokens: text loss", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a text as a formula."""
    return text.replace("$", r"\$")
