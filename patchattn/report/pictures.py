"""Pictures of a report; matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchattn.errors import MissingPackageError, ReportError

if TYPE_CHECKING:
    from patchattn.report.timeline import Head, Timeline

_COLUMNS = 1600
_PREFILL, _DECODE = "#2a78d6", "#eb6834"


def save_heads(fractions: dict[int, list[float]], path: Path, title: str) -> Path:
    """Draw the open fraction of every head; NaN, of a head that was never asked, stays grey."""
    figure_type = _figure_type()
    layers, width = list(fractions), max((len(heads) for heads in fractions.values()), default=1)
    grid = [heads + [float("nan")] * (width - len(heads)) for heads in fractions.values()] or [[float("nan")]]
    size = (min(max(5.5, 0.62 * width + 2.2), 16), min(max(3.2, 0.5 * len(layers) + 1.8), 13))
    figure = figure_type(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#d8d8d4")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(width))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    if width * len(layers) <= 400:
        for row, heads in enumerate(grid):
            for column, value in enumerate(heads):
                if value == value:
                    colour = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="open fraction")
    return _save(figure, path)


def save_timeline(timeline: Timeline, path: Path, title: str | None) -> Path:
    """Draw tokens across and heads downwards; above it the number of open heads."""
    figure_type = _figure_type()
    n_heads, n_tokens = timeline.open.shape
    width = -(-n_tokens // _COLUMNS)
    grid = _binned(timeline.open.float(), width)
    edges = (-0.5, n_tokens - 0.5)
    figure = figure_type(figsize=(12, min(max(3.6, 0.16 * n_heads + 2.2), 16)), layout="constrained")
    top, heads = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(2.0, min(n_heads / 9, 7.0))])
    at = [width * (index + 0.5) - 0.5 for index in range(grid.shape[1])]
    top.fill_between(at, grid.sum(0).numpy(), step="mid", color=_PREFILL, linewidth=0)
    top.set_ylim(bottom=0)
    top.set_ylabel("open heads")
    top.spines[["top", "right"]].set_visible(False)
    extent = (*edges, n_heads - 0.5, -0.5)
    heads.imshow(grid.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest", extent=extent)
    for begin, end in _decoded(timeline):
        top.axvspan(begin - 0.5, end - 0.5, color=_DECODE, alpha=0.25, linewidth=0)
    ticks, names, borders = _by_layer(timeline.heads)
    heads.set_yticks(ticks, names)
    heads.hlines(borders, *edges, color="#8a8a86", linewidth=0.6)
    heads.set_xlim(*edges)
    heads.set_ylabel("heads by layer")
    shade = " (shaded above: decode)" if "decode" in timeline.phases else ""
    heads.set_xlabel("token, in the order the model read them" + shade)
    top.set_title(title or "Which heads read far keys, token by token", fontsize=11)
    return _save(figure, path)


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("A picture needs matplotlib.", fix='pip install "patchattn[plot]"') from error
    return Figure


def _save(figure: Any, path: Path) -> Path:
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise ReportError(f"Can't save a picture as {path.name!r}.", fix=f"use one of the suffixes {', '.join(known)}")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ReportError(f"Can't write {path}: {error.strerror}.", fix="choose another path") from error
    return path


def _binned(grid: Tensor, width: int) -> Tensor:
    """Mean over bins of so many tokens; the last bin may be shorter."""
    return torch.stack([part.mean(1) for part in grid.split(width, dim=1)], dim=1) if grid.shape[1] else grid


def _decoded(timeline: Timeline) -> list[tuple[int, int]]:
    """Spans of tokens, end exclusive, that were read in decode."""
    spans: list[tuple[int, int]] = []
    for token, phase in enumerate(timeline.phases):
        if phase == "decode":
            joins = spans and spans[-1][1] == token
            spans[-1:] = [(spans[-1][0], token + 1)] if joins else [*spans[-1:], (token, token + 1)]
    return spans


def _by_layer(heads: tuple[Head, ...]) -> tuple[list[float], list[str], list[float]]:
    """Ticks in the middle of each run of one layer's heads, their names, and the borders between runs."""
    starts = [i for i in range(len(heads)) if i == 0 or heads[i][0] != heads[i - 1][0]]
    ends = [*starts[1:], len(heads)]
    ticks = [(begin + end - 1) / 2 for begin, end in zip(starts, ends, strict=True)]
    alone = len(starts) == len(heads)
    names = [f"layer {heads[i][0]}" + (f", head {heads[i][1]}" if alone else "") for i in starts]
    if len(names) > 40:
        every = -(-len(names) // 40)
        ticks, names = ticks[::every], names[::every]
    return ticks, names, [begin - 0.5 for begin in starts[1:]]
