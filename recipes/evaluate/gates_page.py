"""The page, the table and the pictures that `gates.py` makes of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grid import FULL, LEAN, expected
from intervals import Interval
from matplotlib.figure import Figure
from pictures import STYLES, open_axis
from ranking import DOCUMENTS, ranking
from shipped import LENGTHS, WINDOWS
from store import Row
from summary import AREA, LABELS, Area, Summary, areas, summaries, write_csv

_FAMILIES = ("stock", "open", "closed", *STYLES)
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
_GATES = [family for family in STYLES if family not in _WITHOUT_MOMENTS]


def write_pages(rows: list[Row], out: Path, work: Path) -> None:
    """Write table, page and picture of the rows so far."""
    listed = summaries(rows)
    write_csv(out.with_suffix(".csv"), [*listed, *by_kind(rows)])
    full = in_order([one for one in listed if one.place == FULL.key])
    draw(full, out.with_suffix(".png"))
    parts = [
        _head(full),
        _unfinished(rows, work),
        "## Goals\n",
        verdict(full),
        goals(full),
        "\n## All gates at 4,096 tokens, window 256\n",
        table(full),
        "\n![exact match and text loss against open fraction](gates.png)\n",
        _area_text(),
        area_table(areas(rows, FULL.key)),
        "\n## What can't be reached\n",
        _floors(work),
        "\n## Other lengths and windows\n",
        _lean_text(),
        *(lean_table(listed, length) + "\n" for length in LENGTHS),
    ]
    if by_kind(rows):
        parts += ["## Other questions\n", _others_text(), others_table(rows), ""]
    out.with_suffix(".md").write_text("\n".join(parts))


def _unfinished(rows: list[Row], work: Path) -> str:
    """Say what an interrupted run has not measured; nothing for a complete one."""
    named = expected({length: ranking(work, length) for length in LENGTHS})
    missing = sum(map(len, named.values())) - len(rows)
    if not missing:
        return ""
    return (
        f"**Not complete**: {missing} of {missing + len(rows)} rows (one gate on one document) are not measured: some "
        "gates at 4,096 tokens with window 128, and chains and lists. The same command goes on and fills them in.\n"
    )


def by_kind(rows: list[Row]) -> list[Summary]:
    """Summarise chains and lists apart, each under its own name."""
    found = []
    for kind in ("chain", "list"):
        others = summaries([row for row in rows if row["kinds"] != "facts"], kind=kind)
        found += [replace(one, place=(kind, *one.place[1:])) for one in others]
    return found


def in_order(listed: Sequence[Summary]) -> list[Summary]:
    """Order gates by family, then by open fraction."""
    return sorted(listed, key=lambda one: (_FAMILIES.index(one.family), one.open_fraction, one.setting))


def percent(value: float, digits: int = 1) -> str:
    """Write a fraction in percent; nothing for NaN."""
    return "" if value != value else f"{100 * value:.{digits}f}%"


def points(interval: Interval) -> str:
    """Write a difference in points with its interval."""
    return f"{-interval.value:+.1f} ({-interval.high:+.1f} to {-interval.low:+.1f})"


def table(listed: Sequence[Summary]) -> str:
    """Write one line for each gate."""
    lines = [
        "| gate | setting | open | density | facts exact (95%) | points against dense (95%) | text loss (95%) |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in listed:
        rise = f"{100 * one.rise.value:+.2f}% ({100 * one.rise.low:+.2f} to {100 * one.rise.high:+.2f})"
        dense = one.family in ("stock", "open")
        lines.append(
            f"| {one.name} | {one.setting} | {percent(one.open_fraction)} | {percent(one.density)} | "
            f"{one.exact.value:.3f} ({one.exact.low:.3f}-{one.exact.high:.3f}), {one.asked} | "
            f"{'' if dense else points(one.lost)} | {one.loss:.4f}{'' if dense else ', ' + rise} |"
        )
    return "\n".join(lines)


def _head(full: Sequence[Summary]) -> str:
    least, most = min(one.documents for one in full), max(one.documents for one in full)
    return f"""# Quality against open fraction

How much of the answers and of the text is kept when a gate opens few pairs? The shipped model in float32, sink 16,
`min_bulk=0`, held-out documents with nine planted facts in every 1,024 tokens, all asked at the end; at 4,096 tokens
and window 256 {least} documents for every gate and {most} for those that goals are stated for. Made by
`python recipes/evaluate/gates.py`; every row with its intervals is in [gates.csv](gates.csv).

- *Exact*: every token of the answer is the most likely one, given the true tokens before it. Wilson intervals, and the
  number of questions. *Points against dense* and *text loss* are paired with dense attention on the same documents;
  intervals by bootstrap over documents. Text loss is in nats per token, over what is neither planted nor asked.
- *Open* is the share of (query head, query) pairs with bulk keys that opened. *Density* is the share of causal keys
  that the CPU backend scored.
