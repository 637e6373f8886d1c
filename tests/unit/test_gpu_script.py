"""The run on a GPU, without one: its processes, what it measures with tiny sizes on a CPU, and its page."""

from __future__ import annotations

import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "benchmarks"


@pytest.fixture(autouse=True)
def _modules_of_the_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    # Scripts of other folders have files of the same name.
    monkeypatch.delitem(sys.modules, "model", raising=False)
    yield
    for name, module in list(sys.modules.items()):
        if str(FOLDER) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def module(name: str) -> Any:
    return importlib.import_module(name)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_process_that_is_out_of_time_ends_with_its_children_and_its_rows_stay(tmp_path: Path) -> None:
    gpu = module("gpu")
    child = f"import time, os; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    slow = f"""
import subprocess, sys, time
sys.path.insert(0, {str(FOLDER)!r})
from pathlib import Path
from gpu import add_row
subprocess.Popen([sys.executable, "-c", {child!r}])
while not Path({str(tmp_path / "child")!r}).exists():
    time.sleep(0.01)
add_row(Path({str(tmp_path)!r}), "slow", {{"tokens": 1}})
time.sleep(60)
"""
    commands = {"slow": slow, "crash": "print('why'); raise SystemExit(3)", "quick": "pass"}
    started = [gpu.Process(name, [sys.executable, "-c", command]) for name, command in commands.items()]
    begin = time.monotonic()
    gpu.run("together", started, begin + 3, Namespace(out=tmp_path))
    assert 3 <= time.monotonic() - begin < 20
    rows = rows_in(tmp_path)
    assert {"stage": "slow", "row": {"tokens": 1}} in rows
    ended = {entry["row"]["process"]: entry["row"]["ended"] for entry in rows if entry["stage"] == "process"}
    assert ended == {"slow": "out of time", "crash": "with exit code 3", "quick": "well"}
    assert "crash, with exit code 3\nwhy" in (tmp_path / "log.txt").read_text()
    status = Path("/proc", (tmp_path / "child").read_text(), "stat")
    # Nobody may have waited for it yet.
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    gpu.write_result(tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"stage": "slow", "tokens": 1} in found["rows"]


def test_a_run_that_is_terminated_leaves_nothing_running(tmp_path: Path) -> None:
    gpu = module("gpu")
    command = f"""
import os, signal, time
from pathlib import Path
Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        gpu.run("layer", [gpu.Process("slow", [sys.executable, "-c", command])], math.inf, Namespace(out=tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_is_left_of_a_stage_goes_to_the_next_and_processes_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, ends = module("gpu"), {}

    def run(stage: str, started: list[Any], end: float, options: Namespace) -> None:
        ends[stage] = end - time.monotonic()
        names[stage] = [process.name for process in started]
        gpu.add_row(tmp_path, "process", {"process": stage, "ended": "well", "seconds": 0.0})

    names: dict[str, list[str]] = {}
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--out", str(tmp_path), "--minutes", str(gpu.MINUTES / 2), "--rehearse"]
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu.main()
    assert list(ends) == list(gpu.LIMITS)
    assert ends["layer"] == pytest.approx(sum(gpu.LIMITS[name] for name in ("check", "together", "layer")) / 2, abs=2)
    assert ends["profile"] == pytest.approx(30 * gpu.MINUTES, abs=2)
    assert sum(gpu.LIMITS.values()) == 60 * gpu.MINUTES < 600
    assert [name for name in names["together"] if name.startswith("tests")][-1] == "tests 12/12"
    assert "## Checks and tests" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit):
        module("gpu").main()
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in ("pydantic", "pytest") else name)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "not installed: pydantic, pytest" in capsys.readouterr().err


def test_outcomes_of_tests_are_counted_though_they_were_broken_off() -> None:
    said = """
tests/unit/test_a.py::test_one[a, b] PASSED  [ 10%]
tests/unit/test_a.py::test_two FAILED        [ 20%]
tests/unit/test_a.py::test_three SKIPPED (no) [ 30%]
tests/unit/test_a.py::test_four """
    found = module("gpu").outcomes(said)
    assert found == {"passed": 1, "failed": 1, "error": 0, "skipped": 1, "failures": "test_a.py::test_two"}


def test_parts_hold_every_test_once() -> None:
    conftest = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    seen = []
    for part in ("1/3", "2/3", "3/3"):
        items = [mock.Mock(number=number) for number in range(8)]
        left_out = mock.Mock()
        config: Any = SimpleNamespace(
            option=SimpleNamespace(part=part, markexpr=""), hook=SimpleNamespace(pytest_deselected=left_out)
        )
        conftest["pytest_collection_modifyitems"](config, items)
        seen += [item.number for item in items]
        assert len(items) + len(left_out.call_args.kwargs["items"]) == 8
    assert sorted(seen) == list(range(8))


