"""Pieces of Markdown pages: tables, and how numbers and texts are written in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from patchattn.evaluation.statistics import Interval

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#"})


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Write a table, without a line break at its end.

    Args:
        head: Names of the columns.
        rows: Texts of the cells.
        numbers: Whether all columns but the first are numbers, which stand on the right.
    """
    marks = "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1)
    return "\n".join([_line(head), marks, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float, how: str, *, unknown: str = "") -> str:
    """Write a number as a format specification says; `unknown` for NaN.

    Example:
        >>> number(0.123, ".1%"), number(math.nan, ".1%", unknown="-")
        ('12.3%', '-')
    """
    return unknown if math.isnan(value) else format(value, how)


def percent(value: float, digits: int = 1) -> str:
    """Write a fraction in percent; nothing for NaN."""
    return number(value, f".{digits}%")


def with_interval(found: Interval, how: str, *, between: str = "-") -> str:
    """Write an estimate and its interval in brackets.

    Args:
        found: The estimate.
        how: Format specification of all three numbers.
        between: What stands between the ends.

    Example:
        >>> with_interval(Interval(0.5, 0.25, 0.75), ".2f")
        '0.50 (0.25-0.75)'
    """
    value, low, high = (format(number, how) for number in found)
    return f"{value} ({low}{between}{high})"


def escaped(text: str) -> str:
    """Keep Markdown from reading anything into a text; line breaks become spaces."""
    return " ".join(text.translate(_SPECIAL).split())
