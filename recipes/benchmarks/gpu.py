"""Everything that is to be known of a CUDA GPU, in one run that ends in time: checks, tests, one layer, whole models.

python recipes/benchmarks/gpu.py --out FOLDER
python recipes/benchmarks/gpu.py --page FOLDER

Needs no installation and no network. The stages run one after another, most valuable first, each within its own
seconds; what a stage leaves over goes to those after it. Each is a process of its own, so that a crash, a full memory
or a hang costs its stage only; rows are on disk as soon as they are measured. `--page` makes
docs/results/benchmarks-gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMAND = "python recipes/benchmarks/gpu.py --out FOLDER"
ROWS, RESULT, LOG, PROFILES = "rows.jsonl", "gpu.json", "log.txt", "profiles.txt"
ENVIRONMENT, PROCESS = "environment", "process"
"""Stages of rows that no stage measures: what the machine is, and how each process ended."""
MINUTES = 9.0
LIMITS = {"check": 55, "together": 190, "layer": 130, "llama": 130, "profile": 35}
"""Seconds of each stage for `MINUTES`."""
NEEDED = ("torch", "transformers", "pydantic", "safetensors", "numpy", "huggingface_hub", "matplotlib", "rich", "typer")
NEEDED_BY_TESTS = ("pytest", "hypothesis")


class Process(NamedTuple):
    """A process of a stage: its name in the rows, and its command."""

    name: str
    command: list[str]


class Running(NamedTuple):
    """A process that was started, when, and where it writes what it has to say."""

    name: str
    process: subprocess.Popen[bytes]
    begin: float
    log: Path


def main() -> None:
    """Run the stages, or make the page of what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results; $OUT or runs/gpu by default")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it")
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--parts", type=int, help="processes that share the tests; by the number of cores")
    parser.add_argument("--rehearse", action="store_true", help="go all the way on a CPU, with tiny sizes")
    parser.add_argument(
        "--page", type=Path, nargs="?", const=Path(), metavar="FOLDER", help="make the page, run nothing"
    )
    options = parser.parse_args()
    missing = [name for name in (*NEEDED, *NEEDED_BY_TESTS) if importlib.util.find_spec(name) is None]
    if set(missing) & set(NEEDED):
        parser.error(f"not installed: {', '.join(missing)}; install them, or put them on PYTHONPATH")
    # Let modules of the project and of this folder be imported, installed or not.
    sys.path[:0] = [str(ROOT), str(HERE)]
    import torch
    from gpu_page import make_page, summary

    if options.page is not None:
        make_page(options.page / RESULT if options.page != Path() else None)
        return
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --rehearse goes the same way on a CPU")
    options.out = (options.out or Path(os.environ.get("OUT", "runs/gpu"))).resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, RESULT, LOG, PROFILES):
        (options.out / name).unlink(missing_ok=True)
    if missing:
        print(f"not installed: {', '.join(missing)}; the tests will not run", flush=True)
    scale = 60 * options.minutes / sum(LIMITS.values())
    end = begin = time.monotonic()
    for stage in options.stages:
        end += scale * LIMITS[stage]
        print(f"{stage}: until {end - begin:.0f} s", flush=True)
        run(stage, processes(stage, options), end, options)
        write_result(options.out)
    print(summary(json.loads((options.out / RESULT).read_text(encoding="utf-8"))))


def processes(stage: str, options: argparse.Namespace) -> list[Process]:
    """List what runs at the same time in a stage: only what is not timed has company."""

    def measuring(name: str, *more: str) -> Process:
        given = ["--out", str(options.out), *(["--rehearse"] if options.rehearse else []), *more]
        return Process(" ".join((name, *more)), [sys.executable, str(HERE / "gpu_stages.py"), name, *given])

    if stage != "together":
        return [measuring(stage)]
    # Compiled kernels stay on disk: what is compiled beside the tests, the timed stages find there.
    beside = [measuring("models"), measuring("layer", "--warm"), measuring("llama", "--warm"), measuring("doctor")]
    parts = options.parts or max(1, (os.cpu_count() or 1) - len(beside))
    return [*beside, *(Process(f"tests {part}/{parts}", gpu_tests(part, parts)) for part in range(1, parts + 1))]


def gpu_tests(part: int, parts: int) -> list[str]:
    """Make the command of one part of the tests marked `gpu`; it needs no plugin of pytest."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    # A warning of a version that never ran these tests is to be read, not to end them.
    settings = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    report = ["-v", "--tb=short", "--durations=5", "-m", "gpu", f"--part={part}/{parts}"]
    return [sys.executable, "-m", "pytest", *settings, *report, *map(str, files)]


def run(stage: str, started: list[Process], end: float, options: argparse.Namespace) -> None:
    """Run the processes of a stage until they end or the time does; keep what they say, and how each ended."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if len(started) > 1:
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    with terminable(), tempfile.TemporaryDirectory() as logs:
        running = [begun(process, Path(logs, f"{at}"), environment) for at, process in enumerate(started)]
        try:
            while running:
                is_late = time.monotonic() >= end
                for each in [each for each in running if is_late or each.process.poll() is not None]:
                    running.remove(each)
                    ended = ending(each.process)
                    row = {
                        "within": stage,
                        "process": each.name,
                        "ended": ended,
                        "seconds": time.monotonic() - each.begin,
                    }
                    said = each.log.read_text("utf-8", "replace")
                    if each.name.startswith("tests"):
                        row |= outcomes(said)
                    add_row(options.out, PROCESS, row)
                    with (options.out / LOG).open("a", encoding="utf-8") as log:
                        log.write(f"\n===== {stage}: {each.name}, {ended}\n{said}")
                time.sleep(0.1)
        finally:
            for each in running:
                ending(each.process)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let a request to terminate end what was started too, which would otherwise go on."""
    before = signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def begun(process: Process, log: Path, environment: dict[str, str]) -> Running:
    """Start a process in a group of its own, so that it can be ended with all that it starts."""
    with log.open("wb") as file:
        started = subprocess.Popen(
            process.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    return Running(process.name, started, time.monotonic(), log)


def ending(process: subprocess.Popen[bytes]) -> str:
    """Say how a process ended, in time or not, and end all that it started, some of which may outlive it."""
    code = process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "out of time" if code is None else "well" if code == 0 else f"with exit code {code}"


def outcomes(said: str) -> dict[str, Any]:
    """Count what the tests of a part came to, those before the time was out too, and name those that failed."""
    lines = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", said, flags=re.MULTILINE)
    counts = Counter(outcome.lower() for _, outcome in lines)
    found: dict[str, Any] = {name: counts[name] for name in ("passed", "failed", "error", "skipped")}
    failed = [name.rpartition("/")[2] for name, outcome in lines if outcome in ("FAILED", "ERROR")]
    return found | {"failures": "; ".join(failed)}


def add_row(folder: Path, stage: str, row: dict[str, Any]) -> None:
    """Append a row in one call, into which other processes can't write."""
    line = json.dumps({"stage": stage, "row": row}) + "\n"
    with (folder / ROWS).open("ab", buffering=0) as file:
        file.write(line.encode())


def write_result(folder: Path) -> None:
    """Put all rows so far into one file."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text("utf-8").splitlines()]
    environment = next((entry["row"] for entry in rows if entry["stage"] == ENVIRONMENT), None)
    found = {
        "benchmark": "gpu",
        "command": COMMAND,
        "environment": environment,
        "rows": [{"stage": entry["stage"], **entry["row"]} for entry in rows if entry["stage"] != ENVIRONMENT],
    }
    (folder / RESULT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