def test_the_files_with_gpu_tests_are_found() -> None:
    command = module("gpu").gpu_tests(2, 3)
    assert {Path(word).name for word in command if word.endswith(".py")} >= {"test_flex_cuda.py", "test_models.py"}
    assert "--part=2/3" in command


@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (300, 300), (1, 300), (70, 400), (128, 512), (257, 1000)])
def test_the_causal_mask_is_that_of_create_block_mask(queries: int, keys: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    got = module("problems").causal_mask(queries, keys, torch.device("cpu"))
    causal = lambda b, h, row, key: key <= row + keys - queries  # noqa: E731
    plain = create_block_mask(causal, None, None, queries, keys, device="cpu")
    assert torch.equal(got.to_dense(), plain.to_dense())
    for counts, lists in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        # A last tile or block that is not whole has nothing behind its end to be masked here.
        ours, theirs = getattr(got, counts), getattr(plain, counts)
        if queries % 128 == keys % 128 == 0:
            assert torch.equal(ours, theirs)
        assert getattr(got, lists).max() < -(-keys // 128)
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
    zero = torch.zeros((), dtype=torch.int64)
    full = torch.zeros(got.shape[2] // 128 + 1, got.shape[3] // 128 + 1, dtype=torch.bool)
    for tile in range(got.full_kv_num_blocks.shape[2]):
        full[tile, got.full_kv_indices[0, 0, tile, : got.full_kv_num_blocks[0, 0, tile]].long()] = True
    seen = got.mask_mod(zero, zero, rows, columns) | torch.zeros(queries, keys, dtype=torch.bool)
    assert seen[full[rows // 128, columns // 128]].all()
    assert torch.equal(seen, causal(0, 0, rows, columns))


@pytest.mark.parametrize("queries", [1, 300])
def test_dense_flex_is_causal_attention(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = module("problems")
    monkeypatch.setattr(problems.torch, "compile", partial(torch.compile, backend="eager"))
    inputs = problems.make_inputs(problems.Shape(300, queries, dim=16), torch.float32, torch.device("cpu"))
    plain = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=queries > 1, enable_gqa=True
    )
    torch.testing.assert_close(problems.dense_flex(inputs)(), plain)


def test_timing_waits_for_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, events = module("harness"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setitem(harness.CLOCKS, "wall", lambda: events.append("clock") or float(len(events)))
    harness.measure({"one": lambda: events.append("call")}, device=torch.device("cuda"), repeats=1, at_least_ms=0.0)
    assert events[:6] == ["call", "wait", "clock", "call", "wait", "clock"]


def test_a_case_that_fails_is_a_row_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = module("gpu_stages")
    timed = mock.Mock(side_effect=[RuntimeError("out of\n memory"), [], [], [], [], []])
    monkeypatch.setattr(stages, "timed_rows", timed)
    stages.layer(Namespace(stage="layer", out=tmp_path, device=torch.device("cpu"), rehearse=True, warm=False))
    assert timed.call_count == 6
    (entry,) = rows_in(tmp_path)
    assert entry["row"] == {"phase": "prefill", "tokens": 512, "batch": 1, "problem": "RuntimeError: out of memory"}


@pytest.mark.slow
def test_the_whole_run_is_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--rehearse", "--parts", "1", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert made.returncode == 0, made.stderr
    rows = rows_in(tmp_path / "out")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert {entry["row"]["ended"] for entry in rows if entry["stage"] == "process"} == {"well"}, log
    assert {entry["stage"] for entry in rows} == {
        "environment", "process", "check", "doctor", "layer", "models", "llama", "profile"
    }  # fmt: skip
    # FlexAttention is switched off on a CPU, which is told; nothing else fails.
    assert {entry["stage"] for entry in rows if "problem" in entry["row"]} == {"doctor"}, log
    for entry in rows:
        if entry["stage"] == "models":
            assert 0.05 < entry["row"]["open"] < 0.95
            assert entry["row"]["agree"] == 1
            assert entry["row"]["logits apart"] == 0
    layer = [entry["row"] for entry in rows if entry["stage"] == "layer"]
    assert {(row["phase"], row["batch"], row["tokens"]) for row in layer} >= {("prefill", 1, 512), ("decode", 16, 256)}
    # `layer --warm` has written none.
    assert len({tuple(row[name] for name in ("phase", "batch", "tokens", "gates")) for row in layer}) == len(layer)
    for row in layer:
        assert row["speed-up"] > 0
        if row["phase"] == "decode":
            assert row["gated MB"] == pytest.approx(row["dense MB"] * row["density"])
    assert {row["gates"] for row in layer if row["phase"] == "decode"} >= {"1 of 2 KV heads open", "15% open"}
    profiles = [entry["row"] for entry in rows if entry["stage"] == "profile"]
    assert [(row["policy"], row["phase"]) for row in profiles] == [
        (policy, phase) for policy in ("stock", "default") for phase in ("decode", "prefill")
    ]
    assert all(row["top"] and row["operators"] > 100 for row in profiles)
    assert "Self CPU" in (tmp_path / "out" / "profiles.txt").read_text()
    assert "A rehearsal without a GPU" in made.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "log.txt", "profiles.txt", "rows.jsonl"}


def test_the_page_is_what_the_stored_rows_give(tmp_path: Path) -> None:
    gpu_page = module("gpu_page")
    made = gpu_page.make_page(None, tmp_path)
    assert made.read_text() == (ROOT / "docs" / "results" / made.name).read_text(), "run gpu.py --page"


def layer_row(phase: str, tokens: int, gates: str, speedup: float) -> dict[str, Any]:
    row = {"stage": "layer", "phase": phase, "batch": 1, "tokens": tokens, "window": 2048, "gates": gates}
    row |= {"speed-up": speedup, "limit": 4.0, "dense": "sdpa flash", "dense ms": 2.0}
    moved = {"dense MB": 134.2, "gated MB": 40.0, "dense TB/s": 3.9, "gated TB/s": 2.5}
    return row | (moved if phase == "decode" else {})


def test_goals_sentences_and_break_even_come_from_the_numbers(tmp_path: Path) -> None:
    gpu_page = module("gpu_page")
    rows = [layer_row("prefill", *at, "15% open", speed) for *at, speed in ((8192, 0.5), (32768, 2.0), (131072, 2.4))]
    rows += [layer_row("decode", 32768, *of) for of in (("1 of 8 KV heads open", 2.5), ("all closed", 5.0))]
    rows += [layer_row("decode", 32768, "all open", 0.95)]
    times = {"stock": (2.0, 30.0), "default": (1.0, 20.0), "every gate open": (2.0, 30.0)}
    times |= {"all closed, `min_bulk=0`": (0.5, 10.0), "asked, none opens": (0.6, 14.0)}
    for policy, (first, step) in times.items():
        row = {"stage": "llama", "policy": policy, "cache": "dynamic", "tokens": 32768, "layers": 32, "compiled": False}
        rows.append(row | {"first token s": first, "step ms": step, "peak GiB": 30.0})
    rows.append({"stage": "models", "model": "shipped", "dtype": "bf16", "agree": 0.9987, "open": 0.3})
    names = ("open here", "same token", "logits apart", "with the same gates", "dense")
    rows[-1] |= dict.fromkeys(names, 0.1)
    rows.append({"stage": "process", "process": "tests 1/1", "ended": "out of time", "seconds": 200.0, "passed": 39})
    rows[-1] |= {"failed": 1, "error": 0, "skipped": 0, "failures": "test_a.py::test_two"}
    rows.append({"stage": "llama", "policy": "stock", "cache": "static", "problem": "OutOfMemoryError: 17 | GiB"})
    result = tmp_path / "gpu.json"
    result.write_text(json.dumps({"environment": None, "rows": rows}))
    page = gpu_page.make_page(result, tmp_path).read_text()
    assert "| one layer, prefill, 32,768 tokens, 15% open | 2.00x / 1.8x |" in page
    assert "| one layer, prefill, 131,072 tokens, 15% open | **2.40x / 2.5x** |" in page
    assert "| one layer, decode, 32,768 tokens, all closed | **5.00x / 6.0x** |" in page
    assert "| whole model, default policy, lowest of all | 1.50x / 0.97x (step, 32,768 tokens) |" in page
    assert "0.50x at 8,192 tokens (limit 4.00x), 2.00x at 32,768 tokens (limit 4.00x) and 2.40x at 131,072" in page
    assert "reads 40 MB at 2.50 TB/s where dense attention reads 134 MB at 3.90 TB/s" in page
    assert "the default is 2.00x and 1.50x" in page
    assert "asking alone costs 4.0 ms of a step" in page
    assert "for 99.87% in bf16 of its pairs, and 39 of 40 GPU tests" in page
    assert "- prefill: 13,004 tokens or 10,940 bulk keys, with 15% open." in page
    assert "- decode: at or below 32,768 tokens" in page
    assert "llama stock static: OutOfMemoryError: 17 / GiB" in page
    assert (tmp_path / "benchmarks" / "gpu.png").exists()
    assert "(benchmarks/gpu.png)" in page


@pytest.mark.parametrize(
    ("points", "tokens"),
    [
        ([(100, 2.0), (400, 3.0)], 100),
        ([(100, 0.5), (400, 0.9)], None),
        ([(100, 0.5), (400, 1.5)], 200),
        ([(100, 1.5), (400, 0.5), (1600, 1.5)], 800),
    ],
    ids=["always", "never", "in between", "the last one counts"],
)
def test_break_even(points: list[tuple[int, float]], tokens: int | None) -> None:
    found = module("gpu_page").crossing(points)
    assert found == tokens
    assert found is None or math.isfinite(found)
