"""What the times of whole models say: ratios, the arithmetic limit, goals, tables and picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from harness import Row, Timed
from matplotlib.figure import Figure

STOCK, OPEN = "stock", "every gate open"
CACHES = ("dynamic", "static")
PHASES = {"prefill": "first token", "decode": "tokens per second"}
DRAWN = {OPEN: "tab:grey", "default": "tab:blue", "default, `min_bulk=0`": "tab:cyan",
         "all closed, `min_bulk=0`": "tab:orange"}  # fmt: skip
COMMANDS = {
    "whole_model": "python recipes/benchmarks/model.py --window 256 --lengths 16 128 500 1000 2000 4000",
    "real_model": "python recipes/benchmarks/model.py --models FOLDER --dtypes bf16 fp32",
}
NOTES = """\
Batch 1. `default` is `Policy()`, the others differ from it as they say. `speed-up` is against stock `sdpa` with the \
faster of its two caches in that phase, `of same cache` against stock with the same one, `of open` against the \
patched model with every gate open: medians over repeats in turn, the first with lowest and highest. A prefill reads \
real text into a new cache (random tokens where weights are random); decode reads on in it, {steps} tokens a repeat. \
Of patched models only the default is timed reading into a static cache; those of the others are filled with the \
same keys. A prompt that fills the context is shorter than its length by the tokens that may follow: see `tokens`; \
lengths beyond the context are left out. `attention` is the share of a stock call that is spent in its attention \
function, by a clock around it in every layer of the first repeat. `limit` is Amdahl's, 1 / (1 - a + a * density) \
with a the share in the faster stock cache: what scoring fewer keys can give at most; where nobody was asked the \
density is 1. A patched call passes it where stock is slow for another reason. `MiB` is the largest resident set in \
the first repeat above that of the loaded model: cache, activations and workspace. Open fraction and density are of \
both caches together. llama.cpp, where it is shown, reads the same tokens with as many threads, twice, before the \
others and not in turn with them; its line names the file, in which Q4 stands for weights of 4 bits.\
"""
GOALS = (("prefill", 8192, 1.6), ("decode", 8192, 1.25), ("prefill", 4096, 1.15))
NEVER_BELOW = 0.98


def amdahl(share: float, density: float) -> float:
    """Return how much faster a model gets at most if attention is a share of its time and scores a part of its keys."""
    return 1 / (1 - share + share * (1 if math.isnan(density) else density))


def faster_stock(timed: Timed) -> tuple[str, str]:
    """Return the stock cell that everything is compared with."""
    return min(((STOCK, cache) for cache in CACHES), key=timed.ms)


def compared(timed: Timed, cell: tuple[str, str]) -> Row:
    """Compare a cell, a policy with a cache, with stock and with every gate open."""
    found = timed.speedup(faster_stock(timed), cell)
    for name, other in (("of same cache", STOCK), ("of open", OPEN)):
        same = (other, cell[1])
        found[name] = timed.speedup(same if same in timed.samples else (other, "dynamic"), cell)["speed-up"]
    return found


