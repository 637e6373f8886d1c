"""How much of answers and text is kept when gates open few pairs? All head gates, at several lengths and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from context import LENGTHS, WINDOWS, Context
from matplotlib.figure import Figure
from page import STYLES, Page, csv_link, label, made_by, open_axis
from studies.gates import ranking
from studies.gates.grid import DOCUMENTS, FULL, SCORED
from studies.gates.ranking import RANKINGS, rankings
from studies.gates.summary import AREA, Area, Summary, areas, summaries

from patchattn.evaluation.page import percent, table, with_interval
from patchattn.evaluation.statistics import Interval

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


def page(context: Context) -> Page:
    """Show goals, all gates at one length and window, and what else was asked."""
    rows, ranked = SCORED.rows(context), rankings(context)
    listed = summaries(rows)
    others = [one for kind in _KINDS for one in summaries(rows, kind=kind)]
    full = [one for one in listed if one.place == FULL]
    floors = [
        [f"{length:,}"]
        + [
            " / ".join(percent(ranked[length, window].floor[f"prompt/{name}"]) for name in ("saturating", "guarded"))
            for window in WINDOWS
        ]
        for length in LENGTHS
    ]
    counts = ", ".join(f"{len(DOCUMENTS[length])} documents of {length:,}" for length in LENGTHS)
    columns = [f"window {window}" for window in WINDOWS]
    lean = "\n\n".join(
        across(
            [one for one in listed if one.place[:2] == ("facts", length)],
            [f"{length:,} tokens", "setting", *columns],
            [("facts", length, window) for window in WINDOWS],
            lambda one: f"{percent(one.open_fraction)} / {one.exact.value:.3f} / {one.rise.value:+.2%}",
            # The gates at `FULL` have their own table: here only what the other windows have too.
            least=2 if length == FULL[1] else 1,
        )
        for length in LENGTHS
    )
    kinds = across(
        others,
        ["gate", "setting", *(f"{kind}, {length:,}" for kind in _KINDS for length in LENGTHS)],
        [(kind, length, 256) for kind in _KINDS for length in LENGTHS],
        lambda one: f"{one.right} of {one.asked}" + f" ({-one.lost.value:+.0f})" * (one.family != "open"),
    )
    markdown = f"""# Quality against open fraction

How much of the answers and of the text is kept when a gate opens few pairs? The shipped model in float32, sink 16,
`min_bulk=0`, held-out documents with nine planted facts in every 1,024 tokens, all asked at the end; at 4,096 tokens
and window 256 {min(one.documents for one in full)} documents for every gate and \
{max(one.documents for one in full)} for those that goals are stated for. Made by
{made_by("gates").removeprefix("Made by ")}; every row with its intervals is in {csv_link("gates")}.

- *Exact*: every token of the answer is the most likely one, given the true tokens before it. Wilson intervals, and the
  number of questions. *Points against dense* and *text loss* are paired with dense attention on the same documents;
  intervals by bootstrap over documents. Text loss is in nats per token, over what is neither planted nor asked.
- *Open* is the share of (query head, query) pairs with bulk keys that opened. *Density* is the share of causal keys
  that the CPU backend scored.
- *For 10%*: the threshold below which 10% of the margins of other documents lie, so the fraction is hit only nearly:
  gated layers change what the next layers see. *Static*: the heads that the oracle opens most often on the same other
  documents; *static, answering*: those with most of their attention on bulk keys while they predict answers there, so
  chosen for this task ({", ".join(f"{count} of {length:,} tokens" for length, count in ranking.DOCUMENTS.items())}).
  One head is {percent(1 / 30)} of the pairs. *Random heads* and *pairs* are drawn anew for each document.
- *Prompt* moments are those of the document's own keys, *calibration moments* those of
  [the shipped calibration](../../calibrations/patchattn-demo/README.md), as are thresholds for *risk* and *budget*. It
  was measured in bfloat16 on 64 other documents of 4,096 tokens for window 256: for other windows it can't be used, and
  at 1,024 and 2,048 tokens its risks are no promise.


## Goals

{verdict(full)}
{goals(full)}

