"""The pages of the repository, and what is in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(page for folder in ("docs", "recipes", "calibrations") for page in sorted((ROOT / folder).rglob("*.md"))),
]
# Pages with fields; filled in they are in `docs/results`.
PAGES = [page for page in PAGES if page.parent.name != "pages"]
PROGRAMS = "patchattn", "python", "torchrun", "pytest", "pip", "tests/run-at", ".ci/run"
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title, and its text."""

    language: str
    title: str
    text: str


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    found = []
    for indent, head, body in _FENCE.findall(text):
        title = re.search(r'title="([^"]+)"', head)
        body = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        found.append(Block(head.split(" ")[0], title[1] if title else "", body))
    return found


def prose(text: str) -> str:
    """What is left without fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Every command in a page, in a block without another language or in a line, as words."""
    lines = [
        part
        for block in blocks(text)
        if block.language in ("", "bash", "console")
        for line in block.text.replace("\\\n", " ").splitlines()
        for part in line.split("&&")
    ]
    lines += re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(text))
    split = [shlex.split(line, comments=True) for line in lines if line.split() and line.split()[0] in PROGRAMS]
    return [words for words in split if words]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as a code host and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(read(path)), flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found
