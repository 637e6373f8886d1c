"""Pieces of text as tokens: taken, cut to an exact number of tokens, and woven into each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, takewhile
from operator import eq

Units = list[tuple[int, ...]]
"""Tokens of pieces of text that follow each other: lines, sentences or words."""


def take(units: Iterable[tuple[int, ...]], size: int) -> Units:
    """Take units until they have at least `size` tokens."""
    found = []
    for unit in units:
        if size <= 0:
            break
        found.append(unit)
        size -= len(unit)
    return found


def cut(units: Units, size: int) -> Units:
    """Cut units at the front, so that exactly `size` tokens are left."""
    surplus = sum(map(len, units)) - size
    at = 0
    while surplus > 0 and surplus >= len(units[at]):
        surplus -= len(units[at])
        at += 1
    return [units[at][surplus:], *units[at + 1 :]] if at < len(units) else []


def weave(
    tokens: list[int], units: Units, pieces: Iterable[tuple[float, Sequence[int]]], *, share: float
) -> tuple[tuple[int, int], ...]:
    """Add units to tokens, and pieces between them.

    Args:
        tokens: What comes before; is added to.
        units: What is not broken up.
        pieces: Depth, as a fraction of all tokens of the units, and tokens of each piece; the least deep first.
        share: A piece stands after the units of which this share, and all before it, lies above the piece's depth.

    Returns:
        `(start, end)` of each piece in the tokens, `end` exclusive.
    """
    size, behind, at = sum(map(len, units)), 0, 0
    spans = []
    for depth, piece in pieces:
        while at < len(units) and behind + share * len(units[at]) <= depth * size:
            tokens += units[at]
            behind += len(units[at])
            at += 1
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    tokens += chain.from_iterable(units[at:])
    return tuple(spans)


def n_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences share at their start."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))
