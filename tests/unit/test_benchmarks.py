"""Every benchmark runs at a tiny size and writes what it promises; nothing here looks at times."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "benchmarks"
TINY = {
    "prefill": "layer prefill --lengths 400 --dtypes fp32 --open 0.5",
    "decode": "layer decode --lengths 400 --dtypes bf16 --no-replay",
    "gate_overhead": "overhead gate --lengths 600",
    "report_recording": "overhead recording --lengths 700 --window 64 --steps 2",
    "end_to_end": "model --lengths 40 --steps 2 --window 16",
    "compile": "compile --lengths 40 --steps 2 --compiler eager",
}


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a benchmark as its command would."""
    name, *given = command.split()
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_writes_numbers_table_and_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(f"{TINY[name]} --device cpu --repeats 2 --out {tmp_path}", monkeypatch)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rows"]
    script, *given = TINY[name].split()
    assert found["command"] == " ".join(
        ["python", f"recipes/benchmarks/{script}.py", *given, "--device cpu --repeats 2"]
    )
    assert {"torch", "device", "threads"} <= set(found["environment"])
    assert str(Path.home()) not in json.dumps(found["environment"])
    assert (tmp_path / f"{name}.md").read_text().count("\n|") == len(found["rows"]) + 2
    assert (tmp_path / f"{name}.png").exists() == (name != "compile")


@pytest.mark.parametrize("what", ["dense", "gated", "gate"])
def test_memory_measures_a_peak(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"memory --device cpu --measure 600 {what}", monkeypatch)
    assert float(capsys.readouterr().out) >= 0


def test_pages_are_what_the_stored_rows_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ROOT / "docs" / "results"
    pages = tmp_path / "benchmarks"
    pages.mkdir()
    for picture in (results / "benchmarks").glob("*.png"):
        shutil.copy(picture, pages)
    monkeypatch.chdir(ROOT)
    run(f"goals --pages {pages}", monkeypatch)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.md"))
    assert made == sorted(
        path.relative_to(results) for path in (results / "benchmarks.md", *(results / "benchmarks").glob("*.md"))
    )
    for path in made:
        assert (tmp_path / path).read_text() == (results / path).read_text(), path


def test_interleaved_repeats_are_compared_within_a_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Timed, measure  # pyright: ignore[reportMissingImports]

    # The second repeat was slow for both: the ratio does not see it.
    timed = Timed({"dense": [4.0, 40.0, 4.4], "gated": [2.0, 20.0, 2.2]}, is_quiet=True)
    assert timed.speedup("dense", "gated") == {"speed-up": 2.0, "lowest": 2.0, "highest": 2.0}
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    timed = measure(variants, device=torch.device("cpu"), repeats=3, at_least_ms=0.0)
    assert set(timed.samples) == {"one", "other"}
    assert calls[4:8] == ["one", "other"] * 2
