"""Tests of what the package's files may import, how long they are, and what importing the package costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import patchattn

PACKAGE = Path(patchattn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [
    ("hf.architecture",),
    (
        "errors",
        "policy",
        "regions",
        "inputs",
        "moments",
        "prompt_moments",
        "rotary",
        "gate",
        "reference",
    ),
    ("backends",),
    ("report", "calibration"),
    ("hf",),
    ("calibration.collect", "calibration.rotary", "evaluation", "testing"),
    ("demo", "cli"),
]
"""From the ground up: a file imports from its own row and from rows above it in this list."""

LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
MOST_LINES = 420


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    names = (".".join(parts[1:3]), parts[1]) if len(parts) > 1 else ()
    return next((name for name in names if name in LEVEL), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(".".join(("patchattn", *path.relative_to(PACKAGE).with_suffix("").parts)))
    if own is None:
        return
    for name in imported(path):
        if name.split(".")[0] != "patchattn":
            continue
        other = room(name)
        # The package itself offers what is in hf and below.
        level = LEVEL["hf"] if other is None else LEVEL[other]
        assert level <= LEVEL[own], f"{own} imports {name}"


def test_every_file_has_a_room() -> None:
    top = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert top - {"__init__"} <= set(LEVEL)


def test_backends_do_not_import_each_other() -> None:
    for path in (PACKAGE / "backends").glob("*.py"):
        siblings = {name.split(".")[2] for name in imported(path) if name.startswith("patchattn.backends.")}
        backend = path.stem.split("_")[0]
        assert {name.split("_")[0] for name in siblings} <= {backend}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_method_and_backends_do_not_know_transformers(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in (*ROOMS[0], "backends", "report", "__init__"):
        assert not [name for name in imported(path) if name.split(".")[0] == "transformers"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def in_fresh_process(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_silent() -> None:
    code = """
import sys, torch, pydantic
import torch._dynamo.config as dynamo, torch._inductor.config as inductor
before = dynamo.get_config_copy(), inductor.get_config_copy(), torch.get_default_dtype(), torch.get_num_threads()
import patchattn
after = dynamo.get_config_copy(), inductor.get_config_copy(), torch.get_default_dtype(), torch.get_num_threads()
heavy = {"transformers", "matplotlib", "typer", "rich", "huggingface_hub"} & set(sys.modules)
print(before == after, sorted(heavy))
"""
    same, heavy = in_fresh_process(code).split(" ", 1)
    assert heavy == "[]"
    assert same == "True"


def test_import_registers_nothing() -> None:
    code = """
import patchattn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
names = list(AttentionInterface().valid_keys()) + list(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())
print([name for name in names if "patchattn" in name])
"""
    assert in_fresh_process(code) == "[]"


def test_version_is_the_one_of_the_project() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert re.findall(r'^version = "(.+)"$', project.read_text(), flags=re.MULTILINE) == [patchattn.__version__]
