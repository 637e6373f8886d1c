"""What the user can put right is said in two lines, without a traceback; exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from patchattn.errors import PatchAttnError
from patchattn.writing import check_folder

EXIT_CODE = 2


def stop(message: str, *, fix: str) -> typer.Exit:
    """Print a problem and its fix on standard error; raise what this returns.

    Args:
        message: What was expected and what came.
        fix: What to do about it.
    """
    console = Console(stderr=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    console.print(f"  [bold]Fix:[/] {escape(fix)}", soft_wrap=True, highlight=False)
    return typer.Exit(EXIT_CODE)


@contextmanager
def explained() -> Iterator[None]:
    """Turn the library's own errors and invalid policies into a message, a fix and exit code 2."""
    try:
        yield
    except PatchAttnError as error:
        raise stop(error.message, fix=error.fix or f"See docs/reference/errors.md, code {error.code}.") from None
    except ValidationError as error:
        lines = [f"{_place(problem['loc'])}: {problem['msg']}" for problem in error.errors()]
        raise stop(
            "The policy is not valid. " + "; ".join(lines) + ".",
            fix="Correct these fields; docs/reference/policy.md lists all of them with their ranges.",
        ) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise stop("The picture needs matplotlib.", fix='pip install "patchattn[demo]"') from None


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "policy"


def check_out(folder: Path) -> None:
    """Refuse a folder that can't be written into before minutes of work; makes nothing."""
    try:
        check_folder(folder)
    except OSError as error:
        if folder.is_file():
            raise stop(f"{folder} is not a folder.", fix="Choose another --out.") from None
        raise stop(f"Can't write into {folder}: {error.strerror}.", fix="Choose another --out.") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file that the user named."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise stop(f"{path} is not UTF-8 text.", fix="Give a plain text file encoded as UTF-8.") from None
    except OSError as error:
        raise stop(f"Can't read {path}: {error.strerror}.", fix="Give the path of a readable file.") from None
