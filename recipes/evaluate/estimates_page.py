"""The page, the picture and the files of `estimates.py`."""

from __future__ import annotations

import csv
import math
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from patchattn.evaluation.statistics import wilson_interval

GUARD_ONLY = "guarded, open only above the freezing point"
"""Name of the row that shows how few pairs the guarded estimate can open with one threshold for all heads."""

_RESAMPLES = 2000


@dataclass
class Row:
    """One candidate at one open fraction.

    Args:
        candidate: Its name.
        target: Open fraction that the threshold was chosen for, on other documents; 0 where it was not chosen so.
        open: Open fraction on the held-out documents, each layer reading what gated layers below made of the text.
        right: Facts answered exactly.
        asked: Facts asked for.
        losses: Text loss of each document, nats per token.
    """

    candidate: str
    target: float
    open: float
    right: int
    asked: int
    losses: tuple[float, ...]


@dataclass
class Fit:
    """What one candidate does on dense activations.

    Args:
        candidate: Its name.
        cost: Multiply-adds for one query, as a share of scoring all far keys.
        correlation: Of estimated with true margin, mean over heads, where the estimate is finite; held out.
        spread: Standard deviation of the error, nats, mean over heads, same pairs.
        missed: Missed mass at 10, 20 and 30% open; held out. NaN where no threshold opens that few.
    """

    candidate: str
    cost: float
    correlation: float
    spread: float
    missed: tuple[float, ...]


def save(rows: list[Any], path: Path) -> None:
    """Write rows of one kind as CSV; sequences of numbers are parted by spaces."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _written(value) for name, value in asdict(row).items()} for row in rows)


def load(kind: type[Any], path: Path) -> list[Any]:
    """Read rows that `save` wrote."""
    read = {"str": str, "int": int, "float": float, "tuple[float, ...]": lambda text: tuple(map(float, text.split()))}
    with path.open(newline="") as file:
        return [
            kind(*(read[str(field.type)](line[field.name]) for field in fields(kind))) for line in csv.DictReader(file)
        ]


def _written(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(f"{number:.5f}" for number in value)
    return f"{value:.5f}" if isinstance(value, float) else value


PAGE = """# Estimates at equal open fraction

Estimates of the bulk log mass on the shipped model in float32: {length:,} tokens, sink 16, window 256, `min_bulk=0`,
{documents} documents with 36 facts each, {asked} in all. Thresholds, one for all heads unless the name says otherwise,
are chosen on {fitted} other documents, cut from other text, so that a given share of the pairs opens on dense
activations; then every layer decides on what gated layers below made of the text. *Open* is what opened, in prefill.
*Cost* is in multiply-adds of the estimate for one query, as a share of scoring all of its far keys; keeping the
statistics up to date comes on top.

- *saturating*, *log-normal*, *guarded*: the library's estimates. *Guarded* opens all pairs above the freezing point,
  {floor} of them, and can't be asked for less with one threshold for all heads.
- *threshold by head*: what `OpenFractionTarget` does, least missed mass for that many open pairs.
- *mixture*: a Gaussian for each chunk of keys. *Boxes*: the largest score that the box around a chunk's keys allows, as
  in Quest (arXiv 2406.10774). *8 directions*: every far key is scored on 8 of 32 directions.
- *probe*: a logistic regression for each head from the query to the exact share of the bulk keys, fitted on the
  documents that thresholds are chosen on; linear, or with all products of two components of the query. It looks at no
  key but through the local log mass. *Fitted on other tasks*: on documents with chains, lists and notes, not facts.
- *expected value added*: closed heads add what one Gaussian of keys and values expects the bulk to give.

{table}

Intervals: Wilson for facts, resampled documents for the text loss.

![facts and text loss against open fraction](estimates.png)

## On dense activations

Correlation with the true margin and standard deviation of the error, mean over heads, where the estimate is finite:
*guarded* leaves out the pairs above the freezing point, so its rows are not to be compared with the others. Missed mass
is the mean over all pairs asked, in one of the documents.

{fits}

