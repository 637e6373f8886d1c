"""Make a site of the documentation, with Sphinx.

    pip install -c tests/constraints.txt -e ".[docs]"
    sphinx-build -W --keep-going -c .ci/docs . build/site

Every warning, also of a link that leads nowhere, fails the build (`-W`). The pages are plain Markdown and read well on
a code host too; what Sphinx wants to find in them, such as the navigation, is put in here. Nothing is fetched from a
network, neither by the build nor by a reader's browser.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import posixpath
import re
from pathlib import Path
from typing import Any, get_type_hints

from docutils import nodes
from latex2mathml.converter import convert
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.inspect import stringify_signature

ROOT = Path(__file__).parents[2]

project = "patchattn"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

include_patterns = ["docs/**", "recipes/**README.md", "calibrations/**README.md"]
root_doc = "docs/README"
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 6

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "model_config", "ignore-module-all": True}
nitpicky = True  # an exception that a docstring names exists; other types may be anybody's
nitpick_ignore_regex = [("py:class", r"[\w.]+"), ("py:exc", r"pydantic\..+")]
default_role = "code"  # of single backticks in docstrings
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "patchattn"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_extra_path = ["index.html"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]

NAVIGATION = {
    "Tutorial": ["tutorial/*"],
    "How-to guides": [
        "how-to/choose-a-policy",
        "how-to/choose-a-cache",
        "how-to/calibrate-and-share",
        "how-to/evaluate-your-model",
        "how-to/read-a-report",
        "how-to/prove-your-model",
        "how-to/serve",
        "how-to/use-several-gpus",
        "how-to/*",
    ],
    "Explanation": [
        "explanation/how-it-works",
        "explanation/method",
        "explanation/guarantee",
        "explanation/performance",
        "explanation/limits",
        "explanation/house",
        "explanation/*",
    ],
    "Reference": [
        "reference/policy",
        "reference/models",
        "reference/calibration",
        "reference/errors",
        "reference/cli",
        "reference/python",
        "reference/*",
    ],
    "Results": ["results/README", "results/*"],
    "Decisions": ["decisions/README", "decisions/*"],
    "In the repository": ["changelog", "/recipes/**", "/calibrations/**"],
}
"""A pattern stands for the pages that are not named before it, so that a new one is found without a change here."""

_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(https?:[^\"' >]+)")


def complete(app: Sphinx, name: str, source: list[str]) -> None:
    """Put into a page what only the site has: the navigation, and texts from docstrings and commands."""
    text = source[0]
    if name == root_doc:
        text += "".join(toctree(entries, caption=caption) for caption, entries in NAVIGATION.items())
    if name == "docs/results/benchmarks":  # they share their headings
        pages = sorted((ROOT / "docs/results/benchmarks").glob("*.md"))
        text += toctree([f"{page.stem} <benchmarks/{page.stem}>" for page in pages])
    if name == "docs/reference/cli":
        text = text.replace("<!-- commands -->", commands())
    text = re.sub(r"^::: ([\w.]+)$", lambda found: described(found[1]), text, flags=re.MULTILINE)
    text = re.sub(r'^```(\w+) title="([^"]+)"$', r"```{code-block} \1\n:caption: \2\n", text, flags=re.MULTILINE)
    # A folder is a list of files on a code host, and nothing here.
    folder = ROOT / posixpath.dirname(name)
    for link, words, target in re.findall(r"(\[([^]]+)\]\(([^):]+/)\))", text):
        text = text.replace(link, words) if (folder / target).is_dir() else text
    source[0] = text


def toctree(entries: list[str], caption: str = "") -> str:
    """Make a list of pages for the navigation."""
    options = [":hidden:", ":glob:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["\n\n```{toctree}", *options, "", *entries, "```\n"])


def described(name: str) -> str:
    """Describe an object from its docstring; of a module, everything in it and, under headings, in those below."""
    parent, _, last = name.rpartition(".")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        found = getattr(importlib.import_module(parent), last)
        kind = "function" if inspect.isroutine(found) else "data"
        if inspect.isclass(found):
            kind = "exception" if issubclass(found, BaseException) else "class"
        directive = f".. auto{kind}:: {name}"
        below = []
    else:
        directive = f".. automodule:: {name}"
        below = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}.")]
    return "\n\n".join([f"```{{eval-rst}}\n{directive}\n```", *(f"## `{each}`\n\n{described(each)}" for each in below)])


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


def untyped(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking words before a colon for the type of a value, which the annotation tells."""
    values = [0] if what in ("attribute", "data", "property") else []
    values += [at + 1 for at, line in enumerate(lines) if line.strip() in ("Returns:", "Yields:")]
    for at in values:
        lines[at] = re.sub(r"^( *)", r"\1: ", lines[at])


def fields(app: Sphinx, what: str, name: str, found: Any, *_: Any) -> tuple[str, str] | None:
    """Give a pydantic model the signature of its fields without their ranges, which are in the description."""
    if what != "class" or not issubclass(found, BaseModel):
        return None
    kinds = get_type_hints(found)
    takes = [each for each in inspect.signature(found).parameters.values() if each.name != "kind"]
    return stringify_signature(inspect.Signature([each.replace(annotation=kinds[each.name]) for each in takes])), ""


def formula(display: str) -> Any:
    """Make MathML of formulas, which browsers draw without a script."""

    def visit(translator: Any, node: nodes.Element) -> None:
        converted = convert(node.astext(), display=display)
        # The space between a function and its neighbours is missing otherwise.
        space = '<mspace width="0.17em"/>'
        translator.body.append(re.sub(r"<mi>(log|max|tanh)</mi>", rf"{space}\g<0>{space}", converted))
        raise nodes.SkipNode

    return visit, None


def check_offline(app: Sphinx, exception: Exception | None) -> None:
    """Refuse pages for which a browser would fetch something from elsewhere."""
    for page in Path(app.outdir).rglob("*.html"):
        if found := _LOADED.findall(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page} loads {found}")


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("source-read", complete)
    app.connect("autodoc-process-signature", fields)
    app.connect("autodoc-process-docstring", untyped, priority=1)  # before napoleon
    app.connect("build-finished", check_offline)
