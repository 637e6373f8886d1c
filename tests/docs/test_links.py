"""Links, anchors and pictures lead somewhere on a code host too, and the reference names what is public."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import patchattn
from patchattn import testing

sys.path.insert(0, str(Path(__file__).parent))

from repository_pages import PAGES, ROOT, anchors, name_of, prose, read


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(path))):
        if target.startswith(("http://", "https://")):
            continue
        page, _, anchor = target.partition("#")
        found = (path.parent / page).resolve() if page else path
        assert found.exists(), f"{target} does not exist"
        assert found.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(found), f"{target}: no such heading; there are {sorted(anchors(found))}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_say_something(path: Path) -> None:
    assert len(read(path).split()) > 30


def test_pages_named_in_messages_exist() -> None:
    for path in (ROOT / "patchattn").rglob("*.py"):
        for page in re.findall(r"docs/[\w/-]+\.md", read(path)):
            assert (ROOT / page).is_file(), f"{name_of(path)} names {page}"


@pytest.mark.parametrize(
    ("page", "package"), [("python", patchattn), ("testing", testing)], ids=["patchattn", "patchattn.testing"]
)
def test_every_public_name_is_in_the_reference(page: str, package: object) -> None:
    listed = re.findall(r"^::: ([\w.]+)$", read(ROOT / f"docs/reference/{page}.md"), flags=re.MULTILINE)
    assert {f"{package.__name__}.{name}" for name in package.__all__} <= set(listed)
    assert len(listed) == len(set(listed))
