"""What the site needs beyond mkdocs: pages outside of docs/, patterns in the navigation, formulas, the command line."""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
OUTSIDE = (
    "recipes/**/README.md",
    "recipes/**/*.py",
    "calibrations/**/README.md",
    "calibrations/**/*.png",
    "patchattn/**/*.py",
)
"""What docs/ links to: pages, their pictures, scripts. They stay beside docs/ here too, so that links lead to them."""

LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(https?:[^\"' >]+)")
_LOG = logging.getLogger("mkdocs.hooks.pages")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of docs/, and the pages that the navigation has patterns for."""
    pages = sorted(file.src_uri for file in files.documentation_pages())
    named = set(re.findall(r"[\w/.-]+\.md", str(config.nav)))
    config.nav = expanded(config.nav, [page for page in pages if page not in named])
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        uri = path.relative_to(ROOT).as_posix()
        to = config.site_dir, config.use_directory_urls
        outside = File(f"../{uri}", config.docs_dir, *to, dest_uri=File(uri, str(ROOT), *to).dest_uri)
        outside.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(outside)
    return files


def expanded(nav: Any, pages: list[str]) -> Any:
    """Put pages in the place of patterns, `*` for a name and `**` for any path, each where it fits first.

    A page in a folder of its kind is called by its file there: benchmarks share their headings.
    """
    if isinstance(nav, dict):
        return {title: expanded(entry, pages) for title, entry in nav.items()}
    if isinstance(nav, str) or "*" not in str(nav):
        return nav
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            pattern = re.escape(entry).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
            found = [page for page in pages if re.fullmatch(pattern, page)]
            pages[:] = [page for page in pages if page not in found]
            folder = posixpath.dirname(entry) + "/"
            entries += [{page[len(folder) : -3]: page} if folder.count("/") > 1 else page for page in found]
        else:
            entries.append(expanded(entry, pages))
    return entries


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead where a code host takes them, and fill in the reference of the command."""
    uri = page.file.src_uri
    if uri.startswith("../"):
        markdown = re.sub(r"\]\((?:\.\./)+docs/", "](/", markdown)
    if uri == "reference/cli.md":
        markdown = markdown.replace("<!-- commands -->", commands())
    return re.sub(r"\[([^]]+)\]\(([^):]+/)\)", lambda link: folder_link(*link.groups(), uri), markdown)


def folder_link(text: str, target: str, uri: str) -> str:
    """Keep only the text of a link to a folder, which is a list of files on a code host and nothing here."""
    return text if (ROOT / "docs" / posixpath.dirname(uri) / target).is_dir() else f"[{text}]({target})"


def commands() -> str:
    """Describe every command from its own help."""
    from typer import Context
    from typer.cli import get_docs_for_click
    from typer.main import get_group

    from patchattn.cli.app import app

    group = get_group(app)
    context = Context(group)
    described = [
        get_docs_for_click(obj=command, ctx=context, indent=1, call_prefix="patchattn")
        for command in group.commands.values()
    ]
    return "\n".join([group.help or "", *described])


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML of formulas, which browsers draw without a script."""
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, content, flags=re.DOTALL)


def formula(found: re.Match[str]) -> str:
    """Convert one formula, with the space between a function and its neighbours that is missing otherwise."""
    converted = convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")
    space = '<mspace width="0.17em"/>'
    return re.sub(r"<mi>(log|max|tanh)</mi>", rf"{space}\g<0>{space}", converted)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of what a browser would fetch from elsewhere; a strict build fails by it."""
    for address in LOADED.findall(output):
        _LOG.warning("%s loads %s", page.file.src_uri, address)
    return output
