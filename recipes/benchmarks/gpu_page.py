"""The page of what `gpu.py` found: goals, tables, picture, and sentences written from the numbers.

Without results the page has its tables all the same, with empty cells.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import COMMAND, PROCESS, ROOT
from gpu_llama import ASKED, CLOSED, COMPILED, LAYERS, POLICIES
from harness import PAGES, RESULTS, Row, described, draw_speedups
from matplotlib.figure import Figure
from model import OPEN
from whole import CACHES, STOCK, table

TEMPLATE = Path(__file__).parent / "pages" / "gpu.md"
STORED = ROOT / RESULTS / "gpu" / "gpu.json"
PAGE, PICTURE = "benchmarks-gpu.md", f"{PAGES.name}/gpu.png"
LENGTHS, LONG = (4096, 8192, 32768, 131072), 32768
ONE_GROUP, ALL_OPEN, ALL_CLOSED = "1 of 8 KV heads open", "all open", "all closed"
SHARES = ("5% open", "15% open", "30% open", "50% open")
LAYER = {"prefill": ("prefill", 1), "decode": ("decode", 1), "decode, batch 16": ("decode", 16)}
GOALS = (
    *(("prefill", "15% open", tokens, goal) for tokens, goal in ((8192, 1.3), (LONG, 1.8), (131072, 2.5))),
    ("decode", ONE_GROUP, LONG, 2.0),
    ("decode", ALL_CLOSED, LONG, 6.0),
)
ALL_OPEN_GOAL, WHOLE_GOAL = 0.9, 0.97
SHOWN = 10
NOT_MEASURED = "*Not measured.*"


class Found:
    """Rows of all stages; those of a stage that was not reached are none."""

    def __init__(self, found: dict[str, Any] | None) -> None:
        self.environment = (found or {}).get("environment")
        self.rows: list[Row] = (found or {}).get("rows", [])

    def of(self, stage: str, **fixed: Any) -> list[Row]:
        """Choose the rows of a stage with these values that measured something."""
        wanted = {"stage": stage, **fixed}
        return [row for row in self.rows if wanted.items() <= row.items() and "problem" not in row]

    def one(self, stage: str, **fixed: Any) -> Row:
        """Choose a single row.

        Raises:
            LookupError: It was not measured.
        """
        return self.of(stage, **fixed)[0]

    def lengths(self, stage: str, standard: tuple[int, ...]) -> list[int]:
        """List the lengths that were measured, or that would be."""
        return sorted({row["tokens"] for row in self.of(stage)} or standard)


def make_page(result: Path | None, out: Path | None = None) -> Path:
    """Write the page and its picture.

    Args:
        result: The file that a run has written, which is stored; None takes the stored one, if there is any.
        out: Folder of the page, which stores nothing; None is that of the documentation.

    Returns:
        The page.
    """
    source = result or STORED
    if result is not None and out is None:
        STORED.parent.mkdir(exist_ok=True)
        shutil.copy(result, STORED)
    found = Found(json.loads(source.read_text(encoding="utf-8")) if source.exists() else None)
    folder = out or ROOT / PAGES.parent
    (folder / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    if found.of("layer"):
        figure(found).savefig(folder / PICTURE, dpi=120)
    (folder / PAGE).write_text(text(found), encoding="utf-8")
    return folder / PAGE


def summary(found: dict[str, Any]) -> str:
    """Return what is to be read at the end of a run: the page, without what only a page has."""
    return text(Found(found), pictures=False).partition("## Commands")[0].partition("\n\n")[2]


def text(found: Found, *, pictures: bool = True) -> str:
    """Fill the template."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        environment=_environment(found.environment),
        picture=f"![Speed-up of one layer over its length]({PICTURE})\n\n" * (pictures and bool(found.of("layer"))),
        goals=_goals(found),
        sentences="\n".join(f"{at}. {_said(sentence, found)}" for at, sentence in enumerate(SENTENCES, 1)),
        break_even="\n".join(f"- {phase}: {_break_even(found, phase, gates)}" for phase, gates in BREAK_EVEN.items()),
        layer="\n\n".join(f"**{name}**\n\n{_layer(found, *case)}" for name, case in LAYER.items()),
        traffic=_traffic(found),
        whole=_whole(found),
        compiled=_compiled(found),
        models=_models(found),
        launches=_launches(found),
        top=_top(found),
        checks=_checks(found),
        processes=_processes(found),
        command=COMMAND,
    )


