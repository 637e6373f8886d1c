"""Tests of `patchattn.cli`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import patchattn
from patchattn import demo
from patchattn.cli import doctor
from patchattn.cli.app import app
from patchattn.cli.gpus import Gpu, Machine
from patchattn.errors import BackendError
from patchattn.gates import ClosedGate, OpenGate
from patchattn.policy import Policy

pytestmark = pytest.mark.usefixtures("quick_demo")
SMALL = ("--length", "512", "--questions", "2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tmp_path / "heads.png"


def policy_file(folder: Path, policy: Policy) -> Path:
    path = folder / "policy.json"
    path.write_text(policy.model_dump_json())
    return path


def test_demo_prints_one_table_and_saves_the_picture(picture: Path) -> None:
    result = run("demo", *SMALL, "--out", picture)
    assert result.exit_code == 0, result.output
    for row in (
        "answers right",
        "text loss",
        "open fraction",
        "realised density",
        "agreement",
        "KL",
        "first token",
        "tokens per",
    ):
        assert row in result.stdout
    assert str(picture) in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = picture.with_name("report.html")
    assert str(page) in result.stdout
    assert '"texts":["<|bos|>"'.replace("<", "\\u003c").replace(">", "\\u003e") in page.read_text(encoding="utf-8")


def test_demo_json_with_open_gates_equals_dense(tmp_path: Path, picture: Path) -> None:
    policy = policy_file(tmp_path, Policy(window_size=64, min_bulk=0, gate=OpenGate()))
    result = run("demo", *SMALL, "--out", picture, "--policy", policy, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["policy"]["window_size"] == 64
    assert found["patched"]["right"] == found["dense"]["right"] == 2
    assert found["patched"]["text_loss"] == pytest.approx(found["dense"]["text_loss"], abs=0.01)
    assert found["patched"]["open_fraction"] == {"prefill": 1.0, "decode": 1.0}
    assert found["picture"] == str(picture)
    assert found["page"] == str(picture.with_name("report.html"))


def test_demo_json_with_closed_gates_forgets_the_facts(tmp_path: Path, picture: Path) -> None:
    policy = policy_file(tmp_path, Policy(window_size=512, min_bulk=0, gate=ClosedGate()))
    result = run("demo", *SMALL, "--out", picture, "--policy", policy, "--window", "32", "--json")
    found = json.loads(result.stdout)
    assert found["policy"]["window_size"] == 32
    assert found["patched"]["right"] == 0
    assert found["patched"]["text_loss"] > found["dense"]["text_loss"]
    assert found["patched"]["open_fraction"]["decode"] == 0.0
    assert found["patched"]["realised_density"]["prefill"] < 1.0


@pytest.mark.slow
def test_demo_below_break_even_is_dense_and_has_no_fractions(tmp_path: Path, picture: Path) -> None:
    policy = policy_file(tmp_path, Policy(window_size=32, min_bulk=100_000))
    found = json.loads(run("demo", *SMALL, "--out", picture, "--policy", policy, "--json").stdout)
    assert found["patched"]["right"] == found["dense"]["right"]
    assert found["patched"]["open_fraction"] == {"prefill": None, "decode": None}
    result = run("demo", *SMALL, "--out", picture, "--policy", policy)
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout
    assert "not the text, as some calls were dense" in result.stdout
    assert '"timeline":null' in picture.with_name("report.html").read_text(encoding="utf-8")


def test_demo_takes_text_model_and_threshold(tmp_path: Path, picture: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("A line about nothing in particular, number {}.\n" * 200)
    options = ("--text", text, "--model", demo.model_folder(), "--threshold", "0.25", "--backend", "reference")
    result = run("demo", *SMALL, *options, "--out", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["policy"]["gate"]["threshold"] == 0.25
    assert found["backend"] == "reference"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", "0"), "length is 0"),
        (("--threshold", "1.5"), "gate.moment.threshold"),
        (("--window", "0"), "window_size"),
        (("--text", "no-such-file.txt"), "Can't read no-such-file.txt"),
        (("--policy", "no-such-file.json"), "Can't read no-such-file.json"),
        (("--model", "./no-such-folder"), "Can't load './no-such-folder'"),
        (("--backend", "fastest"), "Unknown backend 'fastest'"),
        (("--device", "abacus"), "Unknown device 'abacus'"),
        (("--length", "100000"), "at most 4,096 tokens"),
        (("--length", "64"), "tasks need"),
        (("--out", "heads.txt"), "Can't save a picture as 'heads.txt'"),
        (("--out", "no-such-folder/heads.png"), "does not exist"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_short_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too little\n" * 10)
    result = run("demo", "--text", text, "--out", tmp_path / "heads.png")
    assert result.exit_code == 2
    assert "the document was to have 4,096" in result.stderr


def test_text_that_is_not_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "picture.txt"
    text.write_bytes(b"\x89PNG\xff\xfe")
    assert "not UTF-8" in run("demo", "--text", text).stderr


def test_policy_with_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"window": 128}')
    result = run("demo", "--policy", path)
    assert result.exit_code == 2
    assert "window: Extra inputs are not permitted" in result.stderr


def check_passes(*_: object, **__: object) -> float:
    return 0.5


def test_doctor_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_check", check_passes)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for words in (patchattn.__version__, torch.__version__.partition("+")[0], "blockwise", "flex", "Healthy"):
        assert words in result.stdout


@pytest.mark.parametrize(("broken", "code"), [("blockwise", 1), ("flex", 0)])
def test_doctor_says_what_is_broken(broken: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(backend: str, **_: object) -> float:
        if backend == broken:
            raise BackendError("disagrees with the reference")
        return 0.5

    monkeypatch.setattr(doctor, "self_check", check)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = run("doctor", "--json")
    assert result.exit_code == code
    found = json.loads(result.stdout)
    assert found["healthy"] == (code == 0)
    problems = {check["backend"] for check in found["checks"] if check["problem"]}
    assert problems == {broken}


CARD = Gpu("NVIDIA L4", (8, 9), 20 * 2**30, 24 * 2**30)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine([CARD], "12.8", has_card=True, has_triton=True), None),
        (Machine([], None, has_card=False, has_triton=False), None),
        (Machine([], "12.8", has_card=False, has_triton=True), None),
        (Machine([], None, has_card=True, has_triton=False), "torch is built without CUDA"),
        (
            Machine([], "13.0", has_card=True, has_triton=True, refusal="driver too old"),
            "(driver too old): unless",
        ),
        (Machine([CARD], "12.8", has_card=True, has_triton=False), "pip install triton"),
        (Machine([replace(CARD, capability=(7, 5))], "12.8", has_card=True, has_triton=True), "capability 7.5"),
        (
            Machine([CARD, replace(CARD, free=2**29)], "12.8", has_card=True, has_triton=True),
            "cuda:1, NVIDIA L4, has 0.5",
        ),
    ],
)
def test_doctor_says_what_keeps_a_gpu_from_being_used(
    machine: Machine, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "self_check", check_passes)
    monkeypatch.setattr(doctor.Machine, "found", lambda: machine)
    result = run("doctor", "--json")
    assert result.exit_code == 0
    hints = json.loads(result.stdout)["hints"]
    assert len(hints) == (said is not None)
    assert said is None or said in hints[0]
    shown = run("doctor").stdout
    assert " ".join(hints) in " ".join(shown.split())


def test_doctor_looks_at_this_machine() -> None:
    machine = Machine.found()
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.built_for == torch.version.cuda


def test_doctor_shows_heads_and_dtypes_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(backend: str, *, dtype: torch.dtype, head_dim: int, group_size: int, **_: object) -> float:
        if dtype == torch.float16 or head_dim == 256:
            raise BackendError(f"no heads of {head_dim} in {dtype}")
        return 0.5

    monkeypatch.setattr(doctor, "self_check", check)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "no heads of 256 in torch.bfloat16" in said
    assert "no heads of 64 in torch.float16" in said
    failed = [line for line in result.stdout.splitlines() if "failed" in line]
    assert len(failed) == 2 * (1 + torch.cuda.device_count())
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Healthy" in result.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("doctor", "--help")])
def test_help_teaches(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "patchattn demo" in result.stdout or "patchattn doctor" in result.stdout


def test_without_typer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from patchattn.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'pip install "patchattn[demo]"' in result.stderr
    assert "Traceback" not in result.stderr
