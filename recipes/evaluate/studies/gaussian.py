"""How good is the Gaussian estimate of the bulk mass, head by head, and what do the worst heads have in common?"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from context import LENGTH, TASKS, Context, Measurement, document, read_densely
from matplotlib.figure import Figure
from page import BLUE, ORANGE, RED, Page, filled, tidy
from recorded import DEFAULT, MARGINS, PLACE, THRESHOLDS, Recorded, by_head, mean_and_deviation, recorded, spearman
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.moments.gaussian import CHUNK, KeyMoments

SAMPLED_DOCUMENTS = 4
QUERIES_PER_CHUNK = 3
GRID = torch.arange(-8, 60.01, 0.1)
"""Whitened scores that are counted between."""

FEATURES = (
    "layer", "bulk_share", "bulk_share_answering", "top_share", "top_share_answering", "largest", "skewness",
    "kurtosis", "frozen",
)  # fmt: skip
OUTCOMES = ("rank_saturating", "spread_saturating", "bias_saturating", "recall")

WORST = 6
_COLOURS = {"best": BLUE, "median": ORANGE, "worst": RED}


@dataclass
class Whitened:
    """Scores of sampled queries of one document, whitened by the mean and variance that the moments predict.

    Args:
        document: Its number.
        counts: [layers][heads][grid] whitened scores up to each edge of the grid and beyond the last.
        moments: [layers][heads] skewness and excess kurtosis of a query's bulk scores, its largest whitened score, and
            the share of queries above the freezing point, all means over queries.
    """

    document: int
    counts: list[Any]
    moments: list[Any]


def _whiten(_: Context, index: int) -> Whitened:
    rng = random.Random(f"gaussian/{index}")
    counts, moments = [], []

    def visit(_: int, inputs: AttentionInputs) -> None:
        counted, shapes = torch.zeros(inputs.query.shape[1], len(GRID) + 1, dtype=torch.long), []
        for whitened, variance in _samples(inputs, rng):
            at = torch.bucketize(whitened, GRID).flatten(1)
            counted.scatter_add_(1, at, torch.ones_like(at))
            own = (whitened - whitened.mean(-1, keepdim=True)) / whitened.std(-1, keepdim=True, correction=0)
            frozen = variance > 2 * math.log(whitened.shape[-1])
            shape = [own.pow(3).mean(-1), own.pow(4).mean(-1) - 3, whitened.amax(-1), frozen]
            shapes.append(torch.stack([part.double() for part in shape], dim=-1))
        counts.append(counted.tolist())
        moments.append(torch.cat(shapes, dim=1).mean(1).tolist())

    read_densely([document("facts", LENGTH, f"gaussian/{index}")], visit)
    return Whitened(index, counts, moments)


def _samples(inputs: AttentionInputs, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield whitened bulk scores [heads, rows, keys] and predicted variance [heads, rows] of sampled queries."""
    sink, window, length = inputs.regions.sink_size, inputs.regions.window_size, inputs.query.shape[2]
    first = sink + window - 1
    for chunks in range(1, (length - first) // CHUNK):
        rows = sorted(rng.sample(range(first + CHUNK * chunks, first + CHUNK * (chunks + 1)), QUERIES_PER_CHUNK))
        # The keys that are bulk for the first of the rows, so that all have as many.
        bulk = inputs.key[0, :, sink : rows[0] + 1 - window].float()
        covered = KeyMoments.of(inputs.key[0, :, sink : sink + CHUNK * chunks])
        query = inputs.query[0, :, rows].float().unflatten(0, (len(bulk), -1)) * inputs.scale
        scores = torch.einsum("hgrd,hkd->hgrk", query, bulk)
        mean = torch.einsum("hgrd,hd->hgr", query, covered.mean)[..., None]
        variance = torch.einsum("hgrd,hde,hgre->hgr", query, covered.covariance, query)[..., None]
        yield ((scores - mean) / variance.clamp(min=1e-12).sqrt()).flatten(0, 1), variance.flatten(0, 1)[..., 0]


WHITENED = Measurement(
    "whitened", Whitened, ("document",), lambda _: [(index,) for index in range(SAMPLED_DOCUMENTS)], _whiten
)
MEASURED = (MARGINS, WHITENED)


def per_head(place: Recorded, moments: np.ndarray) -> list[dict[str, Any]]:
    """Join what was recorded and sampled, one row for each head.

    Args:
        place: What was recorded.
        moments: [layers, heads, 4] means of `Whitened.moments`.
    """
    columns: dict[str, np.ndarray] = {}
    for short in ("saturating", "guarded"):
        errors = place.array("errors", f"prompt/{short}").sum((0, 3))
        columns[f"bias_{short}"], columns[f"spread_{short}"] = mean_and_deviation(errors)
        columns[f"rank_{short}"] = np.nanmean(place.array("ranks", f"prompt/{short}"), axis=0)
    answer, at = TASKS.index("answer"), THRESHOLDS.index(DEFAULT) + 1
    n_answers, off, _ = np.moveaxis(place.array("errors", "prompt/saturating").sum(0)[:, :, answer], -1, 0)
    pairs = place.array("pairs", "prompt/guarded").sum((0, 3))  # [layers, heads, oracle bins, gate bins]
    needed, found = pairs[:, :, :at].sum((2, 3)), pairs[:, :, :at, :at].sum((2, 3))
    columns["bias_answering"] = off / n_answers
    columns["recall"] = np.divide(found, needed, out=np.full_like(found, np.nan), where=needed > 0)
    columns["oracle_open"] = needed / pairs.sum((2, 3))
    asked, _, _, top, bulk = np.moveaxis(place.array("of_task").sum(0), -1, 0)  # [layers, heads, tasks] each
    columns["top_share"], columns["bulk_share"] = (share.sum(-1) / asked.sum(-1) for share in (top, bulk))
    columns["bulk_share_answering"] = bulk[..., answer] / asked[..., answer]
    columns["top_share_answering"] = top[..., answer] / asked[..., answer]
    columns |= dict(zip(("skewness", "kurtosis", "largest", "frozen"), np.moveaxis(moments, -1, 0), strict=True))
    return by_head(columns)


def correlation(heads: list[dict[str, Any]], feature: str, certain: float) -> str:
    """Write how a property of heads goes with their errors, in bold beyond what is `certain`."""
    pairs = ([[head[name] for head in heads] for name in (feature, outcome)] for outcome in OUTCOMES)
    values = [spearman(*pair) for pair in pairs]
    return " | ".join(f"**{value:+.2f}**" if abs(value) > certain else f"{value:+.2f}" for value in values)


def means(heads: list[dict[str, Any]]) -> str:
    """Write the means of the properties of some heads."""
    return " | ".join(f"{np.mean([head[feature] for head in heads]):.2f}" for feature in FEATURES)


def page(context: Context) -> Page:
    """Show what the worst heads have in common, and every head."""
    place, samples = recorded(context)[PLACE], WHITENED.rows(context)
    heads = per_head(place, np.mean([sample.moments for sample in samples], axis=0))
    ordered = sorted(heads, key=lambda head: head["rank_saturating"])
    chosen = {"best": ordered[-1], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[0]}
    ranks = [head["rank_saturating"] for head in ordered]
    half = 1.96 / math.sqrt(len(heads) - 3)
    looking_up = {f"{h['layer']}.{h['head']}": h["bias_answering"] for h in heads if h["bulk_share_answering"] > 0.9}
    off = sorted(looking_up.values())
    markdown = filled(
        globals(),
        documents=len(place.documents),
        heads=heads,
        n_heads=len(heads),
        median=np.median(ranks),
        ranks=ranks,
        highest=ranks[-1],
        guarded=np.nanmedian([head["rank_guarded"] for head in heads]),
        chosen=", ".join(f"{name} {head['layer']}.{head['head']}" for name, head in chosen.items()),
        half=half,
        correlation={feature: correlation(heads, feature, half) for feature in FEATURES},
        worst=means(ordered[:WORST]),
        others=means(ordered[WORST:]),
        answering=", ".join(f"{head} {bias:+.1f}" for head, bias in looking_up.items()),
        n_answering=len(off),
        off=(np.mean(off), off[0], off[-1]),
    )
    counts = np.sum([sample.counts for sample in samples], axis=0)
    curves = {name: quantiles(counts[head["layer"], head["head"]]) for name, head in chosen.items()}
    return Page(markdown, draw(heads, chosen, curves), {"gaussian": heads})


SHARES = np.linspace(0.0005, 0.9995, 4000)
"""Shares of the scores that QQ plots show."""


def quantiles(counts: np.ndarray) -> np.ndarray:
    """Read the quantiles for `SHARES` off the counts of a head's whitened scores."""
    below = np.cumsum(counts.astype(float))[:-1]
    return np.interp(SHARES, below / (below[-1] or 1), GRID.numpy())


def draw(heads: list[dict[str, Any]], chosen: dict[str, dict[str, Any]], curves: dict[str, np.ndarray]) -> Figure:
    """Draw QQ plots of three heads, and every head's rank correlation against its top key's share."""
    figure = Figure(figsize=(14, 4.4), dpi=120, layout="constrained")
    axes: Any = figure.subplots(1, 4)
    scatter = axes[3]
    expected = [NormalDist().inv_cdf(share) for share in SHARES]
    highest = max(5.0, *(float(curve[-1]) + 1 for curve in curves.values()))
    every = [[head[name] for head in heads] for name in ("top_share", "rank_saturating")]
    scatter.scatter(*every, c="lightgrey", edgecolors="dimgrey")
    for (name, head), one in zip(chosen.items(), axes, strict=False):
        place, rank = f"{head['layer']}.{head['head']}", head["rank_saturating"]
        one.plot([-4, 4], [-4, 4], color="grey", lw=1)
        one.plot(expected, curves[name], color=_COLOURS[name], lw=2.2)
        one.set_title(f"{name}: layer {head['layer']}, head {head['head']}\nrank correlation {rank:.2f}", fontsize=10)
        one.set(xlabel="standard normal quantile", ylim=(-6, highest))
        one.text(-3.9, -2.6, "Gaussian", color="dimgrey", fontsize=8)
        at = (head["top_share"], rank)
        scatter.scatter(*at, color=_COLOURS[name], zorder=3)
        scatter.annotate(f"{name} {place}", at, (5, 4), textcoords="offset points", fontsize=8)
    axes[0].set(ylabel="whitened score")
    scatter.set(xlabel="share of the bulk mass on its top key", ylabel="rank correlation of the margin")
    scatter.set_title("every head", fontsize=10)
    for one in axes:
        tidy(one)
    return figure
