"""Which layers and heads close, how much they swing with the query, and how that depends on length and window."""

from __future__ import annotations

from typing import Any

import numpy as np
from context import LENGTHS, TASKS, WINDOWS, Context
from matplotlib.figure import Figure
from page import BLACK, BLUE, GREEN, ORANGE, RED, SKY, Page, filled, tidy
from recorded import DEFAULT, MARGINS, PLACE, THRESHOLDS, Recorded, by_head, by_window, mean_and_deviation, recorded

MEASURED = (MARGINS,)

GATES = {"oracle": "oracle", "default": "prompt/guarded"}

SWINGS = (0.1, 0.9)
"""A head swings where its open fraction lies between these: neither always local nor always long."""


def open_fractions(pairs: np.ndarray) -> np.ndarray:
    """Open fraction by task from pairs [..., tasks, bins], [..., tasks + 1]; the last entry is over all queries."""
    pairs = np.concatenate([pairs, pairs.sum(-2, keepdims=True)], axis=-2)
    return pairs[..., : THRESHOLDS.index(DEFAULT) + 1].sum(-1) / pairs.sum(-1)


def per_head(place: Recorded) -> list[dict[str, Any]]:
    """List for each head open fractions by task, the variance of its decisions, 0.25 at most, and of its margin.

    `variance_between_tasks` is the part of the variance p (1 - p) over queries that lies between tasks; `margin_sd` is
    the standard deviation of the exact margin over queries, in nats.
    """
    columns: dict[str, np.ndarray] = {}
    for gate, name in GATES.items():
        pairs = place.pairs(name).sum((0, -2))  # [layers, heads, tasks, bins]
        fractions = open_fractions(pairs)
        mean = fractions[..., -1]
        columns |= {f"{gate}_{task.replace(' ', '_')}": fractions[..., at] for at, task in enumerate((*TASKS, "all"))}
        columns[f"{gate}_variance"] = mean * (1 - mean)
        weight = pairs.sum(-1) / pairs.sum((-1, -2))[..., None]
        columns[f"{gate}_variance_between_tasks"] = (weight * (fractions[..., :-1] - mean[..., None]) ** 2).sum(-1)
    columns["margin_sd"] = mean_and_deviation(place.array("of_task").sum((0, 3))[..., :3])[1]
    return by_head(columns)


def page(context: Context) -> Page:
    """Show heads by layer and task, one by one, and by length and window."""
    found = recorded(context)
    place, heads = found[PLACE], per_head(found[PLACE])

    def layer(name: str, layers: slice) -> list[dict[str, Any]]:
        pairs = {gate: place.pairs(other)[:, layers].sum((0, 1, 2, -2)) for gate, other in GATES.items()}
        return [{"layer": name, "gate": gate, "open": open_fractions(of_gate)} for gate, of_gate in pairs.items()]

    sums = {name: sum(head[name] for head in heads) for name in heads[0]}
    markdown = filled(
        globals(),
        documents=len(place.documents),
        heads=heads,
        n_heads=len(heads),
        swinging={gate: sum(SWINGS[0] < head[f"{gate}_all"] < SWINGS[1] for head in heads) for gate in GATES},
        between={gate: sums[f"{gate}_variance_between_tasks"] / sums[f"{gate}_variance"] for gate in GATES},
        layers=[row for at in range(place.layers) for row in layer(str(at), slice(at, at + 1))],
        all_layers=layer("**all**", slice(None)),
        places=[
            {"length": length, "gate": name, "at": by_window(found, length, gate)}
            for length in LENGTHS
            for name, gate in (*GATES.items(), ("saturating", "prompt/saturating"))
        ],
    )
    return Page(markdown, draw(found, heads), {"heads": heads})


def draw(found: dict[tuple[int, int], Recorded], heads: list[dict[str, Any]]) -> Figure:
    """Draw heads by task above, heat maps and lengths below."""
    figure = Figure(figsize=(13, 8), dpi=120, layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    dots: Any = upper.subplots(2, 1, sharex=True)
    ordered = sorted(heads, key=lambda head: -head["oracle_all"])
    x = range(len(ordered))
    for axes, gate in zip(dots, GATES, strict=True):
        tasks = [[100 * head[f"{gate}_{task.replace(' ', '_')}"] for head in ordered] for task in TASKS]
        axes.vlines(x, np.min(tasks, axis=0), np.max(tasks, axis=0), color="lightgrey", lw=3, zorder=0)
        for name, y, colour, marker in zip(TASKS, tasks, (BLACK, ORANGE, GREEN, RED), "osD^", strict=True):
            axes.scatter(x, y, color=colour, s=26, marker=marker, label=name)
        axes.set_xticks(x, [f"{head['layer']}.{head['head']}" for head in ordered], fontsize=8)
        axes.set(ylabel=f"{gate}:\nopen, %", xlim=(-0.7, len(ordered) - 0.3), ylim=(-4, 104))
        tidy(axes, grid="y")
    dots[1].set(xlabel="layer.head, the one that the oracle opens most often first")
    dots[0].legend(ncols=4, frameon=False, loc="lower right", bbox_to_anchor=(1, 1.0))
    maps: Any = lower.subplots(1, 3, width_ratios=(1, 1, 1.25))
    n_layers = found[PLACE].layers
    for axes, gate in zip(maps, GATES, strict=False):
        values = np.array([100 * head[f"{gate}_all"] for head in heads]).reshape(n_layers, -1)
        axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (layer, head), value in np.ndenumerate(values):
            axes.text(head, layer, f"{value:.0f}", ha="center", va="center", color="w" if value < 55 else "k")
        axes.set_title(f"{gate}: open pairs, %", fontsize=10)
        axes.set(xlabel="query head", xticks=range(values.shape[1]), yticks=range(n_layers))
    maps[0].set(ylabel="layer")
    lengths = maps[2]
    for window, colour in zip(WINDOWS, (SKY, BLUE, BLACK), strict=True):
        for (name, gate), line in zip(GATES.items(), ("--", "-"), strict=True):
            y = [100 * by_window(found, length, gate)[window].value("open") for length in LENGTHS]
            lengths.plot(LENGTHS, y, line, marker="o", ms=4, color=colour)
            style = {"textcoords": "offset points", "color": colour, "fontsize": 9}
            lengths.annotate(f"{name}, {window}", (LENGTHS[-1], y[-1]), (6, -3), **style)
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    lengths.set(xlabel="tokens", xlim=(950, 7500), ylim=(0, None))
    lengths.set_title("open pairs, %, by gate and window", fontsize=10)
    tidy(lengths)
    return figure
