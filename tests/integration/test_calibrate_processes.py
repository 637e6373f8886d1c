"""`patchattn calibrate` under `torchrun`: the processes share the documents, and one of them saves and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from patchattn import demo
from patchattn.calibration import Calibration
from patchattn.cli import processes
from patchattn.cli.app import app

ROOT = Path(__file__).parents[2]
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "-m",
    "patchattn.cli",
)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    texts = tmp_path / "texts"
    texts.mkdir()
    for at in range(7):
        (texts / f"{at}.txt").write_text(demo.sample_text()[5000 * at : 5000 * at + 1500])
    sizes = ["--lengths", "256", "--window", "64", "--documents", "7", "--alpha", "0.3", "--json"]
    return ["calibrate", "--texts", str(texts), *sizes]


def test_the_command_gives_what_one_process_gives(options: list[str], tmp_path: Path) -> None:
    # Each kind of moments, and prices, are shared out in tests/unit/test_pricing.py, without the command.
    options += ["--moments", "calibration"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*TORCHRUN, *options, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    # One document: only one process has printed.
    printed = json.loads(ran.stdout)
    assert ran.stderr.count("readings of documents") <= 1
    one = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    assert printed["manifest"] == json.loads(one.stdout)["manifest"]
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    alone, shared = (Calibration.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert shared.manifest == alone.manifest
    assert shared.policy == alone.policy
    for name, tensor in alone.tensors.items():
        # Sums in another order: a rounding of float64 may cross a rounding of half precision.
        torch.testing.assert_close(shared.tensors[name].float(), tensor.float(), rtol=1e-3, atol=1e-6)


def start(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("device", "without", "message"),
    [
        ("cuda:0", None, "would put all of them on one device"),
        ("cuda", None, "Process 1 of this machine has no GPU of its own: there are 1"),
        ("cpu", "accelerate", "needs the package accelerate"),
    ],
)
def test_what_can_not_be_shared_out_is_explained(device, without, message, options, tmp_path, monkeypatch) -> None:
    start(monkeypatch, 1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if without is not None:
        monkeypatch.setitem(sys.modules, without, None)
    result = CliRunner().invoke(app, [*options, "--device", device, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Fix: " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("asked", "own", "given"), [("cuda", "cuda:3", "cuda:3"), ("cuda", "cpu", "cuda")])
def test_each_process_gets_its_own_gpu(asked: str, own: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    start(monkeypatch, 3, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ends: list[str] = []
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda name=name: ends.append(name))
    state = SimpleNamespace(process_index=3, device=torch.device(own))
    monkeypatch.setattr(accelerate, "PartialState", lambda *, cpu: state)
    with processes.joined(asked) as process:
        assert process == processes.Process(3, given)
    assert ends == ["barrier", "destroy_process_group"]


def test_without_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    start(monkeypatch, 0, 1)
    with processes.joined("cuda:1") as process:
        assert process == processes.Process(0, "cuda:1")
