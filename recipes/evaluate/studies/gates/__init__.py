"""How much of answers and text is kept when gates open few pairs? All head gates, at several lengths and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from context import LENGTHS, WINDOWS, Context
from matplotlib.figure import Figure
from page import STYLES, Page, filled, label, open_axis
from studies.gates import ranking
from studies.gates.grid import DOCUMENTS, FULL, SCORED
from studies.gates.ranking import RANKINGS
from studies.gates.summary import AREA, Summary, areas, summaries

from patchattn.evaluation.page import percent, table

MEASURED = (RANKINGS, SCORED)

_GROUPS = {
    "One threshold for all heads, moments of the prompt": (
        "oracle", "static", "static, answering", "random heads", "random pairs",
        "prompt/guarded", "prompt/saturating", "prompt/lognormal",
    ),
    "Measured beforehand: moments or thresholds of the calibration": (
        "oracle", "static, answering", "calibration/guarded", "calibration/saturating", "calibration/lognormal",
        "risk, each head", "risk, mean over heads", "budget, guarded", "budget, saturating",
    ),
}  # fmt: skip
_WITHOUT_MOMENTS = ("oracle", "static", "static, answering", "random heads", "random pairs")
_KINDS = ("chain", "list")


def best_of(listed: Sequence[Summary], most_open: float) -> Summary:
    """Return the gate that needs no exact mass with the best answers at an open fraction; text loss breaks ties."""
    known = (*_WITHOUT_MOMENTS, "stock", "open", "closed")
    fitting = [one for one in listed if one.family not in known and one.open_fraction <= most_open]
    return min(fitting, key=lambda one: (one.lost.value, one.rise.value))


def goals(full: Sequence[Summary]) -> dict[str, Summary]:
    """Name the gates that are compared with the goals."""
    named = {(one.family, one.setting): one for one in full}
    return {
        "best moment gate, at least 85% closed": best_of(full, 0.155),
        "best moment gate, at least 70% closed": best_of(full, 0.305),
        "best moment gate, any": best_of(full, 1.0),
        "the default": named["prompt/guarded", "0.6"],
        "exact mass, 85% closed": named["oracle", "for 15%"],
        "static heads": named["static", "5 heads"],
        "static heads that answer": named["static, answering", "5 heads"],
    }


def across(
    listed: Iterable[Summary], head: list[str], places: list[Any], cell: Callable[[Summary], str], least: int = 1
) -> str:
    """Write gates down and places across; leaves out gates that fewer than `least` places have."""
    at: dict[tuple[str, str], dict[Any, str]] = {}
    for one in listed:
        at.setdefault((one.name, one.setting), {})[one.place] = cell(one)
    rows = ([*gate, *(found.get(place, "") for place in places)] for gate, found in at.items() if len(found) >= least)
    return table(head, rows)


def page(context: Context) -> Page:
    """Show goals, all gates at one length and window, and what else was asked."""
    rows, ranked = SCORED.rows(context), RANKINGS.done(context)
    listed = summaries(rows)
    others = [one for kind in _KINDS for one in summaries(rows, kind=kind)]
    full = [one for one in listed if one.place == FULL]
    compared = goals(full)
    best = next(iter(compared.values()))

    def lean(length: int) -> str:
        return across(
            [one for one in listed if one.place[:2] == ("facts", length)],
            [f"{length:,} tokens", "setting", *(f"window {window}" for window in WINDOWS)],
            [("facts", length, window) for window in WINDOWS],
            lambda one: f"{percent(one.open_fraction)} / {one.facts.value:.3f} / {one.rise.value:+.2%}",
            # The gates at `FULL` have their own table: here only what the other windows have too.
            least=2 if length == FULL[1] else 1,
        )

    markdown = filled(
        globals(),
        documents=(min(one.documents for one in full), max(one.documents for one in full)),
        ranked=", ".join(f"{count} of {length:,} tokens" for length, count in ranking.DOCUMENTS.items()),
        one_head=1 / len(ranked[FULL[1:]].heads),
        met="met" if best.meets_goals else "missed",
        best=best,
        closed=1 - best.open_fraction,
        goals=[{"goal": goal, "one": one, "met": "yes" if one.meets_goals else "no"} for goal, one in compared.items()],
        dense=[one for one in full if one.family in ("stock", "open")],
        gated=[one for one in full if one.family not in ("stock", "open")],
        AREA=AREA,
        areas=areas(rows, FULL),
        floors=[{"length": length, "at": {w: ranked[length, w].floor for w in WINDOWS}} for length in LENGTHS],
        counts=", ".join(f"{len(DOCUMENTS[length])} documents of {length:,}" for length in LENGTHS),
        lean="\n\n".join(map(lean, LENGTHS)),
        kinds=across(
            others,
            ["gate", "setting", *(f"{kind}, {length:,}" for kind in _KINDS for length in LENGTHS)],
            [(kind, length, 256) for kind in _KINDS for length in LENGTHS],
            lambda one: f"{one.right} of {one.asked}" + f" ({-one.lost.value:+.0f})" * (one.family != "open"),
        ),
    )
    ordered = sorted([*listed, *others], key=lambda one: (one.place, one.family, one.open_fraction, one.setting))
    return Page(markdown, draw(full), {"gates": [one.columns() for one in ordered]})


def draw(full: Sequence[Summary]) -> Figure:
    """Draw exact match and text loss against open fraction, one row for each group of curves."""
    figure = Figure(figsize=(13, 9.5), dpi=120, layout="constrained")
    grid: Any = figure.subplots(2, 2)
    dense, closed = (next(one for one in full if one.family == name) for name in ("open", "closed"))
    note = {"color": "dimgrey", "fontsize": 9}
    for (title, families), (facts, loss) in zip(_GROUPS.items(), grid, strict=True):
        for family in families:
            curve = [one for one in full if one.family == family]
            colour, marker = STYLES[family]
            x = [100 * one.open_fraction for one in curve]
            line = "--" if family in (*_WITHOUT_MOMENTS, "risk, mean over heads") else "-"
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 6, "linewidth": 1.6}
            style["label"] = label(family).replace(", calibration moments", "")
            facts.plot(x, [one.facts.value for one in curve], **style)
            loss.plot(x, [100 * one.rise.value for one in curve], **style)
        facts.axhspan(dense.facts.low, dense.facts.high, color="grey", alpha=0.15, lw=0)
        facts.text(0.85, dense.facts.value + 0.035, "dense, 95%", **note)
        facts.text(100, closed.facts.value + 0.01, "closed", **note, ha="right")
        loss.axhline(2, color="grey", lw=0.8, ls=(0, (1, 4)))
        loss.text(100, 2.04, "goal: +2%", **note, ha="right")
        loss.text(100, 100 * closed.rise.value + 0.04, "closed", **note, ha="right")
        for one, line in ((dense, "-"), (closed, ":")):
            facts.axhline(one.facts.value, color="grey", lw=1, ls=line)
            loss.axhline(100 * one.rise.value, color="grey", lw=1, ls=line)
        facts.set(ylabel="facts answered exactly", ylim=(-0.03, 1.03))
        facts.set_title(title, loc="left", fontsize=11)
        loss.set(ylabel="text loss above dense, %")
        loss.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        for axes in (facts, loss):
            open_axis(axes)
    return figure
