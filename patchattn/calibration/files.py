"""The files of a calibration's folder: read strictly, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from patchattn.errors import CalibrationError, CalibrationFormatError, CalibrationNotFoundError

FILE = "calibration.safetensors"
POLICY_FILE = "policy.json"

_MOST_FILE_BYTES = 1 << 30


def read(path: Path) -> bytes:
    """Read a file that must lie in its folder.

    Raises:
        CalibrationNotFoundError: It does not exist.
        CalibrationFormatError: It is a link that leads out of the folder, no plain file, or too large.
        CalibrationError: It can't be read.
    """
    try:
        real = path.resolve(strict=True)
        # A snapshot in the Hub's cache is a folder of links into the `blobs` beside it.
        homes = {path.parent.resolve(), path.parent.resolve().parent.parent / "blobs"}
        if real.parent not in homes:
            raise CalibrationFormatError(
                f"{path.name} in {path.parent} is a link that leads out of the folder.", fix="put the file itself there"
            )
        if not real.is_file():
            raise CalibrationFormatError(f"{path} is not a file.", fix="give the folder of a calibration")
        if real.stat().st_size > _MOST_FILE_BYTES:
            raise damaged(f"it has {real.stat().st_size:,} bytes, more than any calibration")
        return real.read_bytes()
    except FileNotFoundError:
        raise CalibrationNotFoundError(
            f"There is no {path.name} in {path.parent}.", fix="give a folder made by Calibration.save_pretrained"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"Can't read {path}: {error}.", fix="check the path and its permissions") from None


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what was there before stays until the new one is complete.

    Raises:
        CalibrationError: It can't be written.
    """
    with writing(path.parent):
        part = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong when writing into a folder into a `CalibrationError`."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"Can't write into {folder}: {error.strerror or error}. What was there before is unchanged.",
            fix="make room, or choose a folder that can be written",
        ) from error


def lock_of(folder: Path) -> Path:
    """Name the file whose lock a process holds while it writes a folder; it lies outside of the folder."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"patchattn-{name}.lock"


def damaged(what: str) -> CalibrationFormatError:
    """Make the error for a file that is not what it should be.

    Args:
        what: What is wrong with it.
    """
    return CalibrationFormatError(
        f"This is not a valid calibration: {what}.", fix="get the file again, or measure the calibration again"
    )
