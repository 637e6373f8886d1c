"""Every numbered recipe runs on the shipped model, offline, and the numbers it prints are right."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import patchattn
from patchattn import demo

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import FakeHub

pytestmark = pytest.mark.usefixtures("quick_demo")
FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = {path.name[:2]: path for path in sorted(FOLDER.glob("[0-9][0-9]_*.py"))}
IN_THIS_FILE = {"01", "02", "03", "04", "05", "07", "08", "10"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a recipe in an empty folder and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def started(number: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [RECIPES[number].name, *options])
        runpy.run_path(str(RECIPES[number]), run_name="__main__")
        return capsys.readouterr().out

    return started


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def in_a_process(*command: str, cwd: Path) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_quickstart(run, tmp_path: Path) -> None:
    printed = run("01", "--length", "1024", "--questions", "2")
    rows = re.findall(r"│ [^│]+ +│ (\d+) +│ (\d+) +│ (\d+) +│", printed)
    assert len(rows) == 2
    right = [sum(row[column] == row[0] for row in rows) for column in (1, 2)]
    assert right[0] == 2
    assert right[1] > 0
    assert f"dense {right[0]}, patched {right[1]} of 2 right" in printed
    fraction = float(re.search(r"([\d.]+)% of \(head, query\) pairs", printed)[1])
    assert 0 < fraction < 50
    assert "the model is as it was" in printed
    assert is_picture(tmp_path / "heads.png")


def test_policies_are_compared(run, tmp_path: Path) -> None:
    printed = run("02", "--length", "768", "--documents", "1")
    rows = dict(re.findall(r"│ (\S[^│]*?) +│ +([\d.]+)% │", printed))
    assert float(rows["dense"]) == 100
    assert float(rows["sink + window only"]) == 0
    assert 0 < float(rows["moments, 0.3"]) < float(rows["moments, 0.9"]) < 100
    assert is_picture(tmp_path / "policies.png")


def test_a_calibration_is_measured_and_saved(run, tmp_path: Path) -> None:
    printed = run("03", "--documents", "4", "--length", "320", "--alpha", "0.2")
    assert "saved to my-calibration" in printed
    shared = patchattn.Calibration.from_pretrained(tmp_path / "my-calibration")
    expected = shared.expected(shared.thresholds(patchattn.RiskTarget(alpha=0.2)))
    assert expected.missed_mass.mean() <= 0.2
    assert f"{expected.open_fraction.mean():.1%}" in printed
    assert "patched at a risk of 0.2" in printed


@pytest.mark.slow
def test_a_calibration_is_shared_on_the_hub(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    hub.serve_client(monkeypatch, tmp_path / "hub")
    try:
        printed = run("03", "--documents", "4", "--length", "320", "--alpha", "0.2", "--repo", "me/demo")
    finally:
        hub.close()
    commit = hub.repos["me/demo"].find("main")
    assert f"pushed to me/demo as {commit}" in printed
    assert any(f"/resolve/{commit}/" in request for request in hub.requests)
    assert "patched at a risk of 0.2" in printed


def test_the_shipped_model_is_proved(run) -> None:
    printed = run("04", "--tokens", "300")
    assert "Equivalent (" in printed
    opened = [float(number) for number in re.findall(r"([\d.]+)% in (?:prefill|decode)", printed)]
    assert len(opened) == 2
    assert all(0 < fraction < 100 for fraction in opened)


def test_a_chat_on_one_cache_equals_reading_it_at_once(run) -> None:
    printed = run("05", "--length", "1024", "--turns", "3")
    assert printed.count("yes") == 3
    assert "3 of 3 answers right" in printed
    assert float(re.search(r"differ by (\S+) at most", printed)[1]) < 1e-3


@pytest.mark.slow
def test_two_processes_open_what_one_opens(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    printed = in_a_process(*launcher, str(RECIPES["07"]), "--characters", "1500", "--new-tokens", "4", cwd=tmp_path)
    found = re.findall(r"^(.+): (\d+) query heads a layer, ([\d,]+) pairs open", printed, flags=re.MULTILINE)
    counts = {who: (int(heads), int(opened.replace(",", ""))) for who, heads, opened in found}
    whole = counts.pop("one process")
    assert sorted(counts) == ["rank 0", "rank 1"]
    assert tuple(map(sum, zip(*counts.values(), strict=True))) == whole
    assert "the same 4 tokens: yes" in printed


def test_tensor_parallel_says_how_to_start_it(run) -> None:
    with pytest.raises(SystemExit, match="torchrun"):
        run("07")


def test_heads_that_swing(run, tmp_path: Path) -> None:
    model = str(demo.model_folder())
    printed = run("08", "--model", model, "--length", "1024", "--heads", "3", "--window", "128")
    rows = re.findall(r"^\d\.\d +([\d.]+)% +([\d.]+)  ", printed, flags=re.MULTILINE)
    swings = [float(swing) for _, swing in rows]
    assert len(rows) == 3
    assert swings == sorted(swings, reverse=True)
    assert swings[0] > 0
    assert is_picture(tmp_path / "swinging_heads.png")


def test_drafts_write_what_dense_attention_writes(run) -> None:
    printed = run("10", "--length", "600", "--new", "16")
    kept, drafted = map(int, re.search(r"(\d+) of (\d+) drafted tokens kept", printed).groups())
    assert 0 < kept <= drafted
    assert "16 of 16 tokens are those of dense attention" in printed


def test_recipes_are_listed_short_and_have_a_test() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for number, path in RECIPES.items():
        text = path.read_text(encoding="utf-8")
        assert f"({path.name})" in index
        assert len(text.splitlines()) <= 100
        assert text.count("def main(") == 1
        tested = IN_THIS_FILE | {"06", "09"}
        assert number in tested
