"""From saved rows of the gates to one summary for each gate and setting."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from grid import ESTIMATES
from intervals import Interval, bootstrap, mean_over_log, ratio_of_sums
from store import Row

from patchattn.evaluation.statistics import wilson_interval

Place = tuple[str, int, int]
"""Kinds, length, window."""

AREA = (0.05, 0.30)
"""Open fractions that curves are averaged between."""

LABELS = {
    **{f"prompt/{estimate}": f"moment, {estimate}" for estimate in ESTIMATES},
    **{f"calibration/{estimate}": f"moment, {estimate}, calibration moments" for estimate in ESTIMATES},
}


@dataclass(frozen=True)
class Summary:
    """One gate in one setting.

    Args:
        place: Kinds, length, window.
        family: Which curve.
        setting: Which point of it.
        documents: Documents scored.
        open_fraction: Open pairs over pairs asked; NaN for the stock model.
        density: Realised density; NaN for the stock model.
        right: Right answers.
        asked: Questions.
        exact: Share of right answers with its Wilson interval.
        lost: Exact match below dense attention on the same documents, in points; bootstrap over documents.
        loss: Mean text loss over documents, nats per token.
        rise: Text loss above dense attention's on the same documents, as a fraction; bootstrap over documents.
    """

    place: Place
    family: str
    setting: str
    documents: int
    open_fraction: float
    density: float
    right: int
    asked: int
    exact: Interval
    lost: Interval
    loss: float
    rise: Interval

    @property
    def name(self) -> str:
        """Label of the curve."""
        return LABELS.get(self.family, self.family)


def grouped(rows: Iterable[Row]) -> dict[tuple[Place, str, str], dict[int, Row]]:
    """Order rows by place, family and setting, and by document."""
    found: dict[tuple[Place, str, str], dict[int, Row]] = {}
    for row in rows:
        place = (row["kinds"], row["length"], row["window"])
        found.setdefault((place, row["family"], row["setting"]), {})[row["document"]] = row
    return found


def summaries(rows: Iterable[Row], *, kind: str | None = None) -> list[Summary]:
    """Summarise rows; `kind` counts only the questions of one kind."""
    found = grouped(rows)
    listed = []
    for (place, family, setting), of_case in found.items():
        dense = found.get((place, "open", ""), {})
        both = sorted(of_case.keys() & dense.keys())
        if not both or (kind and kind not in of_case[both[0]]["asked"]):
            continue
        mine, theirs = [of_case[i] for i in both], [dense[i] for i in both]
        right, asked, right_dense = (
            [_count(row[name], kind) for row in side]
            for name, side in (("right", mine), ("asked", mine), ("right", theirs))
        )
        opened, pairs, scored, causal = np.sum([row["counts"] for row in mine], axis=0)
        share = wilson_interval(sum(right), sum(asked))
        losses = [row["loss"] for row in mine]
        below = [100 * (a - b) for a, b in zip(right_dense, right, strict=True)]
        above = [row["loss"] - other["loss"] for row, other in zip(mine, theirs, strict=True)]
        listed.append(
            Summary(
                place,
                family,
                setting,
                len(both),
                opened / pairs if pairs else np.nan,
                scored / causal if causal else np.nan,
                sum(right),
                sum(asked),
                Interval(sum(right) / sum(asked), *share),
                ratio_of_sums(below, asked),
                float(np.mean(losses)),
                ratio_of_sums(above, [row["loss"] for row in theirs]),
            )
        )
    return listed


def _count(counts: dict[str, int], kind: str | None) -> int:
    return counts[kind] if kind else sum(counts.values())


@dataclass(frozen=True)
class Area:
    """A curve averaged over the logarithm of the open fraction.

    Args:
        family: Which curve.
        lost: Exact match below dense attention, in points.
        rise: Text loss above dense attention's, in percent.
        span: Smallest and largest open fraction of the curve.
    """

    family: str
    lost: Interval | None
    rise: Interval | None
    span: tuple[float, float]


def areas(rows: Iterable[Row], place: Place) -> list[Area]:
    """Average every curve of one setting that reaches from one end of `AREA` to the other."""
    found = {key: of_case for key, of_case in grouped(rows).items() if key[0] == place}
    dense = found[place, "open", ""]
    every = sorted(set.intersection(*({*of_case} for of_case in found.values())))
    base_right = np.array([sum(dense[i]["right"].values()) / sum(dense[i]["asked"].values()) for i in every])
    base_loss = np.array([dense[i]["loss"] for i in every])
    listed = []
    for family in dict.fromkeys(key[1] for key in found):
        points = []
        for key in found:
            if key[1] != family or family in ("open", "closed", "stock"):
                continue
            of_case = [found[key][i] for i in every]
            opened, pairs = np.sum([row["counts"][:2] for row in of_case], axis=0)
            right = np.array([sum(row["right"].values()) / sum(row["asked"].values()) for row in of_case])
            points.append((opened / pairs, base_right - right, np.array([row["loss"] for row in of_case]) - base_loss))
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        x = np.array([point[0] for point in points])
        span = (float(x[0]), float(x[-1]))
        # A tenth beyond an end counts as reaching it: thresholds hit their fraction nearly.
        if len(x) < 3 or x[0] > AREA[0] * 1.1 or x[-1] < AREA[1] * 0.9:
            listed.append(Area(family, None, None, span))
            continue
        low, high = max(AREA[0], x[0]), min(AREA[1], x[-1])

        def mean(y: np.ndarray, *, x: np.ndarray = x, low: float = low, high: float = high) -> np.ndarray:
            return 100 * mean_over_log(x, y, low, high)

        lost, rise = (np.stack([point[part] for point in points], axis=1) for part in (1, 2))  # [documents, points]
        listed.append(
            Area(
                family,
                bootstrap(lost, lambda w, mean=mean, y=lost: mean(w @ y)),
                bootstrap(rise, lambda w, mean=mean, y=rise: mean(w @ y) / (w @ base_loss)),
                span,
            )
        )
    return listed


def write_csv(path: Path, listed: Iterable[Summary]) -> None:
    """Write one line for each gate and setting."""
    header = "kinds,length,window,gate,setting,documents,open_fraction,realised_density,right,asked,exact,exact_low,"
    header += "exact_high,points_below_dense,points_low,points_high,text_loss,loss_rise,rise_low,rise_high"
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(header.split(","))
        for one in sorted(listed, key=lambda one: (one.place, one.family, one.open_fraction, one.setting)):
            numbers = (one.open_fraction, one.density, one.exact, one.lost, one.loss, one.rise)
            opened, density, exact, lost, loss, rise = (
                [f"{n:.5g}" for n in ((x.value, x.low, x.high) if isinstance(x, Interval) else (x,))] for x in numbers
            )
            about = [*one.place, one.name, one.setting, one.documents]
            lines.writerow([*about, *opened, *density, one.right, one.asked, *exact, *lost, *loss, *rise])