## All gates at 4,096 tokens, window 256

{every_gate(full)}

![exact match and text loss against open fraction](gates.png)

## Area between each curve and dense attention

The distance from dense attention, averaged over the logarithm of the open fraction between {percent(AREA[0], 0)} and
{percent(AREA[1], 0)}: the area between the curve and the dense line, divided by its width. Straight lines between
points; 95% by bootstrap over documents. Curves that do not reach both ends have none.

{area_table(areas(rows, FULL))}

## What can't be reached

Moments of the prompt need a full chunk of 128 bulk keys: the first 127 queries with bulk keys open. The guarded \
estimate also opens every pair above its freezing point. So one threshold for all heads can't open less than this \
(saturating and log-normal / guarded); thresholds per head, as *risk* and *budget* choose them, close whole heads and \
can.

{table(["tokens", *columns], floors)}

## Other lengths and windows

{counts} tokens. In each cell: open / facts exact / text loss above dense. A gate that can't open so few pairs at a \
length and window is left out; intervals are in gates.csv.

{lean}

## Other questions

Chains of three assignments and lists to repeat, three of each in every 1,024 tokens, window 256. In each cell: right \
of asked (points against dense). Copying a line is left out: the model does it in 16 to 43% of cases.

{kinds}
"""
    rows_of_csv = sorted([*listed, *others], key=lambda one: (one.place, one.family, one.open_fraction, one.setting))
    return Page(markdown, draw(full), {"gates": [one.columns() for one in rows_of_csv]})


def points(interval: Interval) -> str:
    """Write a difference in points with its interval."""
    return f"{-interval.value:+.1f} ({-interval.high:+.1f} to {-interval.low:+.1f})"


def every_gate(listed: Sequence[Summary]) -> str:
    """Write one line for each gate."""
    rows = []
    for one in listed:
        dense = one.family in ("stock", "open")
        rise = f", {one.rise.value:+.2%} ({100 * one.rise.low:+.2f} to {100 * one.rise.high:+.2f})"
        cells = [one.name, one.setting, percent(one.open_fraction), percent(one.density)]
        cells += [f"{with_interval(one.exact, '.3f')}, {one.asked}", "" if dense else points(one.lost)]
        rows.append([*cells, f"{one.loss:.4f}{'' if dense else rise}"])
    head = ["gate", "setting", "open", "density", "facts exact (95%)", "points against dense (95%)", "text loss (95%)"]
    return table(head, rows)


def across(
    listed: Iterable[Summary],
    head: Sequence[str],
    places: Sequence[Any],
    cell: Callable[[Summary], str],
    *,
    least: int = 1,
) -> str:
    """Write gates down and places across; leaves out gates that fewer than `least` places have."""
    at: dict[tuple[str, str], dict[Any, str]] = {}
    for one in listed:
        at.setdefault((label(one.family), one.setting), {})[one.place] = cell(one)
    return table(
        head,
        [[*gate, *(found.get(place, "") for place in places)] for gate, found in at.items() if len(found) >= least],
    )


def best(listed: Sequence[Summary], most_open: float) -> Summary | None:
    """Return the gate that needs no exact mass with the best answers at an open fraction; text loss breaks ties."""
    known = (*_WITHOUT_MOMENTS, "stock", "open", "closed")
    fitting = [one for one in listed if one.family not in known and one.open_fraction <= most_open]
    return min(fitting, key=lambda one: (one.lost.value, one.rise.value), default=None)


def meets_goal(one: Summary) -> bool:
    """Say whether a gate is within one point and two percent of dense attention."""
    return one.lost.value <= 1 and one.rise.value <= 0.02


def verdict(full: Sequence[Summary]) -> str:
    """Say whether the goal is met, and why not."""
    found = best(full, 0.155)
    if found is None:
        return ""
    return f"""The best moment gate within 1 point of exact match and +2% of text loss at 85% closed:
