"""Tests of `patchattn.writing`, and of the commands that save: what fails leaves no folder behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patchattn import CalibrationError, demo
from patchattn.calibration import Calibration, card, files, pictures
from patchattn.cli import calibrate as calibrate_command
from patchattn.cli import demo as demo_command
from patchattn.cli import evaluate as evaluate_command
from patchattn.cli.app import app
from patchattn.errors import ReportError
from patchattn.measuring import checkpoint
from patchattn.measuring.statistics import Settings, Totals
from patchattn.writing import check_folder, check_path, made, tidied

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

pytestmark = pytest.mark.usefixtures("quick_demo")
LONG = "a" * 300


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "text.txt").write_text(demo.sample_text()[:4000])


def listed() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fail(*_: object, **__: object) -> None:
    raise CalibrationError("stopped")


def never(*_: object, **__: object) -> None:
    pytest.fail("work was done")


def test_only_empty_folders_that_a_failed_block_made_are_removed() -> None:
    for folder in ("a/b/c", "a/b"):
        with pytest.raises(KeyError), made(Path(folder)):
            raise KeyError
        assert not Path("a").exists()
    with made(Path("a/b")):
        pass
    Path("a/b/c").mkdir()
    Path("a/b/c/kept").touch()
    with pytest.raises(KeyError), made(Path("a/b/c/d")):
        raise KeyError
    with pytest.raises(KeyError), tidied(Path("a/b")):
        raise KeyError
    assert Path("a/b/c/kept").exists()
    assert not Path("a/b/c/d").exists()


def test_a_folder_is_checked_without_a_trace() -> None:
    before = listed()
    check_folder(Path("new/er"))
    check_folder(Path())
    for path in ("file", "file/below", LONG, f"new/{LONG}"):
        with pytest.raises(OSError, match=r"file|File|directory"):
            check_folder(Path(path))
    assert listed() == before


def test_a_path_is_checked_without_a_trace() -> None:
    before = listed()
    assert check_path("file") == Path("file")
    assert check_path("new") == Path("new")
    for path, message in (("nothing/new", "does not exist"), (".", "is a folder"), (f"{LONG}.png", "Can't write")):
        with pytest.raises(ReportError, match=message):
            check_path(path)
    assert listed() == before
    assert Path("file").read_text() == "kept"


CALIBRATE = ("calibrate", "--texts", "text.txt", "--lengths", 256, "--window", 64, "--no-key-moments", "--documents", 1)


@pytest.mark.parametrize("out", ["file", "file/below", f"new/{LONG}"])
def test_calibrate_refuses_a_folder_that_can_not_be_written_before_it_measures(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_command, "load", never)
    before = listed()
    result = run(*CALIBRATE, "--out", out)
    assert result.exit_code == 2, result.output
    assert out in result.stderr
    assert listed() == before


def test_a_calibrate_that_fails_at_the_end_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calibration, "save_pretrained", fail)
    before = listed()
    assert run(*CALIBRATE, "--out", "new/out").exit_code == 2
    assert listed() == before


def test_a_checkpoint_that_can_not_be_written_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write", fail)
    totals = Totals(Settings((0,), 1, 1, 2, key_moments=False, oracle_margin=0.0))
    with pytest.raises(CalibrationError):
        checkpoint.keep(totals, Path("new/out/sums"), "key", 1)
    with pytest.raises(CalibrationError):
        made_up_calibration().save_pretrained("new/out")
    assert not Path("new").exists()


@pytest.mark.parametrize("out", ["file", "file/below", f"new/{LONG}"])
def test_evaluate_refuses_a_folder_that_can_not_be_written_before_it_loads(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_command, "load", never)
    before = listed()
    result = run("evaluate", "demo", "--lengths", 300, "--tasks", "fact", "--out", out)
    assert result.exit_code == 2, result.output
    assert out in result.stderr
    assert listed() == before


def test_an_evaluate_that_fails_leaves_no_folder() -> None:
    before = listed()
    options = ("--lengths", 300, "--tasks", "fact", "--samples", 1)
    assert run("evaluate", "demo", *options, "--backend", "fastest", "--out", "new/out").exit_code == 2
    assert listed() == before
    assert run("evaluate", "demo", *options, "--out", "new/out").exit_code == 0
    assert Path("new/out/evaluation.md").exists()
    assert json.loads(Path("new/out/cells.jsonl").read_text().splitlines()[0])["task"] == "fact"


@pytest.mark.parametrize("taken", ["heads.png", "report.html"])
def test_demo_refuses_files_that_can_not_be_written_before_it_loads(
    taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_command, "load", never)
    Path(taken).mkdir()
    result = run("demo")
    assert result.exit_code == 2, result.output
    assert f"{taken} is a folder" in result.stderr


def test_pictures_and_cards_that_fail_leave_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_calibration().save_pretrained("in", card=False)
    before = listed()
    for plots_in in ("file", "file/below"):
        result = run("inspect", "in", "--plots", plots_in)
        assert result.exit_code == 2, result.output
        assert f"Can't write into {plots_in}" in result.stderr
    monkeypatch.setattr(pictures, "draw", fail)
    assert run("inspect", "in", "--plots", "new/plots").exit_code == 2
    assert run("card", "in", "--write").exit_code == 2
    assert listed() == before
    monkeypatch.setattr(pictures, "draw", lambda _: {"risk.png": b"picture"})
    with pytest.raises(CalibrationError, match="Can't write into"):
        card.write_card(made_up_calibration().findings, Path("file"))
