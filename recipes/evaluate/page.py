"""A study's page: its parts, the sentence about how it was made, and the look of its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

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
        markdown: The text. It links the picture as `NAME.png`, a table by `csv_link`.
        picture: Saved as `NAME.png`; None for no picture.
        tables: By name without suffix, rows that are saved as CSV, floats with five digits.
        dpi: Dots per inch of the picture.
    """

    markdown: str
    picture: Figure | None = None
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    dpi: int = 120


def made_by(study: str) -> str:
    """Say how a page is made."""
    return f"Made by `python recipes/evaluate/run.py {study}`"


def csv_link(table: str) -> str:
    """Link a table that lies beside the recipes."""
    return f"[{table}.csv](../../recipes/evaluate/results/{table}.csv)"


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
