"""Every benchmark runs at a tiny size and writes what it promises; nothing here looks at times."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patchattn import demo
from patchattn.testing import tiny_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "benchmarks"
TINY = {
    "prefill": "layer prefill --lengths 400 --dtypes fp32 --open 0.5",
    "decode": "layer decode --lengths 400 --dtypes bf16 --no-replay",
    "gate_overhead": "overhead gate --lengths 600",
    "report_recording": "overhead recording --lengths 700 --window 64 --steps 2",
    "whole_model": "model --lengths 40 80 --steps 2 --window 16 --dtypes bf16",
    "drafting": "drafting --lengths 150 --new 6 --window 64 --dtype fp32",
    "drafted_text": "drafted_text --count 2 --longest 600 --new 6",
    "serving": "serving --loads 2x80 --new 2 --window 16 --batch-tokens 64 128",
    "serving_in_turn": "serving --loads 2x90 --new 4 --batch-tokens 128 --policies 'in turn' default --name "
    "serving_in_turn",
    "served_text": "served_text --count 6 --batch 3 --longest 400 --new 4 --window 64 --batch-tokens 128",
    "compile": "compile --lengths 40 --steps 2 --compiler eager",
}


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a benchmark as its command would."""
    name, *given = shlex.split(command)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.usefixtures("quick_demo")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("serv") else name for name in TINY]
)
def test_a_benchmark_writes_numbers_table_and_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("serv"):
        engine = "transformers.generation.continuous_batching.cache_allocators"
        pytest.importorskip(engine, reason="the engine of transformers before 5.24 runs no patched model")
    run(f"{TINY[name]} --device cpu --repeats 2 --out {tmp_path}", monkeypatch)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rows"]
    script, given = TINY[name].split(maxsplit=1)
    assert found["command"] == f"python recipes/benchmarks/{script}.py {given} --device cpu --repeats 2"
    assert {"torch", "device", "threads"} <= set(found["environment"])
    assert str(Path.home()) not in json.dumps(found["environment"])
    assert (tmp_path / f"{name}.md").read_text().count("\n|") == len(found["rows"]) + 2
    without = ("compile", "drafted_text", "served_text", "serving_in_turn")
    assert (tmp_path / f"{name}.png").exists() == (name not in without)
    if name == "serving_in_turn":
        assert [row["policy"].partition(",")[0] for row in found["rows"]] == ["stock `generate` in turn", "default"]
        assert found["rows"][0]["whole: of in turn"] == 1
        assert {row["whole: of stock"] for row in found["rows"]} == {None}
    if name == "served_text":
        for row in found["rows"]:
            assert row["lost"] == row["other opens"] == 0
            assert row["same"] + row["level"] == row["texts"] > 0
    if name == "drafted_text":
        assert [(row["same"], row["lost"]) for row in found["rows"]] == [(2, 0), (2, 0)]
    if name == "drafting":
        assert all(math.isnan(row["memory"] or math.nan) or abs(row["memory"]) < 1 for row in found["rows"])


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
    assert calls[4:8] == ["one", "other", "other", "one"], "every other repeat goes backwards"


@pytest.mark.parametrize(
    ("repeats", "budget", "made"),
    [(5, math.inf, 5), (5, 0.0, 2), (5, 3.5, 4), (1, math.inf, 1)],
    ids=["enough", "two are always made", "none is begun late", "as many as wanted"],
)
def test_repeats_of_long_calls_are_bounded(
    repeats: int, budget: float, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness  # pyright: ignore[reportMissingImports]

    clock, calls = [0.0], []

    def timed(name: str) -> float:
        calls.append(name)
        clock[0] += 0.5
        return 500.0

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness, "_foreign_seconds", lambda: 0.0)
    found = harness.in_turn(("one", "other"), timed, repeats=repeats, least=2, budget=budget)
    assert calls == (["one", "other", "other", "one"] * made)[: 2 * made], "every other repeat goes backwards"
    assert found.samples == {"one": [500.0] * made, "other": [500.0] * made}
    # Other programs take all of the time: as many repeats again, and no more.
    monkeypatch.setattr(harness, "_foreign_seconds", lambda: 100 * clock[0])
    assert not harness.in_turn(("one", "other"), timed, repeats=repeats, least=2).is_quiet
    assert len(calls) == 2 * made + 2 * 2 * repeats


