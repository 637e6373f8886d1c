"""Where a report is saved: refused early and plainly where that can't be."""

from __future__ import annotations

from pathlib import Path

from patchattn.errors import ReportError


def check_path(path: str | Path) -> Path:
    """Refuse a path that can't become a file, before work is spent on what goes into it.

    Raises:
        ReportError: The folder does not exist, or the path is a folder.
    """
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise ReportError(f"The folder {path.parent} does not exist.", fix="make the folder, or choose another path")
    if path.is_dir():
        raise ReportError(f"{path} is a folder.", fix="give the path of a file")
    return path


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
