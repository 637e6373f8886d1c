"""Rows on disk: measured dataclasses as lines of JSON, which a later run goes on from, and CSV out of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from patchattn.errors import ReportError
from patchattn.writing import made

_Row = TypeVar("_Row")  # Not `Row`: pydantic 2.7 reads the annotations of the rows with the names of this module.


class Store(Generic[_Row]):
    """Rows in one file, one JSON object a line. Several processes may add to it at the same time.

    Args:
        path: The file; it is made with the first row.
        kind: Dataclass of the rows.
    """

    def __init__(self, path: str | Path, kind: type[_Row]) -> None:
        self.path = Path(path)
        self._kind = TypeAdapter(kind)

    def add(self, *rows: _Row) -> None:
        """Append rows; makes the folder.

        Raises:
            ReportError: The file can't be written.
        """
        lines = "".join(json.dumps(row, default=vars) + "\n" for row in rows)
        try:
            # Without a buffer the lines are one call, which other processes can't write into.
            with made(self.path.parent), self.path.open("a+b", buffering=0) as file:
                file.seek(max(file.tell() - 1, 0))
                broken_off = file.read() not in (b"", b"\n")
                file.write(b"\n" * broken_off + lines.encode())
        except OSError as error:
            raise ReportError(f"Can't write {self.path}: {error.strerror}.", fix="Choose another place.") from error

    def rows(self) -> list[_Row]:
        """Read the rows; none if there is no file. Lines that were broken off are left out.

        Raises:
            ReportError: The file holds something else.
        """
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
            return [self._kind.validate_python(fields) for fields in map(_whole, lines) if fields is not None]
        except ValueError as error:
            fix = "Delete it, or choose another place."
            raise ReportError(f"{self.path} is not a file of results.", fix=fix) from error


def _whole(line: str) -> Any:
    """Read a line; None if it is empty or was broken off."""
    try:
        return json.loads(line)
    except ValueError:
        if line and not line.startswith("{"):
            raise
        return None


def csv_text(rows: Iterable[Mapping[str, Any]], number: str = ".5g", **of_column: str) -> str:
    """Write rows as CSV; the first one names the columns.

    Args:
        rows: Values by column; `vars` of a dataclass will do. Sequences of numbers are parted by spaces.
        number: How floats are written.
        of_column: How those of single columns are.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for at, row in enumerate(rows):
        if at == 0:
            writer.writerow(row)
        writer.writerow(_written(value, of_column.get(name, number)) for name, value in row.items())
    return file.getvalue()


def _written(value: Any, number: str) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(str(_written(one, number)) for one in value)
    return format(value, number) if isinstance(value, float) else value