- *For 10%*: the threshold below which 10% of the margins of other documents lie, so the fraction is hit only nearly:
  gated layers change what the next layers see. *Static*: the heads that the oracle opens most often on the same other
  documents; *static, answering*: those with most of their attention on bulk keys while they predict answers there, so
  chosen for this task ({", ".join(f"{count} of {length:,} tokens" for length, count in DOCUMENTS.items())}).
  One head is {percent(1 / 30)} of the pairs. *Random heads* and *pairs* are drawn anew for each document.
- *Prompt* moments are those of the document's own keys, *calibration moments* those of
  [the shipped calibration](../../calibrations/patchattn-demo/README.md), as are thresholds for *risk* and *budget*. It
  was measured in bfloat16 on 64 other documents of 4,096 tokens for window 256: for other windows it can't be used, and
  at 1,024 and 2,048 tokens its risks are no promise.
"""


def best(listed: Sequence[Summary], most_open: float) -> Summary | None:
    """Return the gate that needs no exact mass with the best answers at an open fraction; text loss breaks ties."""
    fitting = [one for one in listed if one.family in _GATES and one.open_fraction <= most_open]
    return min(fitting, key=lambda one: (one.lost.value, one.rise.value), default=None)


def verdict(full: Sequence[Summary]) -> str:
    """Say whether the goal is met, and why not."""
    found = best(full, 0.155)
    if found is None:
        return ""
    met = found.lost.value <= 1 and found.rise.value <= 0.02
    return f"""The best moment gate within 1 point of exact match and +2% of text loss at 85% closed:
