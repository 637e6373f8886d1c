"""The list of mutants fits the source that it breaks; `python tests/mutants.py` runs them."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_mutants_fit_the_source():
    script = runpy.run_path(str(Path(__file__).parents[1] / "mutants.py"))
    assert script["find_mistakes"]() == []
    assert len({mutant.name for mutant in script["MUTANTS"]}) == len(script["MUTANTS"]) >= 20
