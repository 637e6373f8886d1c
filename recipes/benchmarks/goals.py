"""Goals against measurements: the page of results, made from the JSON files of the other benchmarks.

python recipes/benchmarks/goals.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import described

CPU_LENGTHS = (4096, 8192, 16384, 32768)
CPU_GOALS: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("prefill", "fp32", "i.i.d. 15%"): (1.3, 2.0, 2.8, 3.5),
    ("prefill", "bf16", "i.i.d. 15%"): (1.0, 1.5, 2.2, 3.0),
    ("prefill", "fp32", "i.i.d. 50%"): (0.8, 1.1, 1.3, 1.5),
    ("prefill", "fp32", "i.i.d. 100%"): (0.7, 0.8, 0.88, 0.93),
    ("decode", "fp32", "all closed"): (3, 6, 12, 25),
    ("decode", "fp32", "1 of 2 KV heads open"): (1.2, 1.4, 1.6, 1.8),
}
CUDA_LENGTHS = (8192, 32768, 131072)
CUDA_GOALS = {
    "prefill, 15% open": (1.2, 2.5, 4.5),
    "decode, batch 8, 1 of 8 KV heads open, CUDA graph": (1.2, 2.5, 5.0),
    "all open": (0.9, 0.93, 0.95),
}

MISSED = """\
- *Whole model, prefill with `min_bulk=0`*: this model's layers have 6 heads of 32 and gain 1.2 to 2.2x with their own
  gates replayed. The gate takes 8% of the dense attention, a quarter of the time is not attention, and copies of keys
  and rows make the model's other parts fetch fresh memory. With `auto`, prompts this short are dense.
- *Whole model, decode with `min_bulk=0`*: attention to 4,000 keys takes this model's layers 0.1 ms, and local pass,
  gate and merge as long. The same gates gain from 8,192 keys on.
- *Whole model, decode below break-even*: the hook of a layer, the choice of a path and the padding layout cost the same
  10 microseconds in a layer of any size, and this model's layers take 200. Single repeats differ by more than what is
  missing. In layers of real shapes nothing shows."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results/benchmarks"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/benchmarks.md"))
    options = parser.parse_args()
    found = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    page = [
        "# Speed: goals and measurements",
        "Made by `python recipes/benchmarks/goals.py` from the files in [benchmarks/](benchmarks/), which the "
        "[commands below](#commands) make. A speed-up is against the fastest dense kernel of the same run.",
        "## CPU, one layer",
        "8 query heads over 2 KV heads of 64, sink 16, window 256, batch 1. In each cell: measured / goal; **bold** "
        "where the goal is missed.",
        *_environments(found),
        _cpu_table(found),
        "## The arithmetic limit",
        "How much of `1 / realised density` the same calls reach. In decode a share above 1 says that the dense kernel "
        "is slow: it reads the keys once for every query head, the gated path once for a group.",
        _limits(found),
        "## Other shapes and gates",
        "As above, without goals: other gates and windows, a KV head for each query head, several sequences at once.",
        _shapes_table(found),
        "## Gates of the shipped model",
        "Decisions recorded while the shipped model reads and writes, replayed in its own shape of 6 query heads over "
        "2 KV heads of 32. A prefill has a row for each layer; of the decode steps the typical one, by its number of "
        "open pairs.",
        _replayed(found),
        "## Whole models, CPU",
        "Goals: at the full context of 4,096 tokens prefill at least 1.3x, decode at least 1x with `min_bulk=0`; "
        "with `auto` never under 0.95x at any length. Models with the names of real ones have their shapes, few layers "
        "and random weights, on which gates behave as on no trained model.",
        *_whole_models(found),
        "## Compiling",
        *_compiling(found),
        "## Why goals are missed",
        MISSED,
        "## Commands",
        "Each file in [benchmarks/](benchmarks/) names its own; in all, about half an hour on an idle machine:",
        "\n".join(f"- `{file['command']}`" for file in found),
        "## CUDA, one layer",
        "*Not measured*: no GPU was at hand. `python recipes/benchmarks/attention_prefill.py` and "
        "`attention_decode.py` take bf16, 32 query heads over 8 KV heads of 128 and window 1,024 by themselves there.",
        _table(
            ["", *(f"{n:,}" for n in CUDA_LENGTHS)],
            [[name, *(f"not measured / {goal}x" for goal in goals)] for name, goals in CUDA_GOALS.items()],
        ),
    ]
    options.page.write_text("\n\n".join(page) + "\n", encoding="utf-8")


