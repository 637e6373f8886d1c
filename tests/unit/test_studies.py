"""The pages of studies whose rows are kept as tables say what the tables say."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from patchattn.evaluation.rows import csv_text

pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "evaluate"
READ = {"str": str, "int": int, "float": float, "tuple[float, ...]": lambda text: tuple(map(float, text.split()))}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"studies.{name}")


def rows_of(kind: type[Any], table: str, **others: Any) -> list[Any]:
    with (FOLDER / "results" / f"{table}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    types = {name: READ[str(kind.__annotations__[name])] for name in lines[0]}
    return [kind(**{name: read(line[name]) for name, read in types.items()}, **others) for line in lines]


TOWARDS = {"JUDGED_ROWS": "", "PATCHED": ".patched", "TIMED": ".times"}


@pytest.mark.parametrize("name", ["estimates", "kvpress", "towards_the_oracle"])
def test_a_page_is_made_of_the_rows_that_are_kept(study: Any, tmp_path: Path, name: str) -> None:
    module, context = study(name), importlib.import_module("context").Context(tmp_path, {})
    if name == "towards_the_oracle":
        for measured, table in TOWARDS.items():
            measurement = getattr(module, measured)
            measurement.store(context).add(*rows_of(measurement.row, f"{name}{table}"))
    else:
        module.ROWS.store(context).add(*rows_of(module.Row, name))
    if name == "estimates":
        module.FITS.store(context).add(*rows_of(module.Fit, "estimates.dense", thresholds=()))
    page = module.page(context)
    assert page.markdown == (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    for table, rows in page.tables.items():
        assert csv_text(rows, **page.formats) == (FOLDER / "results" / f"{table}.csv").read_text(encoding="utf-8")


def test_the_page_of_quality_is_made_of_its_table(study: Any, tmp_path: Path) -> None:
    options = {"families": [], "again": False, "kvpress_python": None}
    context = importlib.import_module("context").Context(tmp_path, options, [FOLDER / "results"])
    page = study("quality").page(context)
    assert page.markdown == (ROOT / "docs" / "results" / "quality.md").read_text(encoding="utf-8")
    (rows,) = page.tables.values()
    assert csv_text(rows, **page.formats) == (FOLDER / "results" / "quality.csv").read_text(encoding="utf-8")


def test_thresholds_open_no_more_than_was_asked_for(study: Any) -> None:
    candidates = study("estimates.candidates")
    margins = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    share = torch.sigmoid(-margins)
    share[0] = 0
    common = candidates.common_threshold(margins, 0.3)
    by_head = candidates.thresholds_by_head(margins, share, 0.3)
    assert (margins < common[:, None]).double().mean() == pytest.approx(0.3, abs=1e-3)
    opened = (margins < by_head[:, None]).double().mean(1)
    assert opened.mean() <= 0.3
    assert opened.mean() == pytest.approx(0.3, abs=0.02)
    assert opened[0] == 0
