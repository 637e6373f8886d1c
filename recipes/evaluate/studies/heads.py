"""Which layers and heads close, how much they swing with the query, and how that depends on length and window."""

from __future__ import annotations

from typing import Any

import numpy as np
from context import LENGTHS, TASKS, WINDOWS, Context
from matplotlib.figure import Figure
from page import BLACK, BLUE, GREEN, ORANGE, RED, SKY, Page, csv_link, made_by, tidy
from recorded import DEFAULT, MARGINS, PLACE, THRESHOLDS, Confusion, Recorded, recorded

from patchattn.evaluation.page import table, with_interval

MEASURED = (MARGINS,)

GATES = {"oracle": "oracle_by_task", "default": "guarded_by_task"}
SWINGS = (0.1, 0.9)
"""A head swings where its open fraction lies between these: neither always local nor always long."""

HEAD_COLUMNS = (
    "layer.head", "oracle", "default", "oracle: plain text", "oracle: answer", "default: plain text", "default: answer",
    "margin",
)  # fmt: skip

_AT = THRESHOLDS.index(DEFAULT) + 1
_TASK_COLOURS = (BLACK, ORANGE, GREEN, RED)


def open_fractions(place: Recorded, gate: str) -> np.ndarray:
    """Open fraction of each head by task, [layers, heads, tasks + 1]; the last entry is over all queries."""
    pairs = place.array(GATES[gate]).sum(0)  # [layers, heads, tasks, bins]
    opened, asked = pairs[..., :_AT].sum(-1), pairs.sum(-1)
    by_task = opened / asked
    return np.concatenate([by_task, (opened.sum(-1) / asked.sum(-1))[..., None]], axis=-1)


def swing(place: Recorded, gate: str) -> np.ndarray:
    """Split the variance of each head's decisions over queries, [layers, heads, 2].

    Returns:
        The variance p (1 - p), 0.25 at most, and the part of it that lies between tasks.
    """
    pairs = place.array(GATES[gate]).sum(0)
    weight = pairs.sum(-1) / pairs.sum((-1, -2))[..., None]
    fractions = open_fractions(place, gate)
    mean = fractions[..., -1]
    between = (weight * (fractions[..., :-1] - mean[..., None]) ** 2).sum(-1)
    return np.stack([mean * (1 - mean), between], axis=-1)


def margin_spread(place: Recorded) -> np.ndarray:
    """Standard deviation of each head's exact margin over queries, [layers, heads] nats."""
    count, total, squares = np.moveaxis(place.array("margin_by_task").sum((0, 3)), -1, 0)
    return np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))


def per_head(place: Recorded) -> list[dict[str, Any]]:
    """List what is known of each head; columns of the table that is saved."""
    spread = margin_spread(place)
    names = [task.replace(" ", "_") for task in (*TASKS, "all")] + ["variance", "variance_between_tasks"]
    found = {gate: np.concatenate([open_fractions(place, gate), swing(place, gate)], axis=-1) for gate in GATES}
    rows = []
    for layer, head in np.ndindex(spread.shape):
        row: dict[str, Any] = {"layer": layer, "head": head}
        for gate, values in found.items():
            row |= dict(zip((f"{gate}_{name}" for name in names), values[layer, head], strict=True))
        rows.append(row | {"margin_sd": spread[layer, head]})
    return rows


def by_task(place: Recorded, gate: str, layer: int | None = None) -> list[str]:
    """Write the open fraction over all tasks, then by task, of one layer or all."""
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    pairs = place.array(GATES[gate])[:, layers].sum((0, 1, 2))  # [tasks, bins]
    opened, asked = pairs[:, :_AT].sum(-1), pairs.sum(-1)
    return [f"{value:.1%}" for value in (opened.sum() / asked.sum(), *(opened / asked))]


def decisions(place: Recorded, gate: str) -> Confusion:
    """Take what one of the gates opens at the default threshold."""
    return place.oracle(DEFAULT) if gate == "oracle" else place.confusion(f"prompt/{gate}", DEFAULT)


