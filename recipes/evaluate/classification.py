"""How often does the moment gate decide like the exact mass would? Per layer and threshold, on the shipped model.

python recipes/evaluate/classification.py --out docs/results/classification
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parent)]

from intervals import Interval, bootstrap
from pictures import STYLES, open_axis
from recording import DOCUMENTS, THRESHOLDS, recorded
from shipped import LENGTHS, WINDOWS, command_line
from store import Row
from summary import LABELS

SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9)
PLACE = (4096, 256)
DEFAULT = 0.6
GOAL = 0.95

SHARES = {
    "open": ((0, 1), (0, 1, 2, 3)),
    "oracle open": ((0, 2), (0, 1, 2, 3)),
    "accuracy": ((0, 3), (0, 1, 2, 3)),
    "recall": ((0,), (0, 2)),
    "precision": ((0,), (0, 1)),
    "false negatives": ((2,), (0, 2)),
    "false positives": ((1,), (1, 3)),
}
"""Measures as shares of some cells of `Confusion.counts` in others."""

_ANSWERING = """Most pairs belong to plain text, where a miss costs little. These are the queries that predict the
tokens of an answer, in all layers; a look-up that is missed here is a wrong answer."""


@dataclass(frozen=True)
class Confusion:
    """How a gate's decisions compare with the oracle's, over some documents and heads.

    Args:
        counts: [documents, 4] pairs: both open, only the gate, only the oracle, both closed.
        missed: [documents] sum of the bulk shares of the pairs that the gate closes.
    """

    counts: np.ndarray
    missed: np.ndarray

    def share(self, top: Sequence[int], bottom: Sequence[int]) -> Interval:
        """Share of some cells in others, bootstrap over documents."""
        above, below = self.counts[:, list(top)].sum(1), self.counts[:, list(bottom)].sum(1)
        return bootstrap(self.counts, lambda w: (w @ above) / np.maximum(w @ below, 1e-12))

    def value(self, top: Sequence[int], bottom: Sequence[int]) -> float:
        """Share of some cells in others, without an interval."""
        total = self.counts.sum(0)
        return float(total[list(top)].sum() / max(total[list(bottom)].sum(), 1e-12))

    @property
    def open_fraction(self) -> float:
        """Pairs that the gate opens."""
        return self.value((0, 1), (0, 1, 2, 3))

    @property
    def recall(self) -> float:
        """Of the pairs that the oracle opens, those that the gate opens."""
        return self.value((0,), (0, 2))

    @property
    def missed_mass(self) -> float:
        """Mean over pairs of the bulk share that closed heads do not read."""
        return float(self.missed.sum() / self.counts.sum())

    @property
    def measures(self) -> dict[str, Interval]:
        """Every measure by name, with intervals."""
        pairs = self.counts.sum(1)
        shares = {name: self.share(*cells) for name, cells in SHARES.items()}
        return shares | {"missed mass": bootstrap(self.counts, lambda w: (w @ self.missed) / (w @ pairs))}


class Recorded:
    """The rows of one length and window as arrays.

    Args:
        rows: All rows.
        length: Tokens.
        window: Tokens.
    """

    def __init__(self, rows: list[Row], length: int, window: int) -> None:
        self.rows = sorted(
            (row for row in rows if (row["length"], row["window"]) == (length, window)), key=lambda row: row["document"]
        )
        self.layers = len(self.rows[0]["layers"])
        self.estimates = tuple(self.rows[0]["layers"][0]["joint"])

    @cache  # noqa: B019 - lives as long as the rows
    def array(self, *names: str) -> np.ndarray:
        """Stack one entry over documents and layers, [documents, layers, heads, ...]."""
        picked = []
        for row in self.rows:
            of_document = []
            for layer in row["layers"]:
                entry: Any = layer
                for name in names:
                    entry = entry[name]
                of_document.append(entry)
            picked.append(of_document)
        return np.array(picked, dtype=float)

    def confusion(
        self,
        estimate: str,
        threshold: float,
        *,
        layer: int | None = None,
        oracle: float | None = None,
        answering: bool = False,
    ) -> Confusion:
        """Compare a gate with the oracle, at the same threshold unless `oracle` names another.

        `answering` looks at the queries that predict answers only, for which the missed mass is not known.
        """
        gate_at, oracle_at = THRESHOLDS.index(threshold), THRESHOLDS.index(oracle or threshold)
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        if answering:
            joint = self.array("joint_answering", estimate)[:, layers].sum(1)  # [documents, oracle bins, gate bins]
            missed = np.full(len(joint), np.nan)
        else:
            joint = self.array("joint", estimate)[:, layers].sum((1, 2))
            missed = self.array("missed", estimate)[:, layers].sum((1, 2))[:, gate_at + 1 :].sum(-1)
        # A pair opens at a threshold where no more than the thresholds below it close it.
        opened = [joint[:, : oracle_at + 1], joint[:, oracle_at + 1 :]]
        cells = [part[:, :, columns].sum((1, 2)) for part in opened for columns in _columns(gate_at)]
        both, only_oracle, only_gate, neither = cells
        return Confusion(np.stack([both, only_gate, only_oracle, neither], axis=1), missed)

    def oracle(self, threshold: float) -> Confusion:
        """The oracle against itself: what it misses."""
        at = THRESHOLDS.index(threshold)
        joint = self.array("joint", self.estimates[0]).sum((1, 2, 4))  # [documents, oracle bins]
        zeros = np.zeros(len(joint))
        counts = np.stack([joint[:, : at + 1].sum(1), zeros, zeros, joint[:, at + 1 :].sum(1)], axis=1)
        return Confusion(counts, self.array("missed", "oracle").sum((1, 2))[:, at + 1 :].sum(-1))


def _columns(gate_at: int) -> tuple[slice, slice]:
    return slice(None, gate_at + 1), slice(gate_at + 1, None)


def write_csv(found: dict[tuple[int, int], Recorded], path: Path) -> None:
    """Write every measure of every estimate, layer and threshold, at all lengths and windows."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        header = ["length", "window", "documents", "estimate", "threshold", "layer", *SHARES, "missed mass"]
        lines.writerow(name.replace(" ", "_") for name in [*header, "recall_low", "recall_high"])
        for (length, window), place in found.items():
            for estimate in place.estimates:
                for threshold in SHOWN:
                    for layer in (None, *range(place.layers)):
                        one = place.confusion(estimate, threshold, layer=layer)
                        recall = one.share(*SHARES["recall"])
                        numbers = [one.value(*cells) for cells in SHARES.values()]
                        numbers += [one.missed_mass, recall.low, recall.high]
                        about = [
                            length,
                            window,
                            len(place.rows),
                            estimate,
                            threshold,
                            "all" if layer is None else layer,
                        ]
                        lines.writerow([*about, *(f"{number:.5g}" for number in numbers)])


