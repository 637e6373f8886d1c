"""A name that may be a folder or a Hub id: which of them it is, and what to say where it is neither."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Say whether a name can only be a path: no Hub id starts or ends like that, or has two slashes."""
    if isinstance(name, os.PathLike):
        return True
    parts = name.replace(os.sep, "/")
    return parts.startswith((".", "/", "~")) or parts.endswith("/") or parts.count("/") > 1 or Path(name).is_absolute()


def no_folder(name: str | os.PathLike[str]) -> str:
    """Say that a name is no folder: nothing of that name, or a file."""
    folder = Path(name)
    return f"{folder} is a file, not a folder." if folder.is_file() else f"There is no folder {folder}."


def fix_for(name: str | os.PathLike[str], otherwise: str) -> str:
    """Suggest the existing folder that a name is nearest to, and what else to do."""
    nearest = _nearest(Path(name))
    return otherwise if nearest is None else f"did you mean {nearest}? If not, {otherwise}"


def _nearest(folder: Path) -> Path | None:
    """Return the folder that is called most alike; None if none is, or none may be looked at."""
    if folder.is_file():
        return folder.parent
    missing = folder
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    alike = difflib.get_close_matches(missing.name, names, n=1)
    if not alike:
        return None
    found = missing.parent / alike[0]
    whole = found / folder.relative_to(missing)
    return whole if whole.is_dir() else found
