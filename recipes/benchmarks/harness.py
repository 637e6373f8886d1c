"""What every benchmark shares: options, timing in turn, the environment, and results as JSON, Markdown and PNG."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

import patchattn
from patchattn.evaluation.rows import Store

RESULTS = Path("recipes/benchmarks/results")
PAGES = Path("docs/results/benchmarks")
Row = dict[str, Any]
Item = TypeVar("Item")

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_BUSY = 0.1


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Make the parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of each variant")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help="cpu: for one thread, busy machines")
    parser.add_argument("--out", type=Path, help=f"folder of all results, in place of {RESULTS} and {PAGES}")
    parser.add_argument("--name", default="", help="name of the result files; the benchmark's own by default")
    return parser


def prepare(options: argparse.Namespace, *, cpu: Row | None = None, cuda: Row | None = None) -> argparse.Namespace:
    """Apply the options that all benchmarks have, and fill in those that were not given by the kind of device."""
    options.device = torch.device(options.device)
    for name, value in ((cuda if options.device.type == "cuda" else cpu) or {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.clock == "cpu":
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def progress(items: Sequence[Item], describe: Callable[[Item], str]) -> Iterator[Item]:
    """Go through items, with a bar on the error stream that says which one is measured."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(items))
        for item in items:
            bar.update(task, description=describe(item))
            yield item
            bar.advance(task)


