"""Tests of `patchattn.calibration.places`: folders, Hub ids, and names that are mistyped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from patchattn import CalibrationError, CalibrationNotFoundError, demo
from patchattn.calibration import Calibration
from patchattn.calibration.places import fix_for, looks_like_path, no_folder
from patchattn.cli.app import app


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibrations/my-model").mkdir(parents=True)
    (tmp_path / "calibrations/my-model/policy.json").write_text("{}")


def test_only_what_no_repository_can_be_called_is_surely_a_path() -> None:
    for name in ("./a", "../a", ".", "~/a", "/a/b", "a/b/c", "a/", "a/b/", Path("a"), Path("a/b")):
        assert looks_like_path(name), name
    for name in ("a", "a/b", "org/model-2.5", "calibrations/my-model"):
        assert not looks_like_path(name), name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("calibrations/my-modle", "calibrations/my-model"),
        ("calibratoins/my-model", "calibrations/my-model"),
        ("calibration", "calibrations"),
        ("calibration/other", "calibrations"),
        ("calibrations/my-model/policy.json", "calibrations/my-model"),
        ("calibrations/nothing-like-it", None),
        ("elsewhere/at/all", None),
    ],
)
def test_the_nearest_folder_is_suggested(name: str, nearest: str | None) -> None:
    assert fix_for(name, "look") == ("look" if nearest is None else f"did you mean {Path(nearest)}? If not, look")
    is_file = name.endswith(".json")
    assert no_folder(name) == (f"{name} is a file, not a folder." if is_file else f"There is no folder {name}.")


@pytest.mark.parametrize("name", ["./calibrations/my-modle", "calibrations/my-modle/", "calibrations/my-modle/x"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchattn.calibration.hub.download", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(CalibrationNotFoundError, match="There is no folder calibrations/my-modle") as caught:
        Calibration.from_pretrained(name)
    assert f"did you mean {Path('calibrations/my-model')}?" in caught.value.fix
    with pytest.raises(CalibrationNotFoundError, match="is a file, not a folder"):
        Calibration.from_pretrained("calibrations/my-model/policy.json")


@pytest.mark.parametrize("command", [("inspect",), ("pull", "--revision", "v1")])
def test_a_revision_of_a_folder_is_refused(command: tuple[str, ...]) -> None:
    folder, revision = "calibrations/my-model", "v1"
    with pytest.raises(CalibrationError, match="is a folder, which has no revision 'v1'"):
        Calibration.from_pretrained(folder, revision=revision)
    arguments = {"inspect": [folder], "pull": [folder, "out"]}[command[0]]
    result = CliRunner().invoke(app, [command[0], *arguments, "--revision", revision], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "which has no revision 'v1'" in result.stderr
    assert not Path("out").exists()


def models(command: str, name: str) -> list[str]:
    Path("text.txt").write_text(demo.sample_text()[:2000])
    return {
        "demo": ["demo", "--model", name],
        "evaluate": ["evaluate", name, "--lengths", "256"],
        "calibrate": ["calibrate", name, "--texts", "text.txt", "--out", "out"],
    }[command]


@pytest.mark.parametrize("command", ["demo", "evaluate", "calibrate"])
def test_a_mistyped_folder_of_a_model_is_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        asked.append(1)
        raise OSError("We couldn't connect to the Hub.\nMore about it.")

    asked: list[int] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", ask)
    Path("models/tiny").mkdir(parents=True)
    for name, times in (("./models/tinny", 0), ("models/tinny/", 0), ("models/tinny", 1), ("org/model", 1)):
        asked.clear()
        result = CliRunner().invoke(app, models(command, name), env={"COLUMNS": "300"})
        assert result.exit_code == 2, result.output
        assert f"Can't load {name!r} as a causal language model: There is no folder {Path(name)}" in result.stderr
        assert ("did you mean models/tiny?" in result.stderr) == name.startswith((".", "models"))
        assert ("From the Hub: We couldn't connect to the Hub." in result.stderr) == bool(times)
        assert len(asked) == times
        assert not Path("out").exists()


@pytest.mark.skipif(os.sep != "\\", reason="paths of Windows")
def test_backslashes_are_slashes() -> None:
    assert looks_like_path(r"a\b\c")