def figure(found: Found) -> Figure:
    """Draw the speed-up of one layer over its length, the limits dotted."""
    drawn = Figure(figsize=(13, 4.5), layout="constrained")
    for axes, (name, (phase, batch)) in zip(drawn.subplots(1, len(LAYER)), LAYER.items(), strict=True):
        rows = sorted(found.of("layer", phase=phase, batch=batch), key=lambda row: row["tokens"])
        if rows:
            draw_speedups(axes, rows, ("gates",), f"{name} (dotted: limit)")
    return drawn


def _environment(environment: Row | None) -> str:
    if environment is None:
        return f"*Not measured*: no GPU was at hand. `{COMMAND}` fills this page."
    if "cuda" not in environment:
        return f"A rehearsal without a GPU, whose numbers say nothing. {described(environment)}"
    card = "compute capability {capability}, {GiB:.0f} GiB, CUDA {cuda}, driver {driver}".format(**environment)
    return f"{described(environment)} {card[0].upper()}{card[1:]}."


def _cell(call: Callable[[], str]) -> str:
    """Fill a cell; it stays empty where nothing was measured."""
    try:
        return call()
    except (LookupError, TypeError):
        return ""


def _by_length(lengths: list[int], lines: dict[str, Callable[[int], str]]) -> str:
    body = [[name, *(_cell(lambda cell=cell, n=n: cell(n)) for n in lengths)] for name, cell in lines.items()]
    return table(["", *(f"{n:,}" for n in lengths)], body)


def _reached(measured: float, goal: float, where: str = "") -> str:
    reached = f"{measured:.2f}x / {goal}x"
    return (reached if measured >= goal else f"**{reached}**") + where


def _goals(found: Found) -> str:
    def of_layer(phase: str, gates: str, tokens: int, goal: float) -> str:
        return _reached(found.one("layer", phase=phase, batch=1, gates=gates, tokens=tokens)["speed-up"], goal)

    def lowest_open() -> str:
        row = sorted(found.of("layer", gates=ALL_OPEN), key=lambda row: row["speed-up"])[0]
        where = f" ({row['phase']}, {row['tokens']:,} tokens, batch {row['batch']})"
        return _reached(row["speed-up"], ALL_OPEN_GOAL, where)

    def lowest_whole() -> str:
        ratio, where = sorted(_of_stock(found))[0]
        return _reached(ratio, WHOLE_GOAL, f" ({where})")

    lines = [
        [f"one layer, {phase}, {tokens:,} tokens, {gates}", _cell(lambda goal=goal: of_layer(*goal)) or f"/ {goal[3]}x"]
        for goal in GOALS
        for phase, gates, tokens, _ in [goal]
    ]
    lines.append(["one layer, all open, lowest of all", _cell(lowest_open) or f"/ {ALL_OPEN_GOAL}x"])
    lines.append(["whole model, default policy, lowest of all", _cell(lowest_whole) or f"/ {WHOLE_GOAL}x"])
    return table(["", "measured / goal"], lines)


def _of_stock(found: Found) -> list[tuple[float, str]]:
    """Divide the times of stock with the faster cache by those of the default with its own."""
    ratios = []
    for tokens in found.lengths("llama", ()):
        for name, measured in (("first token", "first token s"), ("step", "step ms")):
            stock, default = (
                found.of("llama", policy=policy, tokens=tokens, compiled=False) for policy in (STOCK, "default")
            )
            if stock and default:
                ratio = min(row[measured] for row in stock) / min(row[measured] for row in default)
                ratios.append((ratio, f"{name}, {tokens:,} tokens"))
    return ratios


def _layer(found: Found, phase: str, batch: int) -> str:
    def dense(tokens: int) -> str:
        row = found.one("layer", phase=phase, batch=batch, tokens=tokens)
        return f"{row['dense ms']:.3g} ms, {row['dense']}"

    def of_gates(gates: str) -> Callable[[int], str]:
        def cell(tokens: int) -> str:
            row = found.one("layer", phase=phase, batch=batch, tokens=tokens, gates=gates)
            return f"{row['speed-up']:.2f}x of {row['limit']:.3g}x"

        return cell

    measured = {row["gates"] for row in found.of("layer", phase=phase)}
    gates = (ALL_CLOSED, *((ONE_GROUP,) if phase == "decode" else ()), *SHARES, ALL_OPEN)
    lines = {name: of_gates(name) for name in gates if not measured or name in measured}
    return _by_length(found.lengths("layer", LENGTHS), {"fastest dense kernel": dense, **lines})


