"""Tests of what the package's files may import, how long they are, and what importing the package costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import patchattn

PACKAGE = Path(patchattn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "version",
    "errors",
    "writing",
    "call",
    "moments",
    "gates",
    "policy",
    "backends",
    "report",
    "calibration",
    "hf",
    "measuring",
    "testing",
    "evaluation",
    "demo",
    "cli",
]
"""From the ground up: a file imports from its own room and from rooms above it in this list."""

KNOW_TRANSFORMERS = ("hf", "cli")
MOST_LINES = 350
NAMES = {path: ".".join(("patchattn", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
MODULES = {name.removesuffix(".__init__"): path for path, name in NAMES.items()}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def needed(path: Path) -> set[Path]:
    """Files of the package that a file imports."""
    found = (MODULES.get(name) or MODULES.get(name.rpartition(".")[0]) for name in imported(path))
    return {file for file in found if file is not None}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_has_a_room() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == set(ORDER)


@each_file
def test_imports_point_down(path: Path) -> None:
    if room(path) == "__init__":
        return
    for other in needed(path):
        assert room(other) != "__init__", f"{NAMES[path]} imports the face of the package; import from the room"
        assert ORDER.index(room(other)) <= ORDER.index(room(path)), f"{NAMES[path]} imports {NAMES[other]}"


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        tuple(TopologicalSorter({path: needed(path) for path in FILES}).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(NAMES[path] for path in error.args[1]))


def test_backends_do_not_import_each_other() -> None:
    folder = PACKAGE / "backends"
    backends = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
    assert backends
    for backend in backends:
        for path in backend.rglob("*.py"):
            others = [other for other in needed(path) if other.is_relative_to(folder) and other.parent != folder]
            assert all(other.is_relative_to(backend) for other in others), path


@each_file
def test_only_two_rooms_know_transformers(path: Path) -> None:
    if room(path) not in KNOW_TRANSFORMERS:
        assert not [name for name in imported(path) if name.split(".")[0] == "transformers"]


@each_file
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def in_fresh_process(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_silent_and_registers_nothing() -> None:
    code = """
import sys, torch, pydantic
import torch._dynamo.config as dynamo, torch._inductor.config as inductor
before = dynamo.get_config_copy(), inductor.get_config_copy(), torch.get_default_dtype(), torch.get_num_threads()
import patchattn
after = dynamo.get_config_copy(), inductor.get_config_copy(), torch.get_default_dtype(), torch.get_num_threads()
heavy = {"transformers", "matplotlib", "typer", "rich", "huggingface_hub"} & set(sys.modules)
print(before == after, sorted(heavy))
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
names = list(AttentionInterface().valid_keys()) + list(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())
print([name for name in names if "patchattn" in name])
"""
    assert in_fresh_process(code).splitlines() == ["True []", "[]"]


def test_version_is_the_one_of_the_project() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert re.findall(r'^version = "(.+)"$', project.read_text(), flags=re.MULTILINE) == [patchattn.__version__]