**{"met" if meets_goal(found) else "missed"}** - {found.name} {found.setting} is {points(found.lost)} points from dense \
attention and
{found.rise.value:+.2%} in text loss with {percent(1 - found.open_fraction)} closed. Text loss is within the goal
for nearly every gate from 10% open on; answers decide. Look-ups rest on single keys, which mean and covariance can't
see: below the freezing point the estimates agree, above it the saturating and the log-normal one close look-ups and
lose the answers, and the guarded one opens all pairs there, which costs more than 15% by itself (see
[what can't be reached](#what-cant-be-reached) and [the estimate, head by head](gaussian.md)). Thresholds per head
(*risk*) close the heads in which that is waste.
"""


def goals(full: Sequence[Summary]) -> str:
    """Compare the gates with the goals."""
    named = {(one.family, one.setting): one for one in full}
    chosen = {
        "best moment gate, at least 85% closed": best(full, 0.155),
        "best moment gate, at least 70% closed": best(full, 0.305),
        "best moment gate, any": best(full, 1.0),
        "the default": named.get(("prompt/guarded", "0.6")),
        "exact mass, 85% closed": named.get(("oracle", "for 15%")),
        "static heads": named.get(("static", "5 heads")),
        "static heads that answer": named.get(("static, answering", "5 heads")),
    }
    rows = [
        [goal, f"{one.name}, {one.setting}", percent(one.open_fraction), points(one.lost), f"{one.rise.value:+.2%}"]
        + ["yes" if meets_goal(one) else "no"]
        for goal, one in chosen.items()
        if one is not None
    ]
    head = ["goal", "gate", "open", "points against dense (95%)", "text loss", "within 1 point and +2%"]
    return table(head, rows)


def area_table(listed: Iterable[Area]) -> str:
    """Write the areas."""

    def write(interval: Interval | None, how: str) -> str:
        return "" if interval is None else with_interval(interval, how, between=" to ")

    rows = [
        [label(one.family), write(one.lost, ".1f"), write(one.rise, ".2f"), " to ".join(map(percent, one.span))]
        for one in listed
    ]
    return table(["gate", "facts: points below dense", "text loss: % above dense", "open fractions measured"], rows)


def draw(full: Sequence[Summary]) -> Figure:
    """Draw exact match and text loss against open fraction, one row for each group of curves."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    grid: Any = figure.subplots(2, 2)
    dense, closed = (next(one for one in full if one.family == name) for name in ("open", "closed"))
    for (title, families), (facts, loss) in zip(_GROUPS.items(), grid, strict=True):
        for family in families:
            curve = [one for one in full if one.family == family]
            if not curve:
                continue
            colour, marker = STYLES[family]
            x = [100 * one.open_fraction for one in curve]
            line = "--" if family in (*_WITHOUT_MOMENTS, "risk, mean over heads") else "-"
            name = label(family).replace(", calibration moments", "")
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 6, "linewidth": 1.6}
            facts.plot(x, [one.exact.value for one in curve], **style, label=name)
            loss.plot(x, [100 * one.rise.value for one in curve], **style, label=name)
        note = {"color": "dimgrey", "fontsize": 9}
        facts.axhspan(dense.exact.low, dense.exact.high, color="grey", alpha=0.15, lw=0)
        facts.axhline(dense.exact.value, color="grey", lw=1)
        facts.text(0.85, dense.exact.value + 0.035, "dense, 95%", **note)
        facts.axhline(closed.exact.value, color="grey", lw=1, ls=":")
        facts.text(100, closed.exact.value + 0.01, "closed", **note, ha="right")
        loss.axhline(0, color="grey", lw=1)
        loss.axhline(100 * closed.rise.value, color="grey", lw=1, ls=":")
        loss.text(100, 100 * closed.rise.value + 0.04, "closed", **note, ha="right")
        loss.axhline(2, color="grey", lw=0.8, ls=(0, (1, 4)))
        loss.text(100, 2.04, "goal: +2%", **note, ha="right")
        facts.set_ylabel("facts answered exactly")
        loss.set_ylabel("text loss above dense, %")
        facts.set_ylim(-0.03, 1.03)
        facts.set_title(title, loc="left", fontsize=11)
        for axes in (facts, loss):
            open_axis(axes)
        loss.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