**{"met" if met else "missed"}** - {found.name} {found.setting} is {points(found.lost)} points from dense attention and
{100 * found.rise.value:+.2f}% in text loss with {percent(1 - found.open_fraction)} closed. Text loss is within the goal
for nearly every gate from 10% open on; answers decide. Look-ups rest on single keys, which mean and covariance can't
see: below the freezing point the estimates agree, above it the saturating and the log-normal one close look-ups and
lose the answers, and the guarded one opens all pairs there, which costs more than 15% by itself (see
[what can't be reached](#what-cant-be-reached) and [the estimate, head by head](gaussian.md)). Thresholds per head
(*risk*) close the heads in which that is waste.
"""


def goals(full: Sequence[Summary]) -> str:
    """Compare the gates with the goals."""
    lines = [
        "| goal | gate | open | points against dense (95%) | text loss | within 1 point and +2% |",
        "|---|---|---|---|---|---|",
    ]

    def line(goal: str, one: Summary | None) -> None:
        if one is None:
            return
        met = one.lost.value <= 1 and one.rise.value <= 0.02
        lines.append(
            f"| {goal} | {one.name}, {one.setting} | {percent(one.open_fraction)} | {points(one.lost)} | "
            f"{100 * one.rise.value:+.2f}% | {'yes' if met else 'no'} |"
        )

    named = {(one.family, one.setting): one for one in full}
    line("best moment gate, at least 85% closed", best(full, 0.155))
    line("best moment gate, at least 70% closed", best(full, 0.305))
    line("best moment gate, any", best(full, 1.0))
    line("the default", named.get(("prompt/guarded", "0.6")))
    line("exact mass, 85% closed", named.get(("oracle", "for 15%")))
    line("static heads", named.get(("static", "5 heads")))
    line("static heads that answer", named.get(("static, answering", "5 heads")))
    return "\n".join(lines)


def draw(full: Sequence[Summary], path: Path) -> None:
    """Draw exact match and text loss against open fraction, one row for each group of curves."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    grid: Any = figure.subplots(2, 2)
    dense = next(one for one in full if one.family == "open")
    closed = next(one for one in full if one.family == "closed")
    for (title, families), (facts, loss) in zip(_GROUPS.items(), grid, strict=True):
        for family in families:
            curve = [one for one in full if one.family == family]
            if not curve:
                continue
            colour, marker = STYLES[family]
            x = [100 * one.open_fraction for one in curve]
            line = "--" if family in (*_WITHOUT_MOMENTS, "risk, mean over heads") else "-"
            label = LABELS.get(family, family).replace(", calibration moments", "")
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 6, "linewidth": 1.6}
            facts.plot(x, [one.exact.value for one in curve], **style, label=label)
            loss.plot(x, [100 * one.rise.value for one in curve], **style, label=label)
        facts.axhspan(dense.exact.low, dense.exact.high, color="grey", alpha=0.15, lw=0)
        facts.axhline(dense.exact.value, color="grey", lw=1)
        facts.text(0.85, dense.exact.value + 0.035, "dense, 95%", color="dimgrey", fontsize=9)
        facts.axhline(closed.exact.value, color="grey", lw=1, ls=":")
        facts.text(100, closed.exact.value + 0.01, "closed", color="dimgrey", fontsize=9, ha="right")
        loss.axhline(0, color="grey", lw=1)
        loss.axhline(100 * closed.rise.value, color="grey", lw=1, ls=":")
        loss.text(100, 100 * closed.rise.value + 0.04, "closed", color="dimgrey", fontsize=9, ha="right")
        loss.axhline(2, color="grey", lw=0.8, ls=(0, (1, 4)))
        loss.text(100, 2.04, "goal: +2%", color="dimgrey", fontsize=9, ha="right")
        facts.set_ylabel("facts answered exactly")
        loss.set_ylabel("text loss above dense, %")
        facts.set_ylim(-0.03, 1.03)
        facts.set_title(title, loc="left", fontsize=11)
        for axes in (facts, loss):
            open_axis(axes)
        loss.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _area_text() -> str:
    return f"""## Area between each curve and dense attention

The distance from dense attention, averaged over the logarithm of the open fraction between {percent(AREA[0], 0)} and
{percent(AREA[1], 0)}: the area between the curve and the dense line, divided by its width. Straight lines between
points; 95% by bootstrap over documents. Curves that do not reach both ends have none.
"""


def area_table(listed: Sequence[Area]) -> str:
    """Write the areas, the smallest distance in answers first."""
    lines = [
        "| gate | facts: points below dense | text loss: % above dense | open fractions measured |",
        "|---|---|---|---|",
    ]

    def write(interval: Interval | None, digits: int) -> str:
        if interval is None:
            return ""
        return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"

    for one in sorted(listed, key=lambda one: one.lost.value if one.lost else 1e9):
        span = f"{percent(one.span[0])} to {percent(one.span[1])}"
        lines.append(f"| {LABELS.get(one.family, one.family)} | {write(one.lost, 1)} | {write(one.rise, 2)} | {span} |")
    return "\n".join(lines)


def _floors(work: Path) -> str:
    lines = ["| tokens | " + " | ".join(f"window {window}" for window in WINDOWS) + " |", "|---|---|---|---|"]
    for length in LENGTHS:
        cells = []
        for window in WINDOWS:
            floor = ranking(work, length)[str(window)]["floor"]
            cells.append(" / ".join(percent(floor[f"prompt/{name}"]) for name in ("saturating", "guarded")))
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return (
        "Moments of the prompt need a full chunk of 128 bulk keys: the first 127 queries with bulk keys open. The "
        "guarded estimate also opens every pair above its freezing point. So one threshold for all heads can't open "
        "less than this (saturating and log-normal / guarded); thresholds per head, as *risk* and *budget* choose "
        "them, close whole heads and can.\n\n" + "\n".join(lines)
    )


def _lean_text() -> str:
    counts = {setting.length: len(setting.documents) for setting in LEAN if setting.kinds == "facts"}
    documents = ", ".join(f"{count} documents of {length:,}" for length, count in counts.items())
    return (
        f"{documents} tokens. In each cell: open / facts exact / text loss above dense. A gate that can't open so few "
        "pairs at a length and window is left out; intervals are in gates.csv.\n"
    )


def lean_table(listed: Sequence[Summary], length: int) -> str:
    """Write one length: gates down, windows across."""
    at: dict[tuple[str, str], dict[int, Summary]] = {}
    for one in in_order([one for one in listed if one.place[:2] == ("facts", length)]):
        at.setdefault((one.family, one.setting), {})[one.place[2]] = one
    lines = [
        f"| {length:,} tokens | setting | " + " | ".join(f"window {window}" for window in WINDOWS) + " |",
        "|---|---|---|---|---|",
    ]
    for (family, setting), cells in at.items():
        # The full grid has its own table: here only what the other windows have too.
        if len(cells) == 1 and length == FULL.length:
            continue
        written = [
            f"{percent(one.open_fraction)} / {one.exact.value:.3f} / {100 * one.rise.value:+.2f}%" if one else ""
            for one in (cells.get(window) for window in WINDOWS)
        ]
        lines.append(f"| {LABELS.get(family, family)} | {setting} | " + " | ".join(written) + " |")
    return "\n".join(lines)


def _others_text() -> str:
    return (
        "Chains of three assignments and lists to repeat, three of each in every 1,024 tokens, window 256. In each "
        "cell: right of asked (points against dense). Copying a line is left out: the model does it in 16 to 43% of "
        "cases.\n"
    )


def others_table(rows: list[Row]) -> str:
    """Write chains and lists: gates down, kinds and lengths across."""
    columns: list[tuple[str, int]] = [(kind, length) for kind in ("chain", "list") for length in LENGTHS]
    at: dict[tuple[str, str], dict[tuple[str, int], Summary]] = {}
    for one in in_order(by_kind(rows)):
        at.setdefault((one.family, one.setting), {})[one.place[:2]] = one
    lines = [
        "| gate | setting | " + " | ".join(f"{kind}, {length:,}" for kind, length in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for (family, setting), cells in at.items():
        written = []
        for column in columns:
            one = cells.get(column)
            against = "" if one is None or family == "open" else f" ({-one.lost.value:+.0f})"
            written.append("" if one is None else f"{one.right} of {one.asked}{against}")
        lines.append(f"| {LABELS.get(family, family)} | {setting} | " + " | ".join(written) + " |")
    return "\n".join(lines)
