"""Which layers and heads close, how much they swing with the query, and how that depends on length and window.

python recipes/evaluate/heads.py --out docs/results/heads
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parent)]

from classification import DEFAULT, PLACE, Recorded
from pictures import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from recording import THRESHOLDS, recorded
from shipped import LENGTHS, TASKS, WINDOWS, command_line

GATES = {"oracle": "oracle_by_task", "default": "guarded_by_task"}
SWINGS = (0.1, 0.9)
"""A head swings where its open fraction lies between these: neither always local nor always long."""

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


def over_places(found: dict[tuple[int, int], Recorded]) -> str:
    """Write open fractions by length and window."""
    lines = ["| tokens | gate | " + " | ".join(f"window {w}" for w in WINDOWS) + " |", "|---|---|---|---|---|"]
    names = {"oracle": "", "default": "prompt/guarded", "saturating": "prompt/saturating"}
    for length in LENGTHS:
        for label, name in names.items():
            cells = []
            for window in WINDOWS:
                place = found[length, window]
                confusion = place.confusion(name, DEFAULT) if name else place.oracle(DEFAULT)
                one = confusion.measures["open"]
                cells.append(f"{one.value:.1%} ({one.low:.1%}-{one.high:.1%})")
            lines.append(f"| {length:,} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(found: dict[tuple[int, int], Recorded]) -> str:
    """Write the page."""
    place = found[PLACE]
    fractions = {gate: open_fractions(place, gate) for gate in GATES}
    swings = {gate: swing(place, gate) for gate in GATES}
    spread = margin_spread(place)
    every = fractions["oracle"][..., -1].size
    swinging = {gate: int(((f[..., -1] > SWINGS[0]) & (f[..., -1] < SWINGS[1])).sum()) for gate, f in fractions.items()}
    tasks = {gate: _by_task(place, gate) for gate in GATES}
    share = {gate: swings[gate][..., 1].sum() / swings[gate][..., 0].sum() for gate in GATES}
    parts = [
        "# Which heads open, and when",
        "",
        f"Dense activations of the shipped model in float32, sink 16, threshold {DEFAULT}; {len(place.rows)} documents "
        "of 4,096 tokens, window 256, unless said otherwise. *Oracle* opens by the exact local share, *default* by the "
        "guarded estimate with moments of the prompt. Made by `python recipes/evaluate/heads.py`; every head is in "
        "[heads.csv](heads.csv).",
        "",
        f"Between {SWINGS[0]:.0%} and {SWINGS[1]:.0%} open, so swinging with the query: {swinging['oracle']} of "
        f"{every} heads by the oracle, {swinging['default']} by the default gate. Of the variance of the decisions "
        f"over queries, {share['oracle']:.0%} (oracle) and {share['default']:.0%} (default) lies between the four "
        "tasks, the rest within them.",
        "",
        "![open fraction by head, by task, by length and window](heads.png)",
        "",
        "## By layer and task",
        "",
        "Open fraction of all heads. Tasks: plain text, a planted line being read, the text of a question, and the "
        "queries that predict an answer.",
        "",
        "| layer | gate | all | " + " | ".join(TASKS) + " |",
        "|---|---|---|" + "---|" * len(TASKS),
    ]
    for layer in range(place.layers):
        for gate in GATES:
            of_layer = _by_task(place, gate, layer)
            parts.append(f"| {layer} | {gate} | " + " | ".join(f"{value:.1%}" for value in of_layer) + " |")
    parts += [f"| **all** | {gate} | " + " | ".join(f"{value:.1%}" for value in tasks[gate]) + " |" for gate in GATES]
    parts += [
        "",
        "## By head",
        "",
        "Open fraction, and in brackets the variance of the decision over queries (0.25 is the most there can be). "
        "*Margin* is the standard deviation of the exact margin over queries, in nats.",
        "",
        "| layer.head | oracle | default | oracle: plain text | oracle: answer | default: plain text | "
        "default: answer | margin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer in range(place.layers):
        for head in range(fractions["oracle"].shape[1]):
            oracle, default = (fractions[gate][layer, head] for gate in GATES)
            parts.append(
                f"| {layer}.{head} | {oracle[-1]:.1%} ({swings['oracle'][layer, head, 0]:.3f}) | "
                f"{default[-1]:.1%} ({swings['default'][layer, head, 0]:.3f}) | {oracle[0]:.1%} | {oracle[3]:.1%} | "
                f"{default[0]:.1%} | {default[3]:.1%} | {spread[layer, head]:.1f} |"
            )
    parts += ["", "## By length and window", "", "Open fraction (95% by bootstrap over documents).", ""]
    return "\n".join([*parts, over_places(found), ""])


def _by_task(place: Recorded, gate: str, layer: int | None = None) -> list[float]:
    """Open fraction over all tasks, then by task, of one layer or all."""
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    pairs = place.array(GATES[gate])[:, layers].sum((0, 1, 2))  # [tasks, bins]
    opened, asked = pairs[:, :_AT].sum(-1), pairs.sum(-1)
    return [opened.sum() / asked.sum(), *(opened / asked)]


def write_csv(place: Recorded, path: Path) -> None:
    """Write one line for each head."""
    spread = margin_spread(place)
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        names = [task.replace(" ", "_") for task in (*TASKS, "all")]
        header = [f"{gate}_{name}" for gate in GATES for name in (*names, "variance", "variance_between_tasks")]
        lines.writerow(["layer", "head", *header, "margin_sd"])
        fractions = [np.concatenate([open_fractions(place, gate), swing(place, gate)], axis=-1) for gate in GATES]
        for layer in range(place.layers):
            for head in range(fractions[0].shape[1]):
                numbers = [*(n for part in fractions for n in part[layer, head]), spread[layer, head]]
                lines.writerow([layer, head, *(f"{number:.5g}" for number in numbers)])


def draw(found: dict[tuple[int, int], Recorded], path: Path) -> None:
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
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
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
        for gate, name, line in (("oracle", "", "--"), ("default", "prompt/guarded", "-")):
            places = [found[length, window] for length in LENGTHS]
            y = [
                100 * (p.confusion(name, DEFAULT) if name else p.oracle(DEFAULT)).measures["open"].value for p in places
            ]
            lengths.plot(LENGTHS, y, line, marker="o", ms=4, color=colour)
            lengths.annotate(
                f"{gate}, {window}", (LENGTHS[-1], y[-1]), (6, -3), textcoords="offset points", color=colour, fontsize=9
            )
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    lengths.set_xlim(950, 7500)
    lengths.set_ylim(bottom=0)
    lengths.set_xlabel("tokens")
    lengths.set_title("open pairs, %, by gate and window", fontsize=10)
    lengths.grid(alpha=0.25)
    lengths.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure what is missing, then write table, page and picture."""
    arguments = command_line("heads", __doc__)
    rows = recorded(arguments.work, arguments.processes)
    found = {(length, window): Recorded(rows, length, window) for length in LENGTHS for window in WINDOWS}
    write_csv(found[PLACE], arguments.out.with_suffix(".csv"))
    arguments.out.with_suffix(".md").write_text(page(found))
    draw(found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
