"""Pieces of Markdown pages."""

from __future__ import annotations

import math

from patchattn.evaluation.page import escaped, number, percent, table, with_interval
from patchattn.evaluation.statistics import Interval


def test_tables() -> None:
    assert table(("a", "b", "c"), [("1", "", "x")]) == "| a | b | c |\n|---|---|---|\n| 1 |  | x |"
    assert table(("a", "b"), [], numbers=True) == "| a | b |\n|---|---:|"


def test_numbers_and_texts() -> None:
    assert (percent(0.1234), percent(math.nan), percent(1, 0)) == ("12.3%", "", "100%")
    assert number(math.nan, ".3f", unknown="-") == "-"
    assert with_interval(Interval(0.01, -0.02, 0.03), "+.2%", between=" to ") == "+1.00% (-2.00% to +3.00%)"
    assert escaped("a|b *c*\nd") == "a\\|b \\*c\\* d"
