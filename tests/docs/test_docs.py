"""The documentation is right: its Python runs, its links lead somewhere, its tables agree with the code."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import patchattn
from patchattn.errors import PatchAttnError
from patchattn.policy import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, StaticGate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    info.name for info in pkgutil.walk_packages(patchattn.__path__, "patchattn.") if not info.name.endswith("__main__")
]
NEEDS_A_NETWORK = "from_pretrained("


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=name_of)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(path, "python"):
        code = compile(block, name_of(path), "exec")
        if NEEDS_A_NETWORK not in block:
            exec(code, names)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_some_docstrings_have_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 3


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_are_not_empty(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").split()) > 30


def test_pages_named_in_messages_exist() -> None:
    for path in (ROOT / "patchattn").rglob("*.py"):
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{name_of(path)} names {page}"


def all_errors(kind: type[PatchAttnError] = PatchAttnError) -> set[type[PatchAttnError]]:
    return {kind}.union(*(all_errors(child) for child in kind.__subclasses__()))


def test_errors_page_agrees_with_the_code() -> None:
    for name in MODULES:
        importlib.import_module(name)
    page = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| `(\w+)` \|", page, flags=re.MULTILINE))
    raised = set()
    for kind in all_errors():
        builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        raised.add((kind.code, kind.__name__, builtins[0].__name__))
    assert listed == raised


def test_policy_page_agrees_with_the_code() -> None:
    page = (ROOT / "docs/reference/policy.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \| [^|]+ \| [^|]+ \|$", page, flags=re.MULTILINE))
    gates = [kind.__name__ for kind in (MomentGate, OracleGate, StaticGate, OpenGate, ClosedGate)]
    assert {name for name in rows if name not in gates} == set(Policy.model_fields)
    defaults = Policy()
    for name in ("sink_size", "window_size", "layers", "schema_version"):
        assert rows[name] == f"`{getattr(defaults, name)}`"
    assert rows["min_bulk"] == f'`"{defaults.min_bulk}"`'
    assert set(gates) <= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert f"`threshold` ({MomentGate().threshold})" in page
    for block in blocks(ROOT / "docs/reference/policy.md", "json"):
        Policy.model_validate(json.loads(block))
