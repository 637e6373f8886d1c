"""A study's page: its parts, how its text is filled in, and the look of its pictures."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import context
from matplotlib.figure import Figure

from patchattn.evaluation.page import with_interval
from patchattn.evaluation.statistics import Interval, relative_change

# Okabe & Ito: told apart by colour-blind readers too.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE, GREY = "#D8C400", "#0072B2", "#D55E00", "#CC79A7", "#888888"

STYLES = {
    "oracle": (BLACK, "o"),
    "static": (ORANGE, "s"),
    "static, answering": (RED, "o"),
    "random heads": (GREY, "v"),
    "random pairs": (GREY, "x"),
    "prompt/guarded": (BLUE, "D"),
    "prompt/saturating": (SKY, "^"),
    "prompt/lognormal": (PURPLE, "P"),
    "calibration/guarded": (BLUE, "D"),
    "calibration/saturating": (SKY, "^"),
    "calibration/lognormal": (PURPLE, "P"),
    "budget, guarded": (GREEN, "h"),
    "budget, saturating": (YELLOW, "*"),
    "risk, each head": (RED, ">"),
    "risk, mean over heads": (RED, "<"),
}
"""Colour and marker of each family of gates."""

_PERCENT_TICKS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Page:
    """What a study shows.

    Args:
        markdown: The text. It links the picture as `NAME.png`.
        picture: Saved as `NAME.png`; None for no picture.
        tables: By name without suffix, rows that are saved as CSV.
        formats: How the floats of the tables are written, see `csv_text`: `number`, and columns by name.
        note: What the command says when the page is written; nothing if empty.
    """

    markdown: str
    picture: Figure | None = None
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def filled(study: Mapping[str, Any], **values: object) -> str:
    """Read the text of a page, `pages/STUDY.md`, and fill in its fields; `made_by` is how it is made.

    Args:
        study: The study's `globals()`, whose constants are fields too, as are those of `context`.
        values: The other fields.

    A line that begins with `{each NAME}` is written for each of the rows of that name, and its fields are theirs first.
    """
    name = study["__name__"].rpartition(".")[2]
    text = (Path(__file__).parent / "pages" / f"{name}.md").read_text(encoding="utf-8")
    values = {**vars(context), **study, "made_by": f"Made by `python recipes/evaluate/run.py {name}`", **values}
    written: list[str] = []
    for line in text.split("\n"):
        each = re.fullmatch(r"\{each (\w+)\}(.*)", line)
        form, rows = (each[2], values[each[1]]) if each else (line, [values])
        written += [_Fields().vformat(form, values, row) for row in rows]
    return "\n".join(written)


class _Fields(string.Formatter):
    """Fields of a text: items of a mapping or attributes of a row; None and NaN leave nothing.

    Intervals are written as numbers are, with their ends in brackets, after `-` or, where the format ends so, ` to`.
    """

    def get_value(self, key: Any, page: Any, row: Any) -> Any:
        return (row if key in row else page)[key] if isinstance(row, Mapping) else getattr(row, key)

    def format_field(self, value: Any, how: str) -> str:
        if value is None or value != value:
            return ""
        if isinstance(value, Interval):
            how, to, _ = how.partition(" to")
            return with_interval(value, how, between=" to " if to else "-")
        return super().format_field(value, how)


def label(family: str) -> str:
    """Return what pages call a family of gates."""
    source, _, estimate = family.partition("/")
    return f"moment, {estimate}{', calibration moments' * (source == 'calibration')}" if estimate else family


def open_axis(axes: Any, *, low: float = 0.8) -> None:
    """Make the x axis one of open fractions in percent, on a log scale."""
    axes.set_xscale("log")
    axes.set_xticks(_PERCENT_TICKS, [f"{tick}%" for tick in _PERCENT_TICKS])
    axes.set_xlim(low, 110)
    axes.minorticks_off()
    axes.set_xlabel("open pairs")
    tidy(axes)


def tidy(axes: Any, *, grid: str = "both") -> None:
    """Draw a light grid, and no frame above and on the right."""
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def told(row: Any, dense: Any, **more: Any) -> SimpleNamespace:
    """Return what a row has, its `facts` and the change of its `loss`, None where it was not measured, and more."""
    loss = relative_change(row.losses, dense.losses) if row.losses else None
    return SimpleNamespace(**vars(row) | more, facts=row.facts, loss=loss)


def draw_intervals(axes: Any, paid: Sequence[float], found: Sequence[Interval], **look: Any) -> None:
    """Draw estimates with their intervals over what was paid for them, in percent."""
    reach = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
    paid, values = [100 * part for part in paid], [one.value for one in found]
    axes.errorbar(paid, values, reach, capsize=2, elinewidth=0.8, markersize=5, **look)


def beside_dense(figure: Figure, dense: Any) -> Figure:
    """Add names and the levels of dense attention to two axes, facts and change of the text loss."""
    facts, loss = figure.axes
    facts.axhline(dense.right / dense.asked, color="black", linestyle=":", label="dense")
    loss.axhline(0, color="black", linestyle=":")
    facts.set(ylabel="facts answered exactly", ylim=(-0.03, 1.03))
    loss.set(ylabel="text loss against dense, %")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.legend(*facts.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure
