"""Rows on disk: measured dataclasses as lines of JSON, which a later run goes on from, and CSV out of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from patchattn.errors import ReportError
from patchattn.writing import made


class Store:
    """Rows in one file, one JSON object a line. Several processes may add to it at the same time.

    Args:
        path: The file; it is made with the first row.
        kinds: Dataclasses of the rows; where there are several, each line names its own.
    """

    def __init__(self, path: str | Path, *kinds: type[Any]) -> None:
        self.path = Path(path)
        self._kinds = {kind.__name__: TypeAdapter(kind) for kind in kinds}

    def add(self, *rows: Any) -> None:
        """Append rows; makes the folder.

        Raises:
            ReportError: The file can't be written.
        """
        several = len(self._kinds) > 1
        named = ({"kind": type(row).__name__, **vars(row)} if several else row for row in rows)
        lines = "".join(json.dumps(row, default=vars) + "\n" for row in named)
        try:
            # Without a buffer the lines are one call, which other processes can't write into.
            with made(self.path.parent), self.path.open("ab", buffering=0) as file:
                # A line that was broken off stays by itself.
                file.write(("" if self._ends_a_line() else "\n").encode() + lines.encode())
        except OSError as error:
            raise ReportError(f"Can't write {self.path}: {error.strerror}.", fix="Choose another place.") from error

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(size - 1, 0))
            return file.read() in (b"", b"\n")

    def rows(self, kind: type[Any] | None = None) -> list[Any]:
        """Read the rows, of one kind or all; none if there is no file. Lines that were broken off are left out.

        Raises:
            ReportError: The file holds something else.
        """
        if not self.path.exists():
            return []
        try:
            found = [self._row(line) for line in self.path.read_text(encoding="utf-8").split("\n")]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fix = "Delete it, or choose another place."
            raise ReportError(f"{self.path} is not a file of results.", fix=fix) from error
        return [row for row in found if row is not None and (kind is None or isinstance(row, kind))]

    def _row(self, line: str) -> Any:
        """Read a line; None if it is empty or was broken off."""
        try:
            fields = json.loads(line)
        except ValueError:
            if not line or line.startswith("{"):
                return None
            raise
        name = fields.pop("kind") if len(self._kinds) > 1 else next(iter(self._kinds))
        return self._kinds[name].validate_python(fields)

    def by(self, *names: str) -> dict[Any, Any]:
        """Read the rows by some of their fields, so that a run can tell which are there already; the latest counts.

        Args:
            names: One field, whose value is the key, or several, whose values are a tuple.
        """
        rows = self.rows()
        if len(names) == 1:
            return {getattr(row, names[0]): row for row in rows}
        return {tuple(getattr(row, name) for name in names): row for row in rows}


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