def whole_model_figure(rows: list[Row]) -> Figure:
    """Draw the speed-up over the length, its limit dotted: a line of panels for each model and dtype."""
    kinds = _kinds(rows)
    figure = Figure(figsize=(10, 3.8 * len(kinds)), dpi=120, layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    for (model, dtype), line in zip(kinds, panels, strict=True):
        for axes, (phase, title) in zip(line, PHASES.items(), strict=True):
            of_phase = [row for row in rows if (row["model"], row["dtype"], row["phase"]) == (model, dtype, phase)]
            for policy, color in DRAWN.items():
                best = [_best(of_phase, policy, length) for length in _lengths(of_phase)]
                at = [row["length"] for row in best]
                axes.plot(at, [row["speed-up"] for row in best], "o-", color=color, label=policy.replace("`", ""))
                if policy != OPEN:
                    axes.plot(at, [row["limit"] for row in best], ":", color=color)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(xscale="log", xlabel="tokens", ylabel="times the faster stock cache")
            axes.set_title(f"{title}, {model}, {dtype}\n(dotted: limit)", fontsize=9)
            axes.set_xticks(_lengths(of_phase), [f"{length:,}" for length in _lengths(of_phase)])
            axes.minorticks_off()
    panels[0, 0].legend(fontsize=8)
    return figure


def section(found: Iterable[dict[str, Any]], benchmark: str) -> str:
    """Write the tables of all files of a benchmark, and say which command makes one if there is none.

    Args:
        found: Contents of the result files, each with the `stem` of its name.
        benchmark: `"whole_model"`, or `"real_model"`, which has goals, a picture and more tables.
    """
    parts, is_real = [], benchmark == "real_model"
    for file in found:
        if file["benchmark"] == benchmark:
            if is_real:
                page = f"benchmarks/{file['stem']}"
                # Goals are those of bfloat16.
                parts += [_goals(file["rows"])] if any(row["dtype"] == "bf16" for row in file["rows"]) else []
                parts += [f"![{file['title']}]({page}.png)", f"[All columns]({page}.md)."]
            for kind in _kinds(file["rows"]):
                of_kind = [row for row in file["rows"] if (row["model"], row["dtype"]) == kind]
                parts += _tables(of_kind, ", ".join(kind), every=is_real)
    return "\n\n".join(parts) or f"*Not measured*: `{COMMANDS[benchmark]}` does it."


def _goals(rows: list[Row]) -> str:
    """Fill the table of goals, which are those of the default in bf16; bold where one is missed."""
    lines = []
    default = [row for row in rows if row["policy"] == "default"]
    for phase, length, goal in GOALS:
        of_goal = [row for row in default if (row["phase"], row["dtype"]) == (phase, "bf16")]
        best = _best(of_goal, "default", length)["speed-up"] if length in _lengths(of_goal) else None
        lines.append([f"{PHASES[phase]}, {length:,} tokens, of the faster stock cache", _reached(best, goal)])
    lowest = min(default, key=lambda row: row["of same cache"])
    where = f"{PHASES[lowest['phase']]}, {lowest['length']:,} tokens, {lowest['dtype']}, {lowest['cache']} cache"
    reached = _reached(lowest["of same cache"], NEVER_BELOW)
    lines.append(["lowest, of stock with the same cache", f"{reached} ({where})"])
    return table(["the default policy", "measured / goal"], lines)


def _reached(measured: float | None, goal: float) -> str:
    if measured is None:
        return f"not measured / {goal}x"
    text = f"{measured:.2f}x / {goal}x"
    return text if measured >= goal else f"**{text}**"


def _tables(rows: list[Row], of: str, *, every: bool) -> list[str]:
    """Lay out the rows of one model and dtype, with a column for each length."""
    heads = ["", *(f"{length:,}" for length in _lengths(rows))]

    def laid_out(title: str, chosen: list[Row], names: tuple[str, ...], cell: Callable[[Row], str]) -> str:
        lines: dict[tuple[str, ...], dict[int, str]] = {}
        for row in chosen:
            lines.setdefault(tuple(row[name] for name in names), {})[row["length"]] = cell(row)
        body = [[", ".join(label), *(cells.get(n, "") for n in _lengths(rows))] for label, cells in lines.items()]
        return f"**{title}**, {of}\n\n{table(heads, body)}"

    prefill, decode = ([row for row in rows if row["phase"] == phase] for phase in PHASES)
    parts = [
        laid_out("Seconds to the first token, times as fast as the faster stock cache", prefill, ("policy", "cache"),
                 lambda row: f"{row['first token s']:.3g} s, {row['speed-up']:.2f}x"),
        laid_out("Tokens per second, times as fast as the faster stock cache", decode, ("policy", "cache"),
                 lambda row: f"{row['tokens/s']:.3g}, {row['speed-up']:.2f}x"),
    ]  # fmt: skip
    gated = [row for row in rows if row["policy"] not in (STOCK, OPEN) and row["cache"] == "dynamic"]
    stock = [row for row in rows if row["policy"] == STOCK]
    parts += [
        laid_out(
            "Open pairs / realised density / limit, times as fast as every gate open",
            gated,
            ("phase", "policy"),
            _limits,
        ),
        laid_out("Share of attention in stock", stock, ("phase", "cache"), lambda row: _percent(row["attention"])),
        laid_out("Peak memory above the loaded model, MiB", prefill, ("policy", "cache"), lambda row: _mib(row["MiB"])),
    ]
    return parts if every else parts[:2]


def _limits(row: Row) -> str:
    return f"{_percent(row['open'])} / {_percent(row['density'])} / {row['limit']:.2f}x, {row['of open']:.2f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size:,.0f}"


def _best(rows: list[Row], policy: str, length: int) -> Row:
    """Return the row of a policy with the faster cache."""
    return max((row for row in rows if (row["policy"], row["length"]) == (policy, length)), key=lambda r: r["speed-up"])


def _kinds(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))


def _lengths(rows: list[Row]) -> list[int]:
    return sorted({row["length"] for row in rows})


def table(head: list[str], lines: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])