def _rows(found: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [row for file in found if file["benchmark"] == f"attention_{phase}" for row in file["rows"]]


def _at(found: list[dict[str, Any]], phase: str, dtype: str, gates: str, tokens: int) -> dict[str, Any] | None:
    wanted = {"dtype": dtype, "gates": gates, "tokens": tokens, "heads": "8/2", "window": 256, "batch": 1}
    chosen = [row for row in _rows(found, phase) if wanted.items() <= row.items()]
    return chosen[0] if chosen else None


def _cpu_table(found: list[dict[str, Any]]) -> str:
    lines = []
    for (phase, dtype, gates), goals in CPU_GOALS.items():
        cells = [f"{phase}, {dtype}, {gates}"]
        for tokens, goal in zip(CPU_LENGTHS, goals, strict=True):
            row = _at(found, phase, dtype, gates, tokens)
            if row is None:
                cells.append(f"not measured / {goal}x")
                continue
            text = f"{row['speed-up']:.2f}x / {goal}x"
            cells.append(text if row["speed-up"] >= goal else f"**{text}**")
        lines.append(cells)
    return _table(["", *(f"{n:,}" for n in CPU_LENGTHS)], lines)


def _limits(found: list[dict[str, Any]]) -> str:
    lines = []
    for phase, dtype, gates in CPU_GOALS:
        rows = [_at(found, phase, dtype, gates, tokens) for tokens in CPU_LENGTHS]
        cells = ["" if row is None else f"{row['share']:.0%} of {row['limit']:.3g}x" for row in rows]
        lines.append([f"{phase}, {dtype}, {gates}", *cells])
    return _table(["", *(f"{n:,}" for n in CPU_LENGTHS)], lines)


def _shapes_table(found: list[dict[str, Any]]) -> str:
    rows = [
        (phase, row)
        for phase in ("prefill", "decode")
        for row in _rows(found, phase)
        if row["heads"] != "6/2"
        and not (
            (row["heads"], row["window"], row["batch"]) == ("8/2", 256, 1)
            and (phase, row["dtype"], row["gates"]) in CPU_GOALS
        )
    ]
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for phase, row in rows:
        shape = (row["heads"].replace("/", " over "), str(row["window"]), str(row["batch"]))
        label = (phase, row["dtype"], *shape, row["gates"])
        lines.setdefault(label, {})[row["tokens"]] = f"{row['speed-up']:.2f}x"
    lengths = sorted({row["tokens"] for _, row in rows})
    return _table(
        ["phase", "dtype", "heads", "window", "batch", "gates", *(f"{n:,}" for n in lengths)],
        [[*label, *(cells.get(n, "") for n in lengths)] for label, cells in lines.items()],
    )


def _replayed(found: list[dict[str, Any]]) -> str:
    percents, factors = ("open", "density"), ("speed-up", "limit")
    lines = [
        [phase, f"{row['tokens']:,}", row["gates"].removeprefix("shipped model, ")]
        + [f"{row[name]:.0%}" for name in percents]
        + [f"{row[name]:.2f}x" for name in factors]
        for phase in ("prefill", "decode")
        for row in _rows(found, phase)
        if row["gates"].startswith("shipped model")
    ]
    return _table(["phase", "tokens", "gates", *percents, *factors], lines)


def _compiling(found: list[dict[str, Any]]) -> list[str]:
    rows = [row for file in found if file["benchmark"] == "compile" for row in file["rows"]]
    if not rows:
        return ["*Not measured.*"]
    head = list(rows[0])
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in head] for row in rows]
    return [
        "The decode step of the shipped model under `torch.compile(fullgraph=True)`, static cache, three lengths of "
        "text: no graph is added while the text grows.",
        _table(head, cells),
    ]


def _whole_models(found: list[dict[str, Any]]) -> list[str]:
    rows = [row for file in found if file["benchmark"] == "end_to_end" for row in file["rows"]]
    if not rows:
        return ["*Not measured.*"]
    head = ["model", "min_bulk", "phase", "tokens", "dense ms", "patched ms", "speed-up", "open", "density"]
    lines = [
        [row["model"], row["policy"].removeprefix("min_bulk="), row["phase"], f"{row['tokens']:,}"]
        + [f"{row['dense ms']:.1f}", f"{row['patched ms']:.1f}", f"{row['speed-up']:.2f}x"]
        + ["-" if row[name] is None or row[name] != row[name] else f"{row[name]:.0%}" for name in ("open", "density")]
        for row in rows
    ]
    return [_table(head, lines)]


def _environments(found: list[dict[str, Any]]) -> list[str]:
    return sorted({described(file["environment"]) for file in found if file["benchmark"].startswith("attention")})


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
