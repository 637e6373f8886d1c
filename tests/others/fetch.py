"""Fetches the tests that transformers publishes: `python tests/others/fetch.py` prints where they are.

The source distribution on PyPI carries the common tests of models, the wheel does not. They stay in the user's cache
and are never a part of this repository. Which version is meant is read from the transformers that is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

WANTED = "tests/test_modeling_common.py"
SECONDS = 300


class CannotFetchError(RuntimeError):
    """The source distribution can't be had; says what to do."""


def common_tests(version: str = transformers.__version__) -> Path:
    """Return the file of transformers' common model tests, from the cache or else from PyPI.

    Raises:
        CannotFetchError: pip did not get the source distribution, or it is of another version or without the file.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "patchattn" / f"transformers-{version}"
    found = place / Path(WANTED).name
    if not found.exists():
        with tempfile.TemporaryDirectory() as folder:
            text = _read(_download(version, Path(folder)), version)
        place.mkdir(parents=True, exist_ok=True)
        # Several test processes may fetch at the same time: none of them may see half a file.
        with tempfile.NamedTemporaryFile(dir=place, delete=False) as new:
            new.write(text)
        os.replace(new.name, found)
    return found


def _download(version: str, folder: Path) -> Path:
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers")
    command = (*command, "--dest", str(folder), f"transformers=={version}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _cannot(version, f"pip took longer than {SECONDS} seconds") from error
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise _cannot(version, done.stderr.strip() or "pip left no archive")
    return archives[0]


def _read(archive: Path, version: str) -> bytes:
    root = f"transformers-{version}"
    with tarfile.open(archive) as packed:
        try:
            # Streams, not extract: nothing of the archive gets to choose a path.
            about, tests = packed.extractfile(f"{root}/PKG-INFO"), packed.extractfile(f"{root}/{WANTED}")
        except KeyError as error:
            raise _cannot(version, f"{archive.name}: {error.args[0]}") from error
        if f"\nVersion: {version}\n" not in about.read().decode():
            raise _cannot(version, f"{archive.name} says that it is another version")
        return tests.read()


def _cannot(version: str, why: str) -> CannotFetchError:
    return CannotFetchError(
        f"The source distribution of transformers {version} can't be had: {why}\nThese tests need it from PyPI once: "
        "connect, or point pip at an index that has it, and run `python tests/others/fetch.py`; a version that is not "
        "on PyPI, such as a checkout, has no such tests."
    )


if __name__ == "__main__":
    sys.stdout.write(f"{common_tests()}\n")
