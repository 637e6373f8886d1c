"""The documentation is right: its Python runs, its tables agree with the code."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import patchattn
from patchattn import demo
from patchattn.calibration import Calibration, pictures
from patchattn.errors import PatchAttnError
from patchattn.gates import Gate, MomentGate
from patchattn.policy import Policy

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import FakeHub
from repository_pages import PAGES, ROOT, blocks, name_of, read

MODULES = [
    info.name for info in pkgutil.walk_packages(patchattn.__path__, "patchattn.") if not info.name.endswith("__main__")
]
CARDS = sorted(ROOT.glob("calibrations/*/README.md"))
"""Written by the library, with names to fill in."""


def python_of(path: Path) -> list[str]:
    """The Python blocks of a page; a block with a title is a script of its own."""
    if path in CARDS:
        return []
    return [block.text for block in blocks(read(path)) if block.language == "python" and not block.title]


@pytest.fixture
def without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, a Hub on loopback, and the shipped model in the place of models from the Hub."""
    import transformers

    def shipped(kind: Any) -> Callable[..., Any]:
        load = kind.from_pretrained
        return lambda name, **options: load(name if Path(name).is_dir() else demo.model_folder(), **options)

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        kind = getattr(transformers, name)
        monkeypatch.setattr(kind, "from_pretrained", shipped(kind))
    hub = FakeHub()
    hub.serve_client(monkeypatch, tmp_path / "hub")
    # Drawing takes most of the time of a push, and what is drawn is tested elsewhere.
    monkeypatch.setattr(pictures, "draw", lambda _: {"risk.png": b"picture"})
    (tmp_path / "calibrations").symlink_to(ROOT / "calibrations")
    monkeypatch.chdir(tmp_path)
    yield
    hub.close()


@pytest.mark.usefixtures("without_network", "quick_demo")
@pytest.mark.parametrize("path", [path for path in PAGES if python_of(path)], ids=name_of)
def test_python_blocks_run(path: Path) -> None:
    names: dict[str, Any] = {}
    for block in python_of(path):
        exec(compile(block, name_of(path), "exec"), names)
        if "push_to_hub" in block:
            pulled = Calibration.from_pretrained("me/demo-patchattn", revision="main")
            assert names["calibration"].manifest == pulled.manifest
            assert 0 < names["handle"].report().open_fraction("prefill") < 1


def test_the_way_from_measuring_to_patching_is_documented() -> None:
    pages = {name_of(path) for path in PAGES if any("push_to_hub" in block for block in python_of(path))}
    assert {"README.md", "docs/how-to/calibrate-and-share.md"} <= pages


def test_cards_of_calibrations_are_python() -> None:
    for path in CARDS:
        for block in blocks(read(path)):
            compile(block.text, name_of(path), "exec")


@pytest.mark.slow
def test_scripts_run_in_two_processes(tmp_path: Path) -> None:
    scripts = [block for path in PAGES for block in blocks(read(path)) if block.title]
    assert len({block.title for block in scripts}) == len(scripts)
    text = " ".join(demo.sample_text().split()[:150])
    for block in scripts:
        (tmp_path / block.title).write_text(block.text)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*launcher, block.title, str(demo.model_folder()), text],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("patchattn report") == 1
        # Three of the six heads are in this process, and some of their gates decided either way.
        shares = [float(share) for share in re.findall(r"([\d.]+)%", done.stdout.split("layer   0:")[1].split("\n")[0])]
        assert len(shares) == 3
        assert 0 < sum(shares) < 300


@pytest.mark.usefixtures("quick_demo")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_some_docstrings_have_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 3


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


def test_house_page_agrees_with_the_code() -> None:
    sys.path[:0] = [str(ROOT / ".ci" / "docs")]
    from house import ORDER, PICTURE, picture  # pyright: ignore[reportMissingImports]

    page = (ROOT / "docs/explanation/house.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == ORDER
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run python .ci/docs/house.py"


def test_policy_page_agrees_with_the_code() -> None:
    page = (ROOT / "docs/reference/policy.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \| [^|]+ \| [^|]+ \|$", page, flags=re.MULTILINE))
    gates = {kind.__name__: kind.model_fields["kind"].default for kind in get_args(get_args(Gate)[0])}
    assert rows.keys() - gates.keys() == set(Policy.model_fields)
    defaults = Policy()
    for name in ("sink_size", "window_size", "layers", "schema_version"):
        assert rows[name] == f"`{getattr(defaults, name)}`"
    assert rows["min_bulk"] == f'`"{defaults.min_bulk}"`'
    assert gates.items() <= set(re.findall(r'^\| `(\w+)` \| `"(\w+)"` \|', page, flags=re.MULTILINE))
    assert f"`threshold` ({MomentGate().threshold})" in page
    for block in blocks(page):
        Policy.model_validate(json.loads(block.text))
