"""Goals against measurements: the pages of results, made from what the other benchmarks stored.

python recipes/benchmarks/goals.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import PAGES, RESULTS, Row, described, write_page
from whole import section, table

Found = list[dict[str, Any]]

CPU_LENGTHS = (4096, 8192, 16384, 32768)
CPU_GOALS: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("prefill", "fp32", "i.i.d. 15%"): (1.3, 2.0, 2.8, 3.5),
    ("prefill", "bf16", "i.i.d. 15%"): (1.0, 1.5, 2.2, 3.0),
    ("prefill", "fp32", "i.i.d. 50%"): (0.8, 1.1, 1.3, 1.5),
    ("prefill", "fp32", "i.i.d. 100%"): (0.7, 0.8, 0.88, 0.93),
    ("decode", "fp32", "all closed"): (3, 6, 12, 25),
    ("decode", "fp32", "1 of 2 KV heads open"): (1.2, 1.4, 1.6, 1.8),
}

SERVING = {
    "requests": "{:,}",
    "tokens": "{:,}",
    "policy": "{}",
    "whole: of stock": "{:.2f}x",
    "first token: of stock": "{:.2f}x",
    "tokens/s: of stock": "{:.2f}x",
    "whole: of open": "{:.2f}x",
    "tokens/s: of open": "{:.2f}x",
    "whole: of in turn": "{:.2f}x",
    "open": "{}",
    "density": "{}",
    "MiB": "{:,.0f}",
}
DRAFTING = {
    "tokens": "{:,}",
    "policy": "{}",
    "cache": "{}",
    "tokens/s": "{:.1f}",
    "speed-up": "{:.2f}x",
    "of cache": "{:.2f}x",
    "of open": "{:.2f}x",
    "kept": "{:.0%}",
    "a round": "{:.1f}",
    "drafted": "{:.0%}",
    "same": "{:.0%}",
    "memory": "{:+.1%}",
}
"""Columns that are shown of two benchmarks, and how numbers are written there."""


def main() -> None:
    """Write the page of each result, and the one of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the pages; the one of all lies beside it")
    options = parser.parse_args()
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")) | {"stem": path.stem})
        write_page(found[-1], options.pages / f"{path.stem}.md")
    kernels = [file for file in found if file["benchmark"] in ("prefill", "decode")]
    template = Path(__file__).parent / "pages" / "benchmarks.md"
    page = template.read_text(encoding="utf-8").format(
        environments="\n\n".join(sorted({described(file["environment"]) for file in kernels})),
        cpu=_by_goal(found, _reached),
        limits=_by_goal(found, lambda row, _: f"{row['share']:.0%} of {row['limit']:.3g}x" if row else ""),
        other_shapes=_other_shapes(found),
        replayed=_replayed(found),
        real_model=section(found, "real_model"),
        whole_models=section(found, "whole_model"),
        compiling=_compiling(_rows(found, "compile")),
        serving=_beside_stock(found, "serving", SERVING),
        served_texts=_texts(found, "served_text"),
        drafting=_beside_stock(found, "drafting", DRAFTING),
        drafted_texts=_texts(found, "drafted_text"),
        commands="\n".join(f"- `{file['command']}`" for file in found),
    )
    options.pages.with_suffix(".md").write_text(page, encoding="utf-8")


def _rows(found: Found, benchmark: str) -> list[Row]:
    return [row for file in found if file["benchmark"] == benchmark for row in file["rows"]]


def _by_goal(found: Found, cell: Callable[[Row | None, float], str]) -> str:
    """Fill a table of the goals; a cell is made from the row that was measured, if any, and the goal."""
    lines = []
    for (phase, dtype, gates), goals in CPU_GOALS.items():
        fixed = {"dtype": dtype, "gates": gates, "heads": "8/2", "window": 256, "batch": 1}
        cells = [f"{phase}, {dtype}, {gates}"]
        for tokens, goal in zip(CPU_LENGTHS, goals, strict=True):
            chosen = [row for row in _rows(found, phase) if (fixed | {"tokens": tokens}).items() <= row.items()]
            cells.append(cell(chosen[0] if chosen else None, goal))
        lines.append(cells)
    return table(["", *(f"{n:,}" for n in CPU_LENGTHS)], lines)


def _reached(row: Row | None, goal: float) -> str:
    if row is None:
        return f"not measured / {goal}x"
    text = f"{row['speed-up']:.2f}x / {goal}x"
    return text if row["speed-up"] >= goal else f"**{text}**"


def _other_shapes(found: Found) -> str:
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for phase in ("prefill", "decode"):
        for row in _rows(found, phase):
            shape = row["heads"], row["window"], row["batch"]
            has_goal = shape == ("8/2", 256, 1) and (phase, row["dtype"], row["gates"]) in CPU_GOALS
            if row["heads"] != "6/2" and not has_goal:
                sizes = row["heads"].replace("/", " over "), str(row["window"]), str(row["batch"])
                cells = lines.setdefault((phase, row["dtype"], *sizes, row["gates"]), {})
                cells[row["tokens"]] = f"{row['speed-up']:.2f}x"
    lengths = sorted({length for cells in lines.values() for length in cells})
    return table(
        ["phase", "dtype", "heads", "window", "batch", "gates", *(f"{n:,}" for n in lengths)],
        [[*label, *(cells.get(n, "") for n in lengths)] for label, cells in lines.items()],
    )


def _replayed(found: Found) -> str:
    percents, factors = ("open", "density"), ("speed-up", "limit")
    lines = [
        [phase, f"{row['tokens']:,}", row["gates"].removeprefix("shipped model, ")]
        + [f"{row[name]:.0%}" for name in percents]
        + [f"{row[name]:.2f}x" for name in factors]
        for phase in ("prefill", "decode")
        for row in _rows(found, phase)
        if row["gates"].startswith("shipped model")
    ]
    return table(["phase", "tokens", "gates", *percents, *factors], lines)


def _beside_stock(found: Found, benchmark: str, columns: dict[str, str]) -> str:
    """Show the picture of every file of a benchmark, and what there is of some columns."""
    parts = []
    for file in found:
        if file["benchmark"] == benchmark:
            page, rows = f"benchmarks/{file['stem']}", file["rows"]
            shown = {name: form for name, form in columns.items() if any(row.get(name) is not None for row in rows)}
            lines = [[_written(row.get(name), form) for name, form in shown.items()] for row in rows]
            if (PAGES / f"{file['stem']}.png").exists():
                parts.append(f"![{file['title']}]({page}.png)")
            parts += [f"[All columns]({page}.md).", table(list(shown), lines)]
    return "\n\n".join(parts) or "*Not measured.*"


def _texts(found: Found, benchmark: str) -> str:
    """Show how many texts are those of dense attention, or of `generate`."""
    parts = []
    for file in found:
        if file["benchmark"].startswith(benchmark):
            columns = list(file["rows"][0])
            lines = [[_short(row[name]) for name in columns] for row in file["rows"]]
            parts += [f"{file['title']}, [how](benchmarks/{file['stem']}.md):", table(columns, lines)]
    return "\n\n".join(parts) or "*Not measured.*"


def _short(content: Any) -> str:
    return f"{content:.3g}" if isinstance(content, float) else f"{content:,}" if isinstance(content, int) else content


def _written(content: Any, form: str) -> str:
    return "" if content is None else form.format(content)


def _compiling(rows: list[Row]) -> str:
    lines = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    return table(list(rows[0]), lines) if rows else "*Not measured.*"


if __name__ == "__main__":
    main()
