"""Every benchmark runs at a tiny size and writes what it promises; nothing here looks at times."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"
TINY = {
    "attention_prefill": "--lengths 400 --dtypes fp32 --open 0.5",
    "attention_decode": "--lengths 400 --dtypes bf16 --no-replay",
    "gate_overhead": "--lengths 600",
    "end_to_end": "--lengths 40 --steps 2 --window 16",
    "report_recording": "--length 700 --window 64 --steps 2",
    "compile": "--lengths 40 --steps 2 --compiler eager",
}


def run(name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a benchmark as its command would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [name, *given.split()])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_writes_numbers_table_and_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(name, f"{TINY[name]} --device cpu --repeats 2 --out {tmp_path}", monkeypatch)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rows"]
    assert {"torch", "device", "threads"} <= set(found["environment"])
    assert str(Path.home()) not in json.dumps(found["environment"])
    assert (tmp_path / f"{name}.md").read_text().count("\n|") == len(found["rows"]) + 2
    assert (tmp_path / f"{name}.png").exists() == (name != "compile")


@pytest.mark.parametrize("what", ["dense", "gated", "gate"])
def test_memory_measures_a_peak(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("memory", f"--device cpu --measure 600 {what}", monkeypatch)
    assert float(capsys.readouterr().out) >= 0


def test_interleaved_repeats_are_compared_within_a_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Timing, measure  # pyright: ignore[reportMissingImports]

    # The second repeat was slow for both: the ratio does not see it.
    assert Timing.of([4.0, 40.0, 4.4]).ratio(Timing.of([2.0, 20.0, 2.2])) == 2.0
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    timed = measure(variants, device=torch.device("cpu"), repeats=3, at_least_ms=0.0)
    assert set(timed.timings) == {"one", "other"}
    assert calls[4:8] == ["one", "other"] * 2