def page(context: Context) -> Page:
    """Show heads by layer and task, one by one, and by length and window."""
    found = recorded(context)
    place, heads = found[PLACE], per_head(found[PLACE])
    swinging = {gate: sum(SWINGS[0] < head[f"{gate}_all"] < SWINGS[1] for head in heads) for gate in GATES}
    varied = {
        gate: sum(head[f"{gate}_variance_between_tasks"] for head in heads)
        / sum(head[f"{gate}_variance"] for head in heads)
        for gate in GATES
    }
    layers = [[str(layer), gate, *by_task(place, gate, layer)] for layer in range(place.layers) for gate in GATES] + [
        ["**all**", gate, *by_task(place, gate)] for gate in GATES
    ]
    one_by_one = [
        [
            f"{head['layer']}.{head['head']}",
            *(f"{head[f'{gate}_all']:.1%} ({head[f'{gate}_variance']:.3f})" for gate in GATES),
            *(f"{head[f'{gate}_{task}']:.1%}" for gate in GATES for task in ("plain_text", "answer")),
            f"{head['margin_sd']:.1f}",
        ]
        for head in heads
    ]
    places = [
        [f"{length:,}", label]
        + [with_interval(decisions(found[length, window], gate).interval("open"), ".1%") for window in WINDOWS]
        for length in LENGTHS
        for label, gate in (("oracle", "oracle"), ("default", "guarded"), ("saturating", "saturating"))
    ]
    markdown = f"""# Which heads open, and when

Dense activations of the shipped model in float32, sink 16, threshold {DEFAULT}; {len(place.documents)} documents of \
4,096 tokens, window 256, unless said otherwise. *Oracle* opens by the exact local share, *default* by the guarded \
estimate with moments of the prompt. {made_by("heads")}; every head is in {csv_link("heads")}.

Between {SWINGS[0]:.0%} and {SWINGS[1]:.0%} open, so swinging with the query: {swinging["oracle"]} of {len(heads)} \
heads by the oracle, {swinging["default"]} by the default gate. Of the variance of the decisions over queries, \
{varied["oracle"]:.0%} (oracle) and {varied["default"]:.0%} (default) lies between the four tasks, the rest within them.

![open fraction by head, by task, by length and window](heads.png)

## By layer and task

Open fraction of all heads. Tasks: plain text, a planted line being read, the text of a question, and the queries that \
predict an answer.

{table(["layer", "gate", "all", *TASKS], layers)}

## By head

Open fraction, and in brackets the variance of the decision over queries (0.25 is the most there can be). *Margin* is \
the standard deviation of the exact margin over queries, in nats.

{table(HEAD_COLUMNS, one_by_one)}

## By length and window

Open fraction (95% by bootstrap over documents).

{table(["tokens", "gate", *(f"window {window}" for window in WINDOWS)], places)}
"""
    return Page(markdown, draw(found), {"heads": heads})


def draw(found: dict[tuple[int, int], Recorded]) -> Figure:
    """Draw heads by task above, heat maps and lengths below."""
    place = found[PLACE]
    figure = Figure(figsize=(13, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    dots: Any = upper.subplots(2, 1, sharex=True)
    fractions = {gate: open_fractions(place, gate) for gate in GATES}
    layers, heads = fractions["oracle"].shape[:2]
    order = np.argsort(-fractions["oracle"][..., -1].flatten(), kind="stable")
    labels = [f"{index // heads}.{index % heads}" for index in order]
    for axes, (gate, values) in zip(dots, fractions.items(), strict=True):
        flat = 100 * values.reshape(-1, values.shape[-1])[order]
        axes.vlines(range(len(order)), flat[:, :-1].min(1), flat[:, :-1].max(1), color="lightgrey", lw=3, zorder=0)
        for task, (name, colour) in enumerate(zip(TASKS, _TASK_COLOURS, strict=True)):
            axes.scatter(range(len(order)), flat[:, task], color=colour, s=26, marker="osD^"[task], label=name)
        axes.set_ylabel(f"{gate}:\nopen, %")
        axes.set_xticks(range(len(order)), labels, fontsize=8)
        axes.set_xlim(-0.7, len(order) - 0.3)
        axes.set_ylim(-4, 104)
        tidy(axes, grid="y")
    dots[1].set_xlabel("layer.head, the one that the oracle opens most often first")
    dots[0].legend(ncols=4, frameon=False, loc="lower right", bbox_to_anchor=(1, 1.0))
    maps: Any = lower.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, (gate, values) in zip(maps, fractions.items(), strict=False):
        axes.imshow(100 * values[..., -1], vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for layer in range(layers):
            for head in range(heads):
                value = 100 * values[layer, head, -1]
                axes.text(head, layer, f"{value:.0f}", ha="center", va="center", color="w" if value < 55 else "k")
        axes.set_title(f"{gate}: open pairs, %", fontsize=10)
        axes.set_xlabel("query head")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
    maps[0].set_ylabel("layer")
    lengths = maps[2]
    for window, colour in zip(WINDOWS, (SKY, BLUE, BLACK), strict=True):
        for name, gate, line in (("oracle", "oracle", "--"), ("default", "guarded", "-")):
            y = [100 * decisions(found[length, window], gate).value("open") for length in LENGTHS]
            lengths.plot(LENGTHS, y, line, marker="o", ms=4, color=colour)
            lengths.annotate(
                f"{name}, {window}", (LENGTHS[-1], y[-1]), (6, -3), textcoords="offset points", color=colour, fontsize=9
            )
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    lengths.set_xlim(950, 7500)
    lengths.set_ylim(bottom=0)
    lengths.set_xlabel("tokens")
    lengths.set_title("open pairs, %, by gate and window", fontsize=10)
    tidy(lengths)
    return figure