def line(label: str, confusion: Confusion) -> str:
    """Write one line of the table."""
    found = confusion.measures
    recall, missed = found["recall"], found["missed mass"]
    return (
        f"| {label} | {found['oracle open'].value:.1%} | {found['open'].value:.1%} | {found['accuracy'].value:.3f} | "
        f"{recall.value:.3f} ({recall.low:.3f}-{recall.high:.3f}) | {found['precision'].value:.3f} | "
        f"{found['false negatives'].value:.3f} | {found['false positives'].value:.3f} | "
        f"{missed.value:.2%} ({missed.low:.2%}-{missed.high:.2%}) |"
    )


def _head_of(label: str) -> str:
    names = "oracle opens | gate opens | accuracy | recall (95%) | precision | false negatives | false positives"
    return f"| {label} | {names} | missed mass (95%) |\n|---|---|---|---|---|---|---|---|---|"


def page(found: dict[tuple[int, int], Recorded]) -> str:
    """Write the page."""
    main = found[PLACE]
    measured = ", ".join(f"{DOCUMENTS[length]} of {length:,} tokens" for length in LENGTHS)
    default = main.confusion("prompt/guarded", DEFAULT).measures
    recall, missed = default["recall"], default["missed mass"]
    reached = next((t for t in THRESHOLDS if _recall(main, "prompt/guarded", t) >= GOAL), None)
    goal = (
        f"**Goal**: recall of the oracle's open pairs of at least {GOAL} at the default threshold, {DEFAULT} for both: "
        f"**{'met' if recall.value >= GOAL else 'missed'}**, {recall.value:.3f} ({recall.low:.3f}-{recall.high:.3f}). "
        f"The pairs that the default gate closes miss {missed.value:.2%} of their query's attention on average over "
        f"all pairs; the oracle misses {main.oracle(DEFAULT).measures['missed mass'].value:.2%}. "
        + (
            f"Against the oracle at {DEFAULT}, the guarded gate reaches {GOAL} from threshold {reached} on, with "
            f"{main.confusion('prompt/guarded', reached).measures['open'].value:.0%} open."
            if reached
            else f"No threshold up to {THRESHOLDS[-1]} reaches {GOAL}."
        )
    )
    parts = [
        "# The moment gate against the exact mass",
        "",
        f"Dense activations of the shipped model in float32, sink 16; documents with facts, other ones than those "
        f"that thresholds are chosen on: {measured}. A pair of (query head, query) is positive where the oracle, the "
        "exact local share under the threshold, opens it. *Missed mass* is the share of a query's attention that lies "
        "on keys its closed head does not read, averaged over all pairs. Intervals by bootstrap over documents. Made "
        "by `python recipes/evaluate/classification.py`; all estimates, layers, lengths and windows with their "
        "intervals are in [classification.csv](classification.csv).",
        "",
        goal,
        "",
        "![recall and missed mass against open fraction](classification.png)",
        "",
        "## Per layer: default gate at 4,096 tokens, window 256",
        "",
        "Gate and oracle at the same threshold.",
        "",
        _head_of("threshold, layer"),
    ]
    for threshold in SHOWN:
        parts.append(line(f"**{threshold}**, all", main.confusion("prompt/guarded", threshold)))
        parts += [
            line(f"{threshold}, {layer}", main.confusion("prompt/guarded", threshold, layer=layer))
            for layer in range(main.layers)
        ]
    parts += ["", f"## All estimates, threshold {DEFAULT}", "", _head_of("estimate")]
    parts += [line(LABELS[name], main.confusion(name, DEFAULT)) for name in main.estimates]
    parts += ["", f"## Recall of the oracle's pairs at {DEFAULT}, by the gate's own threshold", ""]
    parts.append("In each cell: recall / pairs that the gate opens.\n")
    parts.append("| estimate | " + " | ".join(map(str, THRESHOLDS)) + " |\n|---|" + "---|" * len(THRESHOLDS))
    for name in main.estimates:
        cells = [main.confusion(name, t, oracle=DEFAULT) for t in THRESHOLDS]
        written = [f"{cell.recall:.2f} / {cell.open_fraction:.0%}" for cell in cells]
        parts.append(f"| {LABELS[name]} | " + " | ".join(written) + " |")
    parts += ["", "## Answers only", "", _ANSWERING, ""]
    parts.append(
        "| estimate, threshold | oracle opens | gate opens | recall (95%) | precision | recall by layer |\n"
        "|---|---|---|---|---|---|"
    )
    for name in main.estimates:
        one = main.confusion(name, DEFAULT, answering=True)
        recall, shown = one.share(*SHARES["recall"]), ("oracle open", "open", "precision")
        oracle, opened, precision = (one.value(*SHARES[measure]) for measure in shown)
        layers = (main.confusion(name, DEFAULT, layer=layer, answering=True) for layer in range(main.layers))
        by_layer = " / ".join(f"{layer.recall:.2f}" for layer in layers)
        parts.append(
            f"| {LABELS[name]}, {DEFAULT} | {oracle:.1%} | {opened:.1%} | "
            f"{recall.value:.3f} ({recall.low:.3f}-{recall.high:.3f}) | {precision:.3f} | {by_layer} |"
        )
    parts += ["", f"## Lengths and windows, threshold {DEFAULT}", ""]
    parts.append("In each cell: recall / precision / missed mass.\n")
    parts.append("| tokens, estimate | " + " | ".join(f"window {w}" for w in WINDOWS) + " |\n|---|---|---|---|")
    for length in LENGTHS:
        for name in ("prompt/guarded", "prompt/saturating", "prompt/lognormal"):
            cells = [found[length, window].confusion(name, DEFAULT) for window in WINDOWS]
            written = [f"{c.recall:.3f} / {c.value((0,), (0, 1)):.3f} / {c.missed_mass:.2%}" for c in cells]
            parts.append(f"| {length:,}, {LABELS[name]} | " + " | ".join(written) + " |")
    return "\n".join([*parts, ""])


