"""Rows on disk: what is written is read again, whatever broke off, and several may write at once."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from patchattn.errors import ReportError
from patchattn.evaluation.rows import Store, csv_text


@dataclass(frozen=True)
class Part:
    share: float


@dataclass(frozen=True)
class Row:
    name: str
    losses: tuple[float, ...] = ()
    parts: dict[str, Part] = field(default_factory=dict)
    place: tuple[str, int] = ("facts", 1)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "rows.jsonl", Row)
    assert store.rows() == []
    rows = [Row("a", (1.5, math.inf), {"x": Part(0.25)}, ("lists", 2)), Row("b")]
    store.add(*rows)
    store.add(Row("a"))
    assert store.rows() == [*rows, Row("a")]
    assert store.path.read_text().count("\n") == 3


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_line_that_was_broken_off_is_left_out_and_spoils_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    Store(path, Row).add(Row("a", parts={"x": Part(1.0)}))
    line = path.read_text()
    path.write_text(line + line[:cut])
    assert [row.name for row in Store(path, Row).rows()] == ["a"]
    Store(path, Row).add(Row("b"))
    assert [row.name for row in Store(path, Row).rows()] == ["a", "b"]


@pytest.mark.parametrize("text", ["# Notes\n", '{"else": 1}\n', "[1]\n", '{"name": "a", "losses": "many"}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ReportError, match="not a file of results"):
        Store(path, Row).rows()


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="Can't write"):
        Store(tmp_path / "file" / "rows.jsonl", Row).add(Row("a"))


def _add(path: Path, name: str) -> None:
    for _ in range(20):
        Store(path, Row).add(Row(name * 5000))


def test_processes_do_not_write_into_each_others_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_add, args=(path, name)) for name in "abc"]
    for process in running:
        process.start()
    for process in running:
        process.join()
    names = [row.name for row in Store(path, Row).rows()]
    assert sorted(names) == sorted(name * 5000 for name in "abc" for _ in range(20))


def test_csv_writes_numbers_as_asked() -> None:
    rows = [{"name": "a,b", "count": 3, "share": 0.123456789, "losses": (1.0, 0.5), "seconds": 2.25, "none": None}]
    assert csv_text(rows, seconds=".1f") == 'name,count,share,losses,seconds,none\n"a,b",3,0.12346,1 0.5,2.2,\n'
    assert csv_text([]) == ""
