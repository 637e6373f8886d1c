"""Commands in the documentation are what the programs take: parsed by the real parsers, run nowhere."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import typer
from typer.main import get_group

from patchattn.cli.app import app

sys.path.insert(0, str(Path(__file__).parent))

from repository_pages import PAGES, ROOT, blocks, commands, name_of, read

SOURCES = [*(page for page in PAGES if commands(read(page))), ROOT / "patchattn/cli/app.py"]
SCRIPTS = {block.title for page in PAGES for block in blocks(read(page)) if block.title}


class Parsed(Exception):
    """The arguments of a script were taken; it is stopped here."""


@pytest.fixture
def stopped_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        parse(self, *args, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    # Scripts of different folders import files of the same name.
    for name in set(sys.modules) - known:
        if str(ROOT / "recipes") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def check_patchattn(words: list[str]) -> None:
    group = get_group(app)
    context = typer.Context(group, info_name="patchattn")
    name, *options = words
    command = group.get_command(context, name)
    assert command is not None, f"there is no command {name}"
    if options and "..." not in options:
        try:
            command.make_context(name, options, parent=context)
        except Exception as error:
            raise AssertionError(str(error)) from error


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script, *options = words
    if words[:2] == ["-m", "venv"]:
        return
    assert (ROOT / script).is_file(), f"there is no {script}"
    if "parse_args" not in read(ROOT / script):
        assert not options, f"{script} takes no options"
        return
    monkeypatch.setattr(sys, "argv", [script, *options])
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        # Some switch the network off for their own process, which would be that of the tests after this one.
        with mock.patch.dict(os.environ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return
    except SystemExit as stop:
        raise AssertionError(f"{script} {' '.join(options)} stopped with {stop.code}") from None
    raise AssertionError(f"{script} does not parse its arguments")


def check_torchrun(words: list[str]) -> None:
    assert words[0] == "--nproc-per-node"
    if words[2:4] == ["-m", "patchattn.cli"]:
        check_patchattn(words[4:])
    for script in words[2:3]:
        known = script == "-m" or script in SCRIPTS or (ROOT / script).is_file()
        assert known, f"{script} is neither a file nor the title of a block"


def check_files(words: list[str]) -> None:
    """Files and extras that an option names exist, and so do the markers of pytest."""
    project = tomllib.loads(read(ROOT / "pyproject.toml"))
    for option, value in itertools.pairwise(words):
        if option in ("-c", "-f"):
            assert (ROOT / value).is_file(), f"there is no {value}"
        if option == "-m" and value:
            markers = [marker.split(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]]
            for marker in value.split(" and "):
                assert marker.removeprefix("not ") in markers, f"there is no marker {marker}"
    for extra in re.findall(r"(?:\.|patchattn)\[([\w,]+)\]", " ".join(words)):
        missing = set(extra.split(",")) - project["project"]["optional-dependencies"].keys()
        assert not missing, f"there is no extra {missing}"


def check(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if program == "patchattn":
        check_patchattn(words)
    elif program == "torchrun":
        check_torchrun(words)
    elif program == "python":
        check_python(words, monkeypatch)
    elif program in ("pip", "pytest"):
        check_files(words)
    else:
        assert (ROOT / program).is_file()


@pytest.mark.usefixtures("stopped_scripts")
@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_commands_are_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, *words in commands(read(path)):
        if words or "/" in program:  # else it is only mentioned
            check(program, words, monkeypatch)


@pytest.mark.usefixtures("stopped_scripts")
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("patchattn demo --lenght 5", "No such option"),
        ("patchattn demonstrate", "no command"),
        ("patchattn calibrate MODEL --texts books", "Missing parameter: out"),
        ("python recipes/benchmarks/memory.py --no-such-option", "stopped with 2"),
        ("python recipes/missing.py", "there is no"),
        ("torchrun --nproc-per-node 2 missing.py", "nor the title"),
        ('pip install ".[missing]"', "no extra"),
        ("pip install -c missing.txt pytest", "there is no"),
        ("pytest -m missing", "no marker"),
    ],
)
def test_wrong_commands_are_noticed(command: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(f"```\n{command}  # why\n```\n") + commands(f"So `{command}` it is.")
    assert len(found) == 2
    for program, *words in found:
        with pytest.raises(AssertionError, match=why):
            check(program, words, monkeypatch)