def _recall(place: Recorded, estimate: str, threshold: float) -> float:
    return place.confusion(estimate, threshold, oracle=DEFAULT).recall


def draw(place: Recorded, path: Path) -> None:
    """Draw recall and missed mass against open fraction, and recall of each layer."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    recall, missed, layers = axes
    for name in place.estimates:
        source, _ = name.split("/")
        colour, marker = STYLES[name]
        cells = [place.confusion(name, t, oracle=DEFAULT) for t in THRESHOLDS]
        x = [100 * cell.open_fraction for cell in cells]
        style = {"color": colour, "marker": marker, "ms": 4, "ls": "-" if source == "prompt" else ":"}
        recall.plot(x, [cell.recall for cell in cells], **style, label=LABELS[name].replace("moment, ", ""))
        missed.plot(x, [100 * cell.missed_mass for cell in cells], **style)
    oracle = [place.oracle(t) for t in THRESHOLDS]
    x = [100 * cell.open_fraction for cell in oracle]
    missed.plot(x, [100 * cell.missed_mass for cell in oracle], "k--o", ms=4)
    missed.annotate("oracle", (x[5], 100 * oracle[5].missed_mass), (-12, -14), textcoords="offset points", ha="right")
    recall.axhline(GOAL, color="grey", lw=0.8)
    recall.text(2.2, GOAL + 0.01, f"goal: {GOAL}", color="dimgrey", fontsize=9)
    recall.set_ylabel(f"recall of the oracle's open pairs at {DEFAULT}")
    missed.set_ylabel("missed mass, % of the attention")
    for one in (recall, missed):
        open_axis(one, low=2)
    recall.legend(frameon=False, fontsize=9, loc="center left")
    shades = ("#440154", "#3B528B", "#21918C", "#5EC962", "#D8B400")
    for layer in range(place.layers):
        y = [place.confusion("prompt/guarded", t, layer=layer).recall for t in THRESHOLDS]
        layers.plot(THRESHOLDS, y, "o-", ms=4, color=shades[layer % len(shades)], label=f"layer {layer}")
    layers.axhline(GOAL, color="grey", lw=0.8)
    layers.set_xlabel("threshold of gate and oracle")
    layers.set_ylabel("recall of each layer, default estimate")
    layers.grid(alpha=0.25)
    layers.spines[["top", "right"]].set_visible(False)
    layers.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure what is missing, then write table, page and picture."""
    arguments = command_line("classification", __doc__)
    rows = recorded(arguments.work, arguments.processes)
    found = {(length, window): Recorded(rows, length, window) for length in LENGTHS for window in WINDOWS}
    write_csv(found, arguments.out.with_suffix(".csv"))
    arguments.out.with_suffix(".md").write_text(page(found))
    draw(found[PLACE], arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