def _traffic(found: Found) -> str:
    def moved(batch: int, which: str, gates: str) -> Callable[[int], str]:
        def cell(tokens: int) -> str:
            row = found.one("layer", phase="decode", batch=batch, tokens=tokens, gates=gates)
            return f"{row[f'{which} MB']:,.0f} MB, {row[f'{which} TB/s']:.2f} TB/s"

        return cell

    lines = {}
    for batch in (1, 16):
        lines[f"batch {batch}, dense"] = moved(batch, "dense", ALL_OPEN)
        for gates in (ALL_OPEN, ONE_GROUP, ALL_CLOSED):
            lines[f"batch {batch}, {gates}"] = moved(batch, "gated", gates)
    return _by_length(found.lengths("layer", LENGTHS), lines)


def _whole(found: Found) -> str:
    def of_cell(policy: str, cache: str) -> Callable[[int], str]:
        def cell(tokens: int) -> str:
            row = found.one("llama", policy=policy, cache=cache, tokens=tokens, compiled=False)
            said = f"{row['first token s']:.2f} s, {row['step ms']:.1f} ms"
            peak, opened = row["peak GiB"], row.get("open")
            said += "" if peak is None else f", {peak:.0f} GiB"
            said += "" if opened is None else f", {opened:.0%} open"
            return said + ("" if row["layers"] == LAYERS else f", {row['layers']} layers")

        return cell

    lines = {f"{policy}, {cache}": of_cell(policy, cache) for cache in CACHES for policy in POLICIES}
    lines = {name: cell for name, cell in lines.items() if "static" not in name or name.startswith((STOCK, "default,"))}
    return _by_length(found.lengths("llama", LENGTHS[2:]), lines)


def _compiled(found: Found) -> str:
    names = ("layers", "tokens", "compile s", "step ms", "graphs", "CUDA graph skips")
    lines = []
    for policy in COMPILED:
        row = next(iter(found.of("llama", policy=policy, compiled=True)), {})
        lines.append([policy, *(_number(row.get(name)) for name in names)])
    return table(["policy", *names], lines)


def _models(found: Found) -> str:
    names = ("open", "open here", "agree", "same token", "logits apart", "with the same gates", "dense")
    lines = [[row["model"], row["dtype"], *(_number(row[name]) for name in names)] for row in found.of("models")]
    return table(["model", "dtype", *names], lines or [["shipped", "bf16", *[""] * len(names)]])


def _launches(found: Found) -> str:
    names = ("layers", "tokens", "launches", "operators", "ms")
    lines = []
    for phase in ("decode", "prefill"):
        for policy in (STOCK, "default"):
            row = next(iter(found.of("profile", phase=phase, policy=policy)), {})
            lines.append([phase, policy, *(_number(row.get(name)) for name in names)])
    return table(["phase", "policy", *names], lines)


def _top(found: Found) -> str:
    lines = [
        [row["phase"], f"`{name}`".replace("|", "/"), f"{ms:.3f}", str(calls)]
        for row in found.of("profile", policy="default")
        for name, ms, calls in row["top"][:SHOWN]
    ]
    return table(["phase", "kernel", "ms", "calls"], lines or [["decode", "", "", ""], ["prefill", "", "", ""]])


def _checks(found: Found) -> str:
    names = ("backend", "dtype", "head_dim", "group_size", "error_share")
    made = [*found.of("check"), *found.of("doctor")]
    return table(list(names), [[_number(row[name]) for name in names] for row in made] or [["flex", *[""] * 4]])


def _processes(found: Found) -> str:
    names = ("passed", "failed", "error", "skipped", "failures")
    lines = [
        [row["process"], row["ended"], f"{row['seconds']:.0f}", *(_number(row.get(name)) for name in names)]
        for row in found.of(PROCESS)
    ]
    problems = [
        " ".join(str(value) for key, value in row.items() if key != "problem") + f": {row['problem']}"
        for row in found.rows
        if row.get("problem")
    ]
    listed = "".join(f"\n- {problem.replace('|', '/')}" for problem in problems)
    empty = ["tests", *[""] * (2 + len(names))]
    return table(["process", "ended", "seconds", *names], lines or [empty]) + (
        f"\n\nProblems:\n{listed}" * bool(listed)
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value) if isinstance(value, str) else f"{value:,}"


BREAK_EVEN = {"prefill": "15% open", "decode": ONE_GROUP}


