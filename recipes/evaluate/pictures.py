"""Colours and axes that the pictures of the results share."""

from __future__ import annotations

from typing import Any

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
"""Colour and marker of each curve."""

PERCENT_TICKS = (1, 2, 5, 10, 20, 50, 100)


def open_axis(axes: Any, *, low: float = 0.8) -> None:
    """Make the x axis one of open fractions in percent, on a log scale."""
    axes.set_xscale("log")
    axes.set_xticks(PERCENT_TICKS, [f"{tick}%" for tick in PERCENT_TICKS])
    axes.set_xlim(low, 110)
    axes.minorticks_off()
    axes.set_xlabel("open pairs")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