def test_the_limit_is_amdahls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from whole import amdahl  # pyright: ignore[reportMissingImports]

    # Three quarters are attention, a third of the keys is scored: half of the time is left.
    assert amdahl(0.75, 1 / 3) == pytest.approx(2)
    assert amdahl(0.75, 0.0) == pytest.approx(4)
    assert amdahl(0.75, math.nan) == amdahl(0.0, 0.1) == 1


def test_the_faster_stock_cache_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Timed  # pyright: ignore[reportMissingImports]
    from whole import OPEN, STOCK, compared, faster_stock  # pyright: ignore[reportMissingImports]

    samples = {
        (STOCK, "dynamic"): [12.0, 12.0, 120.0],
        (STOCK, "static"): [6.0, 6.0, 60.0],
        (OPEN, "dynamic"): [8.0, 8.0, 80.0],
        (OPEN, "static"): [5.0, 5.0, 50.0],
        ("default", "dynamic"): [4.0, 4.0, 40.0],
        ("default", "static"): [3.0, 2.0, 30.0],
    }
    timed = Timed(samples, is_quiet=True)
    assert faster_stock(timed) == (STOCK, "static")
    dynamic, static = (compared(timed, ("default", cache)) for cache in ("dynamic", "static"))
    assert (dynamic["speed-up"], dynamic["of same cache"], dynamic["of open"]) == (1.5, 3.0, 2.0)
    assert (static["lowest"], static["speed-up"], static["highest"]) == (2.0, 2.0, 3.0)
    assert compared(timed, (STOCK, "dynamic"))["speed-up"] == 0.5
    # Of the other phase the other cache may be the faster one.
    slow = Timed(samples | {(STOCK, "static"): [13.0, 13.0, 130.0]}, is_quiet=True)
    assert faster_stock(slow) == (STOCK, "dynamic")


FAKE_LLAMA = """
class Llama:
    def __init__(self, file, *, n_ctx, n_threads, n_threads_batch, verbose):
        assert file.endswith("small.gguf") and n_threads == n_threads_batch >= 1
        self.room, self.read = n_ctx, []

    def reset(self):
        self.read = []

    def eval(self, tokens):
        self.read += tokens
        assert len(self.read) <= self.room
"""


def test_a_real_model_is_measured_and_a_broken_off_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(FAKE_LLAMA)
    (tmp_path / "small.gguf").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = demo.model_folder()
    given = f"--models {folder} --lengths 40 4096 8192 --steps 2 --device cpu --repeats 1 --budget 0 --dtypes bf16"
    command = f"python recipes/benchmarks/model.py {given} --llama small.gguf".replace(str(folder), folder.name)
    # 8,192 tokens are more than the model reads; 4,096 are there already, of another command they would not count.
    kept = {"model": str(folder), "dtype": "bf16", "length": 4096, "rows": made_up_rows(4096)}
    lines = [kept | {"command": command}, kept | {"command": "another", "length": 40}]
    stored = tmp_path / "real_model.jsonl"
    stored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(f"model {given} --llama {tmp_path}/small.gguf --out {tmp_path}", monkeypatch)
    assert not stored.exists()
    found = json.loads((tmp_path / "real_model.json").read_text())
    assert (found["benchmark"], found["command"]) == ("real_model", command)
    assert str(folder.parent) not in json.dumps(found)
    assert found["rows"][: len(kept["rows"])] == kept["rows"]
    rows = {(row["phase"], row["policy"], row["cache"]): row for row in found["rows"][len(kept["rows"]) :]}
    assert {row["length"] for row in rows.values()} == {40}
    policies = {policy for _, policy, _ in rows}
    assert policies > {"stock", "every gate open", "default"}
    n_patched = len(policies - {"stock", "llama.cpp, small"})
    assert len([phase for phase, _, _ in rows if phase == "decode"]) == 2 * (1 + n_patched) + 1
    # Of the patched models only the default reads into a static cache.
    assert len([phase for phase, _, _ in rows if phase == "prefill"]) == 2 + (n_patched + 1) + 1
    for (phase, policy, _), row in rows.items():
        assert row["model"] == folder.name
        assert (row["tokens/s" if phase == "decode" else "first token s"]) > 0
        if policy == "stock":
            assert 0 < row["attention"] < 1
    assert rows["prefill", "llama.cpp, small", "float16"]["speed-up"] > 0