@dataclass(frozen=True)
class Timed:
    """How long variants take.

    Args:
        samples: Milliseconds of every repeat, in order, by variant.
        is_quiet: False where other programs used more than a tenth of the cores in too many repeats.
    """

    samples: dict[Any, list[float]]
    is_quiet: bool

    def ms(self, name: Any) -> float:
        """Return the median over the repeats."""
        return statistics.median(self.samples[name])

    def ratios(self, name: Any, other: Any) -> list[float]:
        """Divide one variant's time by another's within each repeat, and sort."""
        return sorted(a / b for a, b in zip(self.samples[name], self.samples[other], strict=True))

    def speedup(self, dense: Any, name: Any) -> Row:
        """Say how many times as fast as `dense` a variant is: median, lowest and highest over the repeats."""
        ratios = self.ratios(dense, name)
        return {"speed-up": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def measure(
    variants: dict[str, Callable[[], Any]],
    *,
    device: torch.device,
    repeats: int = 7,
    at_least_ms: float = 20.0,
    clock: str = "wall",
) -> Timed:
    """Time variants in turn, so that what slows the machine down slows all of them.

    Args:
        variants: Functions by name; each is called twice to warm up.
        device: Device to wait for.
        repeats: Number of repeats wanted; as many again are made where other programs disturb.
        at_least_ms: A repeat calls a variant so often that it takes about this long.
        clock: `"wall"`, or `"cpu"` for the CPU time of this program: what a busy machine leaves to measure with one
            thread.
    """
    now = CLOCKS[clock]
    calls = {}
    for name, variant in variants.items():
        variant()
        calls[name] = max(1, min(1000, round(at_least_ms / max(milliseconds(variant, device, 1, now), 1e-3))))

    def timed(name: str) -> float:
        return milliseconds(variants[name], device, calls[name], now)

    return in_turn(variants, timed, repeats=repeats, least=repeats, clock=clock)


def in_turn(
    names: Iterable[Any],
    timed: Callable[[Any], float],
    *,
    repeats: int,
    least: int,
    budget: float = math.inf,
    clock: str = "wall",
) -> Timed:
    """Repeat calls in turn until there are enough quiet repeats or the time is spent.

    Every other repeat goes backwards: what is called late in a repeat may find the machine warmer or fuller.

    Args:
        names: The variants.
        timed: Makes the calls of a variant that are one sample and returns its milliseconds.
        repeats: Number of repeats wanted; as many again are made where other programs disturb.
        least: Number of repeats that are made even if they take longer than the budget.
        budget: Seconds after which no further repeat is begun.
        clock: As in `measure`.
    """
    quiet: list[dict[Any, float]] = []
    every: list[dict[Any, float]] = []
    forwards, end = list(names), time.perf_counter() + budget
    while len(quiet) < repeats and len(every) < 2 * repeats and (len(every) < least or time.perf_counter() < end):
        before, begin = _foreign_seconds(), time.perf_counter()
        sample = {name: timed(name) for name in forwards[:: -1 if len(every) % 2 else 1]}
        foreign = _foreign_seconds() - before
        every.append(sample)
        if clock == "cpu" or foreign <= _BUSY * (time.perf_counter() - begin) * (os.cpu_count() or 1):
            quiet.append(sample)
    is_quiet = len(quiet) >= min(3, repeats, len(every))
    chosen = quiet if is_quiet else every
    return Timed({name: [sample[name] for sample in chosen] for name in forwards}, is_quiet)


def milliseconds(
    variant: Callable[[], Any], device: torch.device, calls: int = 1, now: Callable[[], float] = time.perf_counter
) -> float:
    """Time one call of a function, the mean of several in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    begin = now()
    for _ in range(calls):
        variant()
    wait(device)
    return 1e3 * (now() - begin) / calls


def _foreign_seconds() -> float:
    """CPU seconds that other programs have used since the machine started; 0 where the system does not tell."""
    if platform.system() != "Linux":
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


def environment(device: torch.device) -> dict[str, Any]:
    """Describe versions and hardware, without names or paths of the machine."""
    return {
        "patchattn": patchattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def save(
    options: argparse.Namespace, name: str, title: str, rows: list[Row], notes: str, figure: Figure | None = None
) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table."""
    stem = options.name or name
    found = {
        "benchmark": name,
        "command": command_line(),
        "title": title,
        "notes": notes,
        "environment": environment(options.device) | {"clock": options.clock},
        # JSON has no NaN, which stands for what was not asked.
        "rows": [{key: None if content != content else content for key, content in row.items()} for row in rows],
    }
    results, pages = options.out or RESULTS, options.out or PAGES
    for folder in (results, pages):
        folder.mkdir(parents=True, exist_ok=True)
    (results / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        figure.savefig(pages / f"{stem}.png", dpi=120)
    write_page(found, pages / f"{stem}.md")
    Console(width=200).print(table(found["rows"]), markup=False, highlight=False)


def command_line() -> str:
    """Return the command that runs this benchmark again, without folders of this machine."""
    program, *given = sys.argv
    command = re.sub(r" --out \S+", "", shlex.join(["python", f"recipes/benchmarks/{Path(program).name}", *given]))
    return re.sub(r" /\S+/", " ", command)


def kept_by(store: Store[Item]) -> list[Item]:
    """Read what this command has kept of a run that was broken off; rows name it in `command`."""
    return [kept for kept in store.rows() if kept.command == command_line()]


def write_page(found: dict[str, Any], path: Path) -> None:
    """Write the page of one result, with the picture that lies beside it."""
    parts = [
        f"# {found['title']}",
        f"Made by `{found['command']}`. {found['notes']}",
        described(found["environment"]),
        table(found["rows"]),
    ]
    if path.with_suffix(".png").exists():
        parts.append(f"![{found['title']}]({path.stem}.png)")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def described(environment: dict[str, Any]) -> str:
    """Say in one sentence where the numbers come from."""
    return (
        "{device}, threads: {threads}, cores: {cores}, clock: {clock}, {cpu_capability}; patchattn {patchattn}, "
        "torch {torch}, transformers {transformers}, Python {python}."
    ).format(**environment)


def table(rows: list[Row]) -> str:
    """Lay rows out as a Markdown table; columns in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(content: Any) -> str:
    if content is None:
        return "-"
    if isinstance(content, bool):
        return "yes" if content else "no"
    if isinstance(content, float):
        return f"{content:.3g}" if abs(content) < 100 else f"{content:,.0f}"
    return f"{content:,}" if isinstance(content, int) else str(content)


def speedup_figure(rows: list[Row], series: Sequence[str], title: str) -> Figure:
    """Draw the speed-up over the tokens, a line for each value of `series`, and the limit dotted where there is one."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_speedups(figure.add_subplot(), rows, series, title)
    return figure


def draw_speedups(axes: Axes, rows: list[Row], series: Sequence[str], title: str) -> None:
    """Draw `speedup_figure` into a panel of another figure."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(", ".join(row[name] for name in series), []).append(row)
    for index, (label, chosen) in enumerate(lines.items()):
        at, color = [row["tokens"] for row in chosen], f"C{index % 10}"
        axes.plot(at, [row["speed-up"] for row in chosen], "o-", color=color, label=label)
        axes.plot(at, [row.get("limit", float("nan")) for row in chosen], ":", color=color, linewidth=1)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times as fast as dense", title=title)
    low, high = axes.get_ylim()
    factors = [factor for factor in (0.5, 0.7, 1, 1.5, 2, 5, 10, 20, 50, 100, 200) if low <= factor <= high]
    axes.set_yticks(factors, [f"{factor:g}x" for factor in factors])
    lengths = sorted({row["tokens"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45 if len(lengths) > 4 else 0)
    axes.minorticks_off()
    axes.legend(fontsize=8)