Made by `python recipes/evaluate/estimates.py`. All rows: [estimates.csv](estimates.csv),
[estimates.dense.csv](estimates.dense.csv). What follows from it:
[decision 8](../decisions/0008-estimates-that-were-tried.md).
"""


def change(row: Row, dense: Row) -> tuple[float, float, float]:
    """Relative change of the text loss against dense, and its 95% interval from resampling documents."""
    chosen, every = random.Random(0), range(len(dense.losses))

    def ratio(indices: Any) -> float:
        return sum(row.losses[at] for at in indices) / sum(dense.losses[at] for at in indices) - 1

    found = sorted(ratio(chosen.choices(every, k=len(every))) for _ in range(_RESAMPLES))
    return ratio(every), found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES)]


def write_page(rows: list[Row], fits: list[Fit], out: Path, *, length: int, fitted: int) -> None:
    """Write page and picture.

    Args:
        rows: Rows measured on the model; one is called `"dense"`.
        fits: Judgements on dense activations.
        out: Path of the results without suffix.
        length: Tokens in a document.
        fitted: Documents that thresholds were chosen on.
    """
    prices = {fit.candidate: fit.cost for fit in fits}
    dense, floor = (next(row for row in rows if row.candidate == name) for name in ("dense", GUARD_ONLY))
    lines = [
        "| chosen for | candidate | cost | open | facts exact (95% interval) | text loss over dense (95% interval) |",
        "|" + "---|" * 6,
    ]
    for row in sorted(rows, key=lambda row: (row.target, -row.right)):
        low, high = wilson_interval(row.right, row.asked)
        price = prices.get(row.candidate.partition(", expected")[0], prices["guarded"])
        cells = [f"{row.target:.0%}" if row.target else "", row.candidate]
        cells += ["" if row.candidate in ("dense", "closed") else f"{price:.2%}", f"{row.open:.1%}"]
        cells += [f"{row.right / row.asked:.3f} ({low:.3f}-{high:.3f})"]
        cells += ["" if row is dense else "{:+.2%} ({:+.2%} to {:+.2%})".format(*change(row, dense))]
        lines.append("| " + " | ".join(cells) + " |")
    judged = ["| candidate | cost | correlation | spread, nats | missed at 10% | at 20% | at 30% |", "|" + "---|" * 7]
    for fit in fits:
        missed = ["can't" if math.isnan(share) else f"{share:.3f}" for share in fit.missed]
        cells = [fit.candidate, f"{fit.cost:.2%}", f"{fit.correlation:.2f}", f"{fit.spread:.2f}", *missed]
        judged.append("| " + " | ".join(cells) + " |")
    out.with_suffix(".md").write_text(
        PAGE.format(
            length=length,
            documents=len(dense.losses),
            asked=dense.asked,
            fitted=fitted,
            floor=f"{floor.open:.0%}",
            table="\n".join(lines),
            fits="\n".join(judged),
        )
    )
    plot(rows, dense, out.with_suffix(".png"))


def plot(rows: list[Row], dense: Row, path: Path) -> None:
    """Draw facts and text loss against open fraction for candidates with several rows."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    facts, loss = figure.subplots(1, 2)
    names = dict.fromkeys(row.candidate for row in rows if row.target)
    styles = {"oracle": "black", "saturating": "tab:orange", "guarded": "tab:blue", "probe, quadratic": "tab:green"}
    others = iter(("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:grey", "gold"))
    for name in names:
        points = sorted((row for row in rows if row.candidate == name and row.target), key=lambda row: row.open)
        if len(points) < 2 and name != "guarded":
            continue
        if name == "guarded":
            fixed = [row for row in rows if row.candidate in ("guarded, threshold 0.6", GUARD_ONLY)]
            points = sorted(points + fixed, key=lambda row: row.open)
        colour = styles.get(name) or next(others)
        line = "o-" if name in styles else "o--"
        at = [100 * row.open for row in points]
        shares = [row.right / row.asked for row in points]
        bounds = [wilson_interval(row.right, row.asked) for row in points]
        reach = [
            [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
            [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
        ]
        look = {"fmt": line, "color": colour, "capsize": 2, "elinewidth": 0.8, "markersize": 5}
        facts.errorbar(at, shares, reach, label=name, **look)
        loss.plot(at, [100 * change(row, dense)[0] for row in points], line, color=colour, markersize=5)
    facts.axhline(dense.right / dense.asked, color="black", linestyle=":", label="dense")
    loss.axhline(0, color="black", linestyle=":")
    facts.set_ylim(-0.03, 1.03)
    facts.set_ylabel("facts answered exactly")
    loss.set_ylabel("text loss against dense, %")
    for axes in (facts, loss):
        axes.set_xlabel("open pairs, %")
        axes.grid(alpha=0.3)
    figure.legend(*facts.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