def test_a_static_cache_that_was_not_read_into_holds_what_the_dynamic_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    from model import Readers  # pyright: ignore[reportMissingImports]

    model = tiny_model("llama")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        readers = Readers({"one": model, "other": model}, tokens, 30)
        for cell in (("one", "dynamic"), ("other", "dynamic"), ("other", "static")):
            readers.prefill(cell)
        readers.fill_other_caches()
        for cell in readers.cells:
            readers.decode(cell, 6)
    assert set(readers.at.values()) == {37}
    expected = readers.caches["one", "dynamic"].layers
    for cell, cache in readers.caches.items():
        for layer, dynamic in zip(cache.layers, expected, strict=True):
            torch.testing.assert_close(layer.keys, dynamic.keys, msg=str(cell))
            torch.testing.assert_close(layer.values, dynamic.values, msg=str(cell))


POLICIES = ("stock", "every gate open", "default", "default, `min_bulk=0`", "all closed, `min_bulk=0`")


def made_up_rows(*lengths: int, default: float = 1.7) -> list[dict[str, Any]]:
    """Rows of a real model in which only the default has a speed-up."""
    rows = []
    for length, phase, policy, cache in itertools.product(
        lengths, ("prefill", "decode"), POLICIES, ("dynamic", "static")
    ):
        row = {"model": "small", "dtype": "bf16", "length": length, "tokens": length, "phase": phase}
        row |= {"policy": policy, "cache": cache, "first token s": 2.0, "tokens/s": 3.0, "attention": 0.5}
        row |= {
            "speed-up": 1.0,
            "of same cache": 1.0,
            "of open": 1.2,
            "open": None,
            "density": 0.4,
            "limit": 1.5,
            "MiB": 10.0,
        }
        rows.append(row | ({"speed-up": default, "of same cache": default / 2} if policy == "default" else {}))
    return rows


def test_the_page_shows_goals_of_a_real_model_or_how_to_measure_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from whole import section  # pyright: ignore[reportMissingImports]

    assert "model.py --models FOLDER" in section([], "real_model")
    file = {"benchmark": "real_model", "title": "A real model", "stem": "real_model", "rows": made_up_rows(4096, 8192)}
    page = section([file], "real_model")
    assert "| first token, 8,192 tokens, of the faster stock cache | 1.70x / 1.6x |" in page
    assert "| lowest, of stock with the same cache | **0.85x / 0.98x** (first token, 4,096 tokens" in page
    assert "(benchmarks/real_model.png)" in page
    assert "| default, dynamic | 2 s, 1.70x | 2 s, 1.70x |" in page
    assert "| decode, default | - / 40% / 1.50x, 1.20x | - / 40% / 1.50x, 1.20x |" in page
    assert section([file], "whole_model").startswith("*Not measured*")
    # A run that was made at other lengths misses no goal: it says nothing about it.
    short = section([file | {"rows": made_up_rows(4096, default=1.1)}], "real_model")
    assert "| first token, 8,192 tokens, of the faster stock cache | not measured / 1.6x |" in short
    assert "**1.10x / 1.15x**" in short


@pytest.mark.parametrize("given", ["--models no/such/folder", "--llama no.gguf", "--lengths 5000"])
def test_what_is_not_there_is_refused_before_anything_is_measured(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(f"model {given} --out {tmp_path}", monkeypatch)
    assert given.split()[1] in capsys.readouterr().err


def test_a_peak_is_what_a_call_holds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from peak import resident_peak  # pyright: ignore[reportMissingImports]

    peaks = [resident_peak(lambda size=size: b"x" * (size << 20)) for size in (64, 8)]
    if math.isnan(peaks[0]):
        pytest.skip("only Linux tells the peak of a process, and lets it start anew")
    # The second starts anew below the first one's peak.
    assert peaks == pytest.approx([64, 8], abs=4)
