"""The page and the picture that `gaussian.py` makes of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pictures import BLUE, ORANGE, RED
from store import Row

FEATURES = {
    "layer": "layer",
    "bulk_share": "bulk share of the attention",
    "bulk_share_answering": "bulk share while answering",
    "top_share": "share of the bulk mass on its top key",
    "top_share_answering": "the same while answering",
    "largest": "largest whitened score",
    "skewness": "skewness of the scores",
    "kurtosis": "excess kurtosis of the scores",
    "frozen": "queries above the freezing point",
}
OUTCOMES = {
    "rank_saturating": "rank correlation",
    "spread_saturating": "spread",
    "bias_saturating": "bias",
    "recall": "recall at 0.6",
}
_WORST = 6
_COLOURS = {"best": BLUE, "median": ORANGE, "worst": RED}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman correlation over heads, those with a missing value left out."""
    both = np.array([pair for pair in zip(first, second, strict=True) if not any(map(math.isnan, pair))])
    ranks = both.argsort(0).argsort(0)
    return float(np.corrcoef(ranks.T)[0, 1])


def page(heads: list[Row], chosen: dict[str, Row], documents: int) -> str:
    """Write the page."""
    ordered = sorted(heads, key=lambda row: row["rank_saturating"])
    ranks = [row["rank_saturating"] for row in heads]
    half = 1.96 / math.sqrt(len(heads) - 3)
    names = ", ".join(f"{name} {row['layer']}.{row['head']}" for name, row in chosen.items())
    look_up = [row for row in heads if row["bulk_share_answering"] > 0.9]
    parts = [
        "# The Gaussian estimate, head by head",
        "",
        f"{documents} documents of 4,096 tokens with facts, sink 16, window 256, dense activations of the shipped "
        "model in float32, moments of the prompt. *Bias* and *spread* are the mean and the standard deviation of "
        "estimated minus exact log mass of the bulk keys, in nats, of the saturating estimate, which has a value for "
        "every pair once a chunk is full; *guarded* is the same over the pairs below the freezing point, where all "
        "estimates agree. *Rank* is the Spearman correlation of estimated and exact margin over the queries of a "
        "document, mean over documents. Made by `python recipes/evaluate/gaussian.py`; more digits and columns are in "
        "[gaussian.csv](gaussian.csv).",
        "",
        f"Over {len(heads)} heads the rank correlation of the margin is {np.median(ranks):.2f} in the median, "
        f"{min(ranks):.2f} to {max(ranks):.2f}; below the freezing point "
        f"{np.nanmedian([row['rank_guarded'] for row in heads]):.2f}.",
        "",
        "![QQ plots and errors of the heads](gaussian.png)",
        "",
        f"QQ plots ({names}): bulk scores of sampled queries less the predicted mean, over the predicted standard "
        "deviation. A Gaussian lies on the line; what lies above it on the right are keys that match their query "
        "better than the moments allow for.",
        "",
        "## What the worst heads have in common",
        "",
        f"Spearman correlation over the {len(heads)} heads; 95% intervals are about +-{half:.2f} wide around 0, so "
        "only larger values, in bold, mean something.",
        "",
        "| property of the head | " + " | ".join(f"with {name}" for name in OUTCOMES.values()) + " |",
        "|---|" + "---|" * len(OUTCOMES),
    ]
    for feature, label in FEATURES.items():
        values = [rank_correlation([row[feature] for row in heads], [row[o] for row in heads]) for o in OUTCOMES]
        cells = [f"**{value:+.2f}**" if abs(value) > half else f"{value:+.2f}" for value in values]
        parts.append(f"| {label} | " + " | ".join(cells) + " |")
    parts += [
        "",
        f"| mean over | {' | '.join(FEATURES.values())} |",
        "|---|" + "---|" * len(FEATURES),
        _means(f"the {_WORST} heads with the lowest rank correlation", ordered[:_WORST]),
        _means("the other heads", ordered[_WORST:]),
        "",
        f"While answering, {len(look_up)} of {len(heads)} heads have more than 90% of their attention on bulk keys"
        + (
            f"; there the saturating estimate is off by {np.mean([r['bias_answering'] for r in look_up]):+.1f} nats on "
            f"average, from {min(r['bias_answering'] for r in look_up):+.1f} to "
            f"{max(r['bias_answering'] for r in look_up):+.1f}: "
            + ", ".join(f"{r['layer']}.{r['head']} {r['bias_answering']:+.1f}" for r in look_up)
            if look_up
            else ""
        )
        + ".",
        "",
        "## Every head",
        "",
        "| layer.head | bias | spread | rank | bias, guarded | spread, guarded | rank, guarded | bias answering | "
        "recall at 0.6 | oracle opens | bulk share, answering | top key's share | largest z | frozen |",
        "|---|" + "---|" * 13,
    ]
    for row in heads:
        recall = "" if math.isnan(row["recall"]) else f"{row['recall']:.2f}"
        parts.append(
            f"| {row['layer']}.{row['head']} | {row['bias_saturating']:+.2f} | {row['spread_saturating']:.2f} | "
            f"{row['rank_saturating']:.2f} | {row['bias_guarded']:+.2f} | {row['spread_guarded']:.2f} | "
            f"{row['rank_guarded']:.2f} | {row['bias_answering']:+.2f} | {recall} | {row['oracle_open']:.1%} | "
            f"{row['bulk_share_answering']:.0%} | {row['top_share']:.0%} | {row['largest']:.1f} | {row['frozen']:.0%} |"
        )
    return "\n".join([*parts, ""])


def _means(label: str, heads: list[Row]) -> str:
    return f"| {label} | " + " | ".join(f"{np.mean([row[name] for row in heads]):.2f}" for name in FEATURES) + " |"


def draw(
    heads: list[Row], chosen: dict[str, Row], shares: np.ndarray, curves: dict[str, np.ndarray], path: Path
) -> None:
    """Draw QQ plots of three heads, and every head's rank correlation against its top key's share."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes: Any = figure.subplots(1, 4)
    expected = [NormalDist().inv_cdf(share) for share in shares]
    highest = max(5.0, *(float(curve[-1]) + 1 for curve in curves.values()))
    for (name, row), one in zip(chosen.items(), axes, strict=False):
        one.plot([-4, 4], [-4, 4], color="grey", lw=1)
        one.plot(expected, curves[name], color=_COLOURS[name], lw=2.2)
        one.set_title(
            f"{name}: layer {row['layer']}, head {row['head']}\nrank correlation {row['rank_saturating']:.2f}",
            fontsize=10,
        )
        one.set_ylim(-6, highest)
        one.set_xlabel("standard normal quantile")
        one.text(-3.9, -2.6, "Gaussian", color="dimgrey", fontsize=8)
    axes[0].set_ylabel("whitened score")
    scatter = axes[3]
    scatter.scatter(
        [row["top_share"] for row in heads],
        [row["rank_saturating"] for row in heads],
        c="lightgrey",
        edgecolors="dimgrey",
    )
    for name, row in chosen.items():
        scatter.scatter(row["top_share"], row["rank_saturating"], color=_COLOURS[name], zorder=3)
        scatter.annotate(
            f"{name} {row['layer']}.{row['head']}", (row["top_share"], row["rank_saturating"]), (5, 4),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    scatter.set_xlabel("share of the bulk mass on its top key")
    scatter.set_ylabel("rank correlation of the margin")
    scatter.set_title("every head", fontsize=10)
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
