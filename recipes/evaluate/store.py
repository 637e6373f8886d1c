"""Measured rows on disk, one JSON object a line, and work shared by processes."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Store:
    """Rows of one recipe. Each process appends to its own file; all files are read.

    Args:
        folder: Where the files are.
        name: Beginning of their names.
        part: Number of the process.
    """

    def __init__(self, folder: Path, name: str, part: int = 0) -> None:
        self.folder, self.name, self.part = folder, name, part

    def rows(self) -> list[Row]:
        """Read what is there; a line that was cut off by an interruption is left out."""
        paths = sorted(self.folder.glob(f"{self.name}.*.jsonl"))
        lines = [line for path in paths for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith("}")]

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.{self.part}.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds; make and write it if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = json.dumps(make())
        path.write_text(made)
    return json.loads(path.read_text())


def share_out(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call `work(part, processes, *arguments)` in each of several processes.

    Raises:
        SystemExit: One of them failed.
    """
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work, args=(part, processes, *arguments)) for part in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise SystemExit("a process failed; start again to go on from the rows that are saved")
