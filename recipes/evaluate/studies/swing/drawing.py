"""The picture: how often each head reads far back, and six heads over one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from page import RED
from studies.swing.measuring import STRETCH, Decided

INK, QUIET = "#1d2733", "#66707a"
SHADES = LinearSegmentedColormap.from_list("far", ["#eceff2", "#a9cce8", "#2f7fc1", "#0b2f5b"])
MAPS = {"late_needles": "reading English", "late_code": "reading Python", "asked_code": "answering questions about it"}
DRAWN = "code"


def kinds(heads: Mapping[str, np.ndarray], task: str, per_layer: int) -> dict[str, list[int]]:
    """Choose two heads, of two layers, that show best for what heads open in a task."""
    early, late, asked, swing = (heads[f"{name}_{task}"] for name in ("early", "late", "asked", "swing"))
    by = {"once the text is long": late - early, "in some passages": swing, "to answer": asked - late}
    found = {}
    for kind, value in by.items():
        first, *others = np.argsort(-value).tolist()
        found[kind] = [first, next(head for head in others if head // per_layer != first // per_layer)]
    return found


def named(head: int, per_layer: int) -> str:
    """Name a head as layer.head."""
    return "{}.{}".format(*divmod(head, per_layer))


def draw(heads: Mapping[str, np.ndarray], row: Decided, per_layer: int) -> Figure:
    """Draw how often each head is open on maps above, and over one text and its questions two heads of each kind."""
    figure = Figure(figsize=(9, 6.2), dpi=200)
    shown = kinds(heads, row.task, per_layer)
    figure.text(0.02, 0.952, "Which attention heads read far back?", fontsize=14, weight="bold", color=INK)
    told = f"{row.model} near the end of {row.length:,} tokens. A cell is a head: the darker, the more often it reads"
    figure.text(0.02, 0.915, f"{told} beyond the last {row.window:,}.", fontsize=8.5, color=QUIET)
    for at, (name, title) in enumerate(MAPS.items()):
        axes = figure.add_axes((0.05 + at * 0.32, 0.635, 0.3, 0.205))
        _map(axes, heads[name].reshape(-1, per_layer).T, title)
        axes.set_yticks([] if at else range(0, per_layer, 4))
        axes.set_ylabel("" if at else "head", fontsize=8, color=QUIET)
        for layer, head in (divmod(index, per_layer) for pair in shown.values() for index in pair):
            axes.add_patch(
                Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=1.6, zorder=5)
            )
    _legend(figure.add_axes((0.85, 0.968, 0.08, 0.016)))
    figure.text(
        0.02,
        0.527,
        f"The six outlined heads over {len(row.files)} files of Python",
        fontsize=11,
        weight="bold",
        color=INK,
    )
    told = f"height: share of {STRETCH} tokens in a row for which a head reads far back"
    figure.text(0.02, 0.494, told, fontsize=8.5, color=QUIET)
    _over_text(figure.add_axes((0.05, 0.035, 0.94, 0.45)), shown, row, per_layer)
    return figure


def _map(axes: Any, grid: np.ndarray, title: str) -> None:
    axes.imshow(grid, vmin=0, vmax=1, cmap=SHADES, aspect="auto")
    axes.set_title(title, fontsize=9.5, loc="left", color=INK, pad=5)
    axes.set_xticks(np.arange(grid.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(grid.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=7.5, labelcolor=QUIET)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(0, grid.shape[1], 5))
    axes.set_xlabel("layer", fontsize=8, color=QUIET, labelpad=1)


def _legend(axes: Any) -> None:
    axes.imshow(np.linspace(0, 1, 64)[None], cmap=SHADES, aspect="auto")
    axes.set_axis_off()
    for x, side, word in ((-0.06, "right", "never"), (1.06, "left", "always")):
        axes.text(x, 0.5, word, ha=side, va="center", fontsize=8, color=QUIET, transform=axes.transAxes)


def _over_text(axes: Any, shown: Mapping[str, Sequence[int]], row: Decided, per_layer: int) -> None:
    stretches, questions = np.array(row.stretches), np.array(row.questions)
    count, gap, y = stretches.shape[1], 5, 0.0
    axes.text(count + gap, -0.57, f"{questions.shape[1]} questions about it", fontsize=8.5, color=INK, va="bottom")
    for kind, pair in shown.items():
        y -= 0.65
        axes.text(0, y + 0.08, f"far back {kind}", fontsize=8.5, color=INK, va="bottom")
        for index in pair:
            y -= 1.0
            for start, values in ((0, stretches[index]), (count + gap, questions[index])):
                edges = start + np.arange(len(values) + 1)
                for height, shade in ((np.ones(len(values)), 0.0), (values, 0.7)):
                    axes.stairs(y + 0.85 * height, edges, baseline=y, fill=True, color=SHADES(shade))
            axes.text(-1.5, y + 0.42, named(index, per_layer), ha="right", va="center", fontsize=8, color=INK)
    y -= 0.55
    for token, file in row.files.items():
        x = max(0.0, (token - row.begin) / STRETCH)
        axes.text(x + 0.8 * (x > 0), y + 0.02, file, fontsize=8, color=INK, va="bottom")
        if x > 0:
            axes.plot((x, x), (y, -0.6), color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
    ticks = range(2000, row.begin + STRETCH * count, 1000)
    axes.set_xticks([(at - row.begin) / STRETCH for at in ticks], [f"token {at:,}" for at in ticks])
    axes.set(xlim=(-0.5, count + gap + questions.shape[1]), ylim=(y, 0), yticks=[])
    axes.tick_params(length=0, labelsize=8, labelcolor=QUIET, pad=1)
    axes.spines[:].set_visible(False)