def _break_even(found: Found, phase: str, gates: str) -> str:
    rows = sorted(found.of("layer", phase=phase, batch=1, gates=gates), key=lambda row: row["tokens"])
    if not rows:
        return NOT_MEASURED
    tokens = crossing([(row["tokens"], row["speed-up"]) for row in rows])
    if tokens is None:
        return f"beyond {rows[-1]['tokens']:,} tokens, with {gates}."
    if tokens <= rows[0]["tokens"]:
        return f"at or below {rows[0]['tokens']:,} tokens, with {gates}."
    return f"{tokens:,} tokens or {max(0, tokens - rows[0]['window'] - 16):,} bulk keys, with {gates}."


def crossing(points: list[tuple[int, float]]) -> int | None:
    """Find the tokens from which on the speed-up stays 1 or more, on straight lines over the logarithm of the tokens.

    Args:
        points: Tokens and speed-up, by tokens.

    Returns:
        The tokens, the first ones' if it is never below 1; None if the last speed-up is.
    """
    below = [at for at, (_, speedup) in enumerate(points) if speedup < 1]
    if not below:
        return points[0][0]
    at = below[-1]
    if at == len(points) - 1:
        return None
    (low, slow), (high, fast) = points[at : at + 2]
    return round(math.exp(math.log(low) + (1 - slow) / (fast - slow) * math.log(high / low)))


def _said(sentence: Callable[[Found], str], found: Found) -> str:
    return _cell(lambda: sentence(found)) or NOT_MEASURED


def _of_prefill(found: Found) -> str:
    rows = sorted(found.of("layer", phase="prefill", gates="15% open"), key=lambda row: row["tokens"])
    each = [f"{row['speed-up']:.2f}x at {row['tokens']:,} tokens (limit {row['limit']:.2f}x)" for row in rows]
    return f"With 15% of the pairs open, one layer's prefill is {_listed(each)} of the fastest dense kernel."


def _of_decode(found: Found) -> str:
    phase = {"phase": "decode", "batch": 1, "tokens": LONG}
    group, closed = (found.one("layer", **phase, gates=gates) for gates in (ONE_GROUP, ALL_CLOSED))
    return (
        f"A decode step over {LONG:,} tokens is {group['speed-up']:.2f}x with one of eight KV heads open and "
        f"{closed['speed-up']:.2f}x with all closed; it reads {group['gated MB']:.0f} MB at {group['gated TB/s']:.2f} "
        f"TB/s where dense attention reads {group['dense MB']:.0f} MB at {group['dense TB/s']:.2f} TB/s."
    )


def _of_open(found: Found) -> str:
    rows = sorted(found.of("layer", gates=ALL_OPEN), key=lambda row: row["speed-up"])
    return (
        f"With every gate open a layer runs at {rows[0]['speed-up']:.2f}x at worst ({rows[0]['phase']}, "
        f"{rows[0]['tokens']:,} tokens, batch {rows[0]['batch']}) and {rows[-1]['speed-up']:.2f}x at best."
    )


def _of_model(found: Found) -> str:
    fixed = {"tokens": LONG, "compiled": False, "cache": "dynamic"}
    stock, default, closed, asked, opened = (
        found.one("llama", policy=policy, **fixed) for policy in (STOCK, "default", CLOSED, ASKED, OPEN)
    )
    first = stock["first token s"]
    return (
        f"Of a random Llama-3.1-8B at {LONG:,} tokens, stock makes the first token in {first:.2f} s and a step in "
        f"{stock['step ms']:.1f} ms, the default is {first / default['first token s']:.2f}x and "
        f"{stock['step ms'] / default['step ms']:.2f}x, every gate open {first / opened['first token s']:.2f}x and "
        f"{stock['step ms'] / opened['step ms']:.2f}x, all closed {first / closed['first token s']:.2f}x and "
        f"{stock['step ms'] / closed['step ms']:.2f}x; asking alone costs {asked['step ms'] - closed['step ms']:.1f} "
        "ms of a step."
    )


def _of_decisions(found: Found) -> str:
    rows, tests = found.of("models", model="shipped"), [row for row in found.of(PROCESS) if "passed" in row]
    agreed = [f"{row['agree']:.2%} in {row['dtype']}" for row in rows]
    passed, failed = (sum(row[name] for row in tests) for name in ("passed", "failed"))
    return (
        f"The shipped model decides as on the CPU for {_listed(agreed)} of its pairs, and {passed} of "
        f"{passed + failed} GPU tests that ended passed."
    )


def _listed(parts: list[str]) -> str:
    """Join parts as a sentence does.

    Raises:
        LookupError: There are none.
    """
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


SENTENCES = (_of_prefill, _of_decode, _of_open, _of_model, _of_decisions)
