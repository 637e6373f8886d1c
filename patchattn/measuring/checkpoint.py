"""Sums of a calibration that is not finished, so that a run that was killed can go on."""

from __future__ import annotations

from pathlib import Path

from patchattn.calibration import files
from patchattn.errors import CalibrationError
from patchattn.measuring.statistics import Totals
from patchattn.writing import made


def keep(totals: Totals, path: Path, key: str, done: int) -> None:
    """Write the sums of the first `done` documents, whole or not at all; makes the folder.

    Args:
        totals: The sums.
        path: File to write.
        key: Digest of everything that the run depends on.
        done: Number of finished documents.
    """
    from safetensors.torch import save

    with files.writing(path.parent), made(path.parent):
        files.write(path, save(totals.sums, metadata={"key": key, "done": str(done)}))


def resume(totals: Totals, path: Path, key: str) -> int:
    """Read sums back into totals; returns the number of documents in them, 0 without a file.

    Raises:
        CalibrationError: The file can't be read, or is of another run.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            sums = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"The checkpoint {path} can't be read: {error}.", fix="delete it") from None
    if metadata.get("key") != key or set(sums) != set(totals.sums):
        raise CalibrationError(
            f"The checkpoint {path} is of a run with another model, other documents or other settings.",
            fix="delete it, or name another checkpoint",
        )
    totals.sums = sums
    return int(metadata["done"])
