"""From scored documents to one summary for each gate and place, with intervals; paired with dense attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from context import Answered
from page import STYLES, label
from studies.gates.grid import Place, Scored

from patchattn.evaluation.statistics import Interval, bootstrap, ratio_of_sums

AREA = (0.05, 0.30)
"""Open fractions that curves are averaged between."""

FAMILIES = ("stock", "open", "closed", *STYLES)


@dataclass(frozen=True)
class Summary(Answered):
    """One gate in one place beside dense attention on the same documents; intervals by bootstrap over documents.

    `lost` is exact match below dense attention, in points, `rise` text loss above it, as a fraction; `loss` is in nats
    per token. Open fraction and density are NaN for the stock model. Where only one kind of question is counted, the
    place names it.
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
    def points(self) -> Interval:
        """Exact match above dense attention, in points."""
        return Interval(-self.lost.value, -self.lost.high, -self.lost.low)

    @property
    def rise_in_percent(self) -> Interval:
        """Text loss above dense attention."""
        return Interval(*(100 * end for end in self.rise))

    @property
    def meets_goals(self) -> bool:
        """Whether it is within one point and two percent of dense attention."""
        return self.lost.value <= 1 and self.rise.value <= 0.02

    def columns(self) -> dict[str, Any]:
        """Columns of the table that is saved."""
        names = (
            "kinds,length,window,gate,setting,documents,open_fraction,realised_density,right,asked,exact,exact_low,"
            "exact_high,points_below_dense,points_low,points_high,text_loss,loss_rise,rise_low,rise_high"
        )
        about = (*self.place, self.name, self.setting, self.documents, self.open_fraction, self.density)
        answers = (self.right, self.asked, *self.facts, *self.lost, self.loss, *self.rise)
        return dict(zip(names.split(","), about + answers, strict=True))


def _by_gate(rows: Iterable[Scored]) -> dict[tuple[Place, str, str], dict[int, Scored]]:
    found: dict[tuple[Place, str, str], dict[int, Scored]] = {}
    for row in rows:
        found.setdefault((row.place, row.family, row.setting), {})[row.document] = row
    return found


def summaries(rows: Iterable[Scored], *, kind: str | None = None) -> list[Summary]:
    """Summarise gates by family, then open fraction; `kind` counts only the questions of one kind, as a place."""

    def count(answers: dict[str, int]) -> int:
        return answers[kind] if kind else sum(answers.values())

    found, listed = _by_gate(rows), []
    for (place, family, setting), of_gate in found.items():
        dense = found.get((place, "open", ""), {})
        both = [(of_gate[i], dense[i]) for i in sorted(of_gate.keys() & dense.keys())]
        if not both or (kind and kind not in both[0][0].asked):
            continue
        answers = np.array([(count(mine.right), count(mine.asked), count(theirs.right)) for mine, theirs in both])
        right, asked, right_dense = answers.T
        losses, dense_losses = np.array([(mine.loss, theirs.loss) for mine, theirs in both]).T
        opened, pairs, scored, causal = np.sum([mine.counts for mine, _ in both], axis=0)
        listed.append(
            Summary(
                place=(kind or place[0], *place[1:]),
                family=family,
                setting=setting,
                documents=len(both),
                open_fraction=opened / pairs if pairs else np.nan,
                density=scored / causal if causal else np.nan,
                right=right.sum(),
                asked=asked.sum(),
                lost=ratio_of_sums(100 * (right_dense - right), asked),
                loss=losses.mean(),
                rise=ratio_of_sums(losses - dense_losses, dense_losses),
            )
        )
    return sorted(listed, key=lambda one: (FAMILIES.index(one.family), one.open_fraction, one.setting))


def weights_over_log(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weigh the points of a curve so that they sum to its average over the logarithm of `x`: its area over its width.

    Args:
        x: [points] ascending and positive; the curve is straight in log x between them.
        low: Lower limit, inside the range of `x`.
        high: Upper limit, inside the range of `x`.
    """
    at = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    weights = np.stack([np.interp(np.log(at), np.log(x), unit) for unit in np.eye(len(x))], axis=-1)
    steps = np.diff(np.log(at))
    return ((weights[1:] + weights[:-1]) / 2 * steps[:, None]).sum(0) / steps.sum()


def areas(rows: Iterable[Scored], place: Place) -> list[dict[str, Any]]:
    """Average every curve of one place that reaches from one end of `AREA` to the other, the best answers first.

    `lost` is in points below dense attention, `rise` in percent above it, `span` the open fractions that were measured.
    """
    found = {key[1:]: of_gate for key, of_gate in _by_gate(rows).items() if key[0] == place}
    every = sorted(set.intersection(*map(set, found.values())))

    def curve(family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Open fractions, ascending, [points]; exact match and text loss, [documents, points]."""
        gates = [[of_gate[i] for i in every] for (name, _), of_gate in found.items() if name == family]
        counts = np.array([[row.counts for row in gate] for gate in gates]).sum(1)
        right = np.array([[sum(row.right.values()) / sum(row.asked.values()) for row in gate] for gate in gates])
        losses = np.array([[row.loss for row in gate] for gate in gates])
        x = counts[:, 0] / counts[:, 1]
        order = x.argsort(kind="stable")
        return x[order], right[order].T, losses[order].T

    _, dense_right, dense_losses = curve("open")
    listed = []
    for family in dict.fromkeys(family for family, _ in found if family not in ("open", "closed", "stock")):
        x, right, losses = curve(family)
        lost = rise = None
        # A tenth beyond an end counts as reaching it: thresholds hit their fraction nearly.
        if len(x) > 2 and x[0] <= AREA[0] * 1.1 and x[-1] >= AREA[1] * 0.9:
            weights = 100 * weights_over_log(x, max(AREA[0], x[0]), min(AREA[1], x[-1]))
            below, above = (dense_right - right) @ weights, (losses - dense_losses) @ weights
            lost = bootstrap(below, lambda w, below=below: w @ below)
            rise = bootstrap(above, lambda w, above=above: w @ above / (w @ dense_losses[:, 0]))
        listed.append({"name": label(family), "lost": lost, "rise": rise, "span": (x[0], x[-1])})
    return sorted(listed, key=lambda one: one["lost"].value if one["lost"] else np.inf)
