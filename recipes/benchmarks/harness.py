"""What every benchmark shares: interleaved timing, the environment, and results as JSON, Markdown and PNG."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import patchattn

_MOST_LEVEL_LABELS = 4
Row = dict[str, Any]
_BUSY = 0.1


@dataclass(frozen=True)
class Timing:
    """How long one variant takes, in milliseconds, and how it compares with another of the same repeats.

    Args:
        median: Median over the repeats.
        low: First quartile.
        high: Third quartile.
        samples: Every repeat, in order.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarise repeats."""
        ordered = sorted(samples)
        low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
        return cls(statistics.median(ordered), low, high, tuple(samples))

    def ratio(self, other: Timing) -> float:
        """Median over the repeats of this time divided by the other's in the same repeat."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


@dataclass(frozen=True)
class Timed:
    """Timings of several variants.

    Args:
        timings: By variant.
        is_quiet: False where other programs used more than a tenth of the cores in too many repeats.
    """

    timings: dict[str, Timing]
    is_quiet: bool

    def fastest(self, names: list[str]) -> str:
        """Return the variant with the lowest median."""
        return min(names, key=lambda name: self.timings[name].median)


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
    now = time.process_time if clock == "cpu" else time.perf_counter
    calls = {}
    for name, variant in variants.items():
        variant()
        calls[name] = max(1, min(1000, round(at_least_ms / max(_milliseconds(variant, 1, device, now), 1e-3))))
    quiet: list[dict[str, float]] = []
    every: list[dict[str, float]] = []
    while len(quiet) < repeats and len(every) < 2 * repeats:
        before = _foreign_seconds()
        begin = time.perf_counter()
        sample = {name: _milliseconds(variant, calls[name], device, now) for name, variant in variants.items()}
        foreign = _foreign_seconds() - before
        every.append(sample)
        if clock == "cpu" or foreign <= _BUSY * (time.perf_counter() - begin) * (os.cpu_count() or 1):
            quiet.append(sample)
    is_quiet = len(quiet) >= min(3, repeats)
    chosen = quiet if is_quiet else every
    return Timed({name: Timing.of([sample[name] for sample in chosen]) for name in variants}, is_quiet)


def _milliseconds(variant: Callable[[], Any], calls: int, device: torch.device, now: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = now()
    for _ in range(calls):
        variant()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (now() - begin) / calls


def _foreign_seconds() -> float:
    """CPU seconds that other programs have used since the machine started; 0 where the system does not tell."""
    if platform.system() != "Linux":
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


def arguments(description: str) -> argparse.ArgumentParser:
    """Make the parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of each variant")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for one thread, busy machines")
    parser.add_argument("--out", type=Path, default=Path("docs/results/benchmarks"), help="folder of the results")
    parser.add_argument("--name", default="", help="name of the result files; the benchmark's own by default")
    return parser


def prepare(options: argparse.Namespace) -> torch.device:
    """Apply the options that all benchmarks have."""
    if options.clock == "cpu":
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device(options.device)


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
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on the error stream; the function given says what comes next and advances it."""
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(description: str) -> None:
            nonlocal started
            bar.update(task, description=description, advance=1 if started else 0)
            started = True

        yield step


def save(
    options: argparse.Namespace,
    name: str,
    title: str,
    rows: list[Row],
    figure: Figure | None = None,
    notes: str = "",
) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table."""
    device = torch.device(options.device)
    folder, stem = options.out, options.name or name
    folder.mkdir(parents=True, exist_ok=True)
    # JSON has no NaN, which stands for what was not asked.
    rows = [{key: None if content != content else content for key, content in row.items()} for row in rows]
    found = {
        "benchmark": name,
        "command": command_line(),
        "environment": environment(device) | {"clock": options.clock},
        "rows": rows,
    }
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1, default=asdict) + "\n", encoding="utf-8")
    made_by = f"Made by `{found['command']}`."
    text = f"# {title}\n\n{made_by} {notes}\n\n{described(found['environment'])}\n\n{table(rows)}\n"
    if figure is not None:
        figure.savefig(folder / f"{stem}.png", dpi=120)
        text += f"\n![{title}]({stem}.png)\n"
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    Console(width=200).print(table(rows), markup=False, highlight=False)


def command_line() -> str:
    """Return the command that runs this benchmark again, without the folder of the results."""
    program, *given = sys.argv
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return " ".join(["python", f"recipes/benchmarks/{Path(program).name}", *given])


def described(environment: dict[str, Any]) -> str:
    """Say in one sentence where the numbers come from."""
    return (
        f"{environment['device']}, threads: {environment['threads']}, cores: {environment['cores']}, "
        f"clock: {environment['clock']}, "
        f"{environment['cpu_capability']}; patchattn {environment['patchattn']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, Python {environment['python']}."
    )


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


def speedup_figure(rows: list[Row], *, x: str, series: str, title: str) -> Figure:
    """Draw the speed-up over `x`, one line for each value of `series`, and the arithmetic limit as dashes."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, label in enumerate(dict.fromkeys(row[series] for row in rows)):
        chosen = [row for row in rows if row[series] == label]
        at = [row[x] for row in chosen]
        axes.plot(at, [row["speed-up"] for row in chosen], "o-", color=f"C{index % 10}", label=str(label))
        axes.plot(at, [row["limit"] for row in chosen], ":", color=f"C{index % 10}", linewidth=1)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel="times as fast as the fastest dense", title=title)
    low, high = axes.get_ylim()
    factors = [factor for factor in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= factor <= high]
    axes.set_yticks(factors, [f"{factor:g}x" for factor in factors])
    tick_lengths(axes, rows, x)
    axes.legend(fontsize=8)
    return figure


def tick_lengths(axes: Any, rows: list[Row], x: str) -> None:
    """Mark the measured lengths on a logarithmic x axis, and nothing between them."""
    lengths = sorted({row[x] for row in rows})
    rotation = 45 if len(lengths) > _MOST_LEVEL_LABELS else 0
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=rotation)
    axes.minorticks_off()
