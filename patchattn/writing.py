"""Where results are saved: refused early and plainly where that can't be, and nothing left behind by what fails."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from patchattn.errors import ReportError


def check_path(path: str | Path) -> Path:
    """Refuse a path that can't become a file, before work is spent on what goes into it.

    Raises:
        ReportError: The folder does not exist or can't be written into, or the path is a folder or can't be replaced.
    """
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise ReportError(f"The folder {path.parent} does not exist.", fix="make the folder, or choose another path")
    try:
        if path.is_dir():
            raise ReportError(f"{path} is a folder.", fix="give the path of a file")
        if path.exists():
            path.open("ab").close()
        else:
            # The name itself may be too long, which no other file in the folder tells.
            path.open("xb").close()
            path.unlink()
    except OSError as error:
        raise ReportError(f"Can't write {path}: {error.strerror}.", fix="choose another path") from error
    return path


def check_folder(folder: Path) -> None:
    """Find out whether a folder can be made and written into; leaves everything as it was.

    Raises:
        OSError: It can't.
    """
    with made(folder, keep=False), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def made(folder: Path, *, keep: bool = True) -> Iterator[None]:
    """Make a folder; where the block fails, those folders that were made for it and are empty are removed again.

    Args:
        folder: The folder; its parents are made too.
        keep: False removes them in any case.
    """
    with tidied(folder, keep=keep):
        folder.mkdir(parents=True, exist_ok=True)
        yield


@contextlib.contextmanager
def tidied(folder: Path, *, keep: bool = True) -> Iterator[None]:
    """Remove the folder and its parents where they are made within the block, the block fails, and they are empty.

    Args:
        folder: The folder.
        keep: False removes them in any case.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        yield
    except BaseException:
        keep = False
        raise
    finally:
        for path in () if keep else missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file as UTF-8.

    Raises:
        ReportError: The file can't be written.
    """
    path = check_path(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"Can't write {path}: {error.strerror}.", fix="choose another path") from error
    return path
