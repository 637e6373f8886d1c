"""From scored documents to one summary for each gate and place, with intervals; paired with dense attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from page import STYLES, label
from studies.gates.grid import Place, Scored

from patchattn.evaluation.statistics import Interval, bootstrap, ratio_of_sums, share

AREA = (0.05, 0.30)
"""Open fractions that curves are averaged between."""

FAMILIES = ("stock", "open", "closed", *STYLES)


@dataclass(frozen=True)
class Summary:
    """One gate in one place, which names the kind of question where only that is counted.

    Args:
        place: What was asked for, length and window.
        family: Which curve.
        setting: Which point of it.
        documents: Documents scored.
        open_fraction: Open pairs over pairs asked; NaN for the stock model, as is `density`.
        density: Realised density.
        right: Right answers of those asked.
        asked: Questions.
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
    lost: Interval
    loss: float
    rise: Interval

    @property
    def name(self) -> str:
        """Label of the curve."""
        return label(self.family)

    @property
    def exact(self) -> Interval:
        """Share of right answers with its Wilson interval."""
        return share(self.right, self.asked)

    def columns(self) -> dict[str, Any]:
        """Columns of the table that is saved."""
        names = (
            "kinds,length,window,gate,setting,documents,open_fraction,realised_density,right,asked,exact,exact_low,"
            "exact_high,points_below_dense,points_low,points_high,text_loss,loss_rise,rise_low,rise_high"
        )
        about = (*self.place, self.name, self.setting, self.documents, self.open_fraction, self.density)
        answers = (self.right, self.asked, *self.exact, *self.lost, self.loss, *self.rise)
        return dict(zip(names.split(","), about + answers, strict=True))


def _by_gate(rows: Iterable[Scored]) -> dict[tuple[Place, str, str], dict[int, Scored]]:
    found: dict[tuple[Place, str, str], dict[int, Scored]] = {}
    for row in rows:
        found.setdefault((row.place, row.family, row.setting), {})[row.document] = row
    return found


def summaries(rows: Iterable[Scored], *, kind: str | None = None) -> list[Summary]:
    """Summarise gates by family, then open fraction; `kind` counts only the questions of one kind, as a place."""
    found, listed = _by_gate(rows), []
    for (place, family, setting), of_gate in found.items():
        dense = found.get((place, "open", ""), {})
        both = sorted(of_gate.keys() & dense.keys())
        if not both or (kind and kind not in of_gate[both[0]].asked):
            continue
        mine, theirs = [of_gate[i] for i in both], [dense[i] for i in both]
        right, asked, right_dense = (
            [counts[kind] if kind else sum(counts.values()) for counts in side]
            for side in ([row.right for row in mine], [row.asked for row in mine], [row.right for row in theirs])
        )
        opened, pairs, scored, causal = np.sum([row.counts for row in mine], axis=0)
        losses, dense_losses = ([row.loss for row in side] for side in (mine, theirs))
        listed.append(
            Summary(
                (kind or place[0], *place[1:]),
                family,
                setting,
                len(both),
                opened / pairs if pairs else np.nan,
                scored / causal if causal else np.nan,
                sum(right),
                sum(asked),
                ratio_of_sums([100 * (a - b) for a, b in zip(right_dense, right, strict=True)], asked),
                float(np.mean(losses)),
                ratio_of_sums([a - b for a, b in zip(losses, dense_losses, strict=True)], dense_losses),
            )
        )
    return sorted(listed, key=lambda one: (FAMILIES.index(one.family), one.open_fraction, one.setting))


class Area(NamedTuple):
    """A curve averaged over the log of the open fraction: answers in points, text loss in percent from dense."""

    family: str
    lost: Interval | None
    rise: Interval | None
    span: tuple[float, float]


def weights_over_log(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weigh the points of a curve so that they sum to its average over the logarithm of `x` between two limits.

    Args:
        x: [points] ascending and positive.
        low: Lower limit, inside the range of `x`.
        high: Upper limit, inside the range of `x`.

    Returns:
        [points]; straight lines in log x between points, so the area under them over the width.
    """
    at = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    weights = np.stack([np.interp(np.log(at), np.log(x), unit) for unit in np.eye(len(x))], axis=-1)
    steps = np.diff(np.log(at))
    return ((weights[1:] + weights[:-1]) / 2 * steps[:, None]).sum(0) / steps.sum()


def areas(rows: Iterable[Scored], place: Place) -> list[Area]:
    """Average every curve of one place that reaches from one end of `AREA` to the other."""
    found = {key[1:]: of_gate for key, of_gate in _by_gate(rows).items() if key[0] == place}
    every = sorted(set.intersection(*map(set, found.values())))
    dense = _curve([found["open", ""]], every)
    listed = []
    for family in dict.fromkeys(family for family, _ in found if family not in ("open", "closed", "stock")):
        x, right, losses = _curve([of_gate for (name, _), of_gate in found.items() if name == family], every)
        lost = rise = None
        # A tenth beyond an end counts as reaching it: thresholds hit their fraction nearly.
        if len(x) > 2 and x[0] <= AREA[0] * 1.1 and x[-1] >= AREA[1] * 0.9:
            mean = 100 * weights_over_log(x, max(AREA[0], x[0]), min(AREA[1], x[-1]))
            below, above, base = dense[1] - right, losses - dense[2], dense[2][:, 0]
            lost = bootstrap(below, lambda w, mean=mean, below=below: w @ below @ mean)
            rise = bootstrap(above, lambda w, mean=mean, above=above, base=base: w @ above @ mean / (w @ base))
        listed.append(Area(family, lost, rise, (float(x[0]), float(x[-1]))))
    return sorted(listed, key=lambda one: one.lost.value if one.lost else np.inf)


def _curve(gates: Sequence[dict[int, Scored]], documents: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return open fractions, ascending, [points], exact match and text loss, [documents, points], of some gates."""
    rows = [[of_gate[i] for i in documents] for of_gate in gates]
    opened, pairs = np.moveaxis(np.array([[row.counts[:2] for row in of_gate] for of_gate in rows]).sum(1), -1, 0)
    right = [[sum(row.right.values()) / sum(row.asked.values()) for row in of_gate] for of_gate in rows]
    losses = [[row.loss for row in of_gate] for of_gate in rows]
    order = (opened / pairs).argsort(kind="stable")
    return (opened / pairs)[order], np.array(right)[order].T, np.array(losses)[order].T
