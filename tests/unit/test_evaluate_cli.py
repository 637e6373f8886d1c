"""Tests of `patchattn evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from patchattn import demo
from patchattn.cli import evaluate as command
from patchattn.cli.app import app
from patchattn.gates import MomentGate
from patchattn.policy import Policy

pytestmark = pytest.mark.usefixtures("quick_demo")
ROOT = Path(__file__).parents[2]
SMALL = ("demo", "--lengths", "300", "--tasks", "fact,text", "--samples", "2")


def run(*arguments: str | Path, columns: int = 160) -> Result:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)], env=environment)


def test_a_table_and_its_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(Policy(window_size=48, min_bulk=0, gate=MomentGate(threshold=0.2)).model_dump_json())
    out = tmp_path / "out"
    result = run(*SMALL, "--policies", f"closed,static:0.1,{mine},drafts:0.6", "--sink", "4", "--out", out)
    assert result.exit_code == 0, result.output
    for words in (
        "300 tokens",
        "dense",
        "closed",
        "static:0.1",
        "mine",
        "fact",
        "text loss",
        "open, decode",
        "drafts:0.6",
        "same text",
    ):
        assert words in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "cells.jsonl",
        *(f"evaluation.{kind}" for kind in ("md", "csv", "json", "png")),
    }
    found = json.loads((out / "evaluation.json").read_text())
    assert found["policies"]["closed"] | {"gate": None} == found["policies"]["static:0.1"] | {"gate": None}
    assert (found["policies"]["closed"]["window_size"], found["policies"]["closed"]["sink_size"]) == (75, 4)
    assert len(found["policies"]["static:0.1"]["gate"]["open_heads"]) == 3
    assert found["policies"]["mine"]["window_size"] == 48
    drafts = found["policies"]["drafts:0.6"]
    assert (drafts["policy"]["gate"]["threshold"], drafts["policy"]["phases"], drafts["tokens"]) == (0.6, ["decode"], 4)
    assert found["summary"][-1]["same"] + found["summary"][-1]["level"] == found["summary"][-1]["texts"] == 2
    cells = (out / "cells.jsonl").read_text()
    again = run(*SMALL, "--policies", "closed", "--sink", "4", "--out", out, "--json")
    assert again.exit_code == 0, again.output
    assert (out / "cells.jsonl").read_text() == cells
    assert json.loads(again.stdout)["summary"] == found["summary"][:2]


def test_a_model_by_its_folder_and_a_calibration() -> None:
    options = ("--lengths", "600", "--tasks", "niah_single_1", "--samples", "1", "--dtype", "bfloat16", "--json")
    calibration = ROOT / "calibrations" / "patchattn-demo"
    result = run(demo.model_folder(), *options, "--policies", "calibrated", "--calibration", calibration)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["policies"]["calibrated"]["gate"]["threshold"]["kind"] == "risk"
    assert found["tasks"] == ["niah_single_1"]
    assert found["saved"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policies", "best"), "no policy 'best'"),
        (("--policies", "default:2"), "no number in (0, 1)"),
        (("--policies", "dense"), "Expected policies by name"),
        (("--policies", "calibrated"), "needs a calibration"),
        (("--policies", "nothing.json"), "Can't read nothing.json"),
        (("--tasks", "riddle"), "no task 'riddle'"),
        (("--lengths", "many"), "Expected --lengths as whole numbers from 1 on"),
        (("--seed", "0,x"), "Expected --seed as whole numbers from 0 on"),
        (("--code", "nothing.py"), "Can't read nothing.py"),
        (("--code", "empty.txt"), "The code is empty"),
        (("--policies", "static-transfer"), "names no task to rank heads on"),
        (("--policies", "static-transfer:riddle"), "names no task to rank heads on"),
        (("--policies", "default,static-transfer:fact:0.3"), "which it would be judged on too"),
        (("--lengths", "8192"), "at most 4,096 tokens"),
        (("--lengths", "32", "--tasks", "fact"), "without any haystack"),
        (("--text", "nothing.txt"), "Can't read nothing.txt"),
        (("--text", "empty.txt"), "The text is empty"),
        (("--dtype", "int3"), "Unknown dtype 'int3'"),
        (("--window", "0"), "window_size"),
        (("--backend", "fastest"), "Unknown backend 'fastest'"),
        (("--out", "empty.txt"), "not a folder"),
        (("--calibration", "./nothing"), "nothing"),
    ],
)
def test_mistakes_are_explained(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    result = run(*SMALL, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert "Traceback" not in result.output


def test_lengths_are_refused_before_heads_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "heads_by_oracle", lambda *_: pytest.fail("a model was run"))
    for lengths, message in (("300,8192", "at most 4,096 tokens"), ("300,0", "Expected --lengths"), (",", "Expected")):
        result = run("demo", "--lengths", lengths, "--tasks", "fact", "--policies", "static")
        assert result.exit_code == 2, result.output
        assert message in result.stderr


@pytest.mark.slow
def test_three_policies_fit_a_narrow_terminal_and_heads_come_from_another_task(tmp_path: Path) -> None:
    policies = "default,closed,static-transfer:kv:0.2"
    options = (
        "--policies",
        policies,
        "--seed",
        "0,1",
        "--samples",
        "1",
        "--tasks",
        "fact,code,text",
        "--out",
        tmp_path,
    )
    result = run(*SMALL, *options, columns=100)
    assert result.exit_code == 0, result.output
    table, _, _ = result.stdout.partition("Scores: ")
    assert "…" not in table
    names = "fact code mean drop worst answer text loss open, density,".split()
    assert {line.split()[0] for line in table.split("\n")[4:] if line.strip()} >= {*names}
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["seeds"] == [0, 1]
    heads = found["policies"]["static-transfer:kv:0.2"]["gate"]["open_heads"]
    assert len(heads) == 6
    closed, transferred = found["summary"][2:]
    assert closed["answers"]["kl"][0] > transferred["answers"]["kl"][0] > 0
    assert closed["text"]["top1"][0] < 1


def test_source_code_is_the_haystack_of_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def mine():\n    pass\n\n" * 50)
    seen = []
    monkeypatch.setattr(command.evaluation, "evaluate", lambda *_, **given: seen.append(given))
    run(*SMALL, "--code", tmp_path / "mine.py")
    run(*SMALL, "--text", tmp_path / "mine.py")
    assert [len(given["code"]) == 1100 for given in seen] == [True, False]
    assert [len(given["text"]) == 1100 for given in seen] == [False, True]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "the folder has no config.json, so there is no model in it"),
        (("tokenizer.json", "tokenizer_config.json"), "the folder has no config.json"),
        (("config.json", "model.safetensors"), "has no tokenizer that can be read"),
        (("config.json", "tokenizer.json", "tokenizer_config.json"), "Can't load"),
        (("config.json", "tokenizer.json", "tokenizer_config.json", "broken"), "deserializing header"),
    ],
)
def test_folders_that_hold_no_model_are_explained(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        if name == "broken":
            (tmp_path / "model.safetensors").write_text("no weights")
        else:
            (tmp_path / name).symlink_to(demo.model_folder() / name)
    result = run(tmp_path, *SMALL[1:])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert "save_pretrained" in result.stderr


def test_help_has_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "patchattn evaluate demo" in result.stdout.split("Examples")[1]
