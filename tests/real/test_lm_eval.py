"""lm-evaluation-harness asks a real model for its own needles, without a network."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="lm_eval is not installed with Python 3.10"),
]


def test_needles_are_found_by_dense_and_by_the_default_gate_but_not_by_closed_gates(
    real_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "09_lm_eval_needles.py")
    options = ["--length", "1024", "--samples", "3", "--window", "256", "--most", "16"]
    monkeypatch.setattr(sys, "argv", [recipe, "--model", str(real_folder), *options])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What the harness's dependencies say is not ours to put right.
        runpy.run_path(recipe, run_name="__main__")
    scores = re.search(
        r"^niah_single_1: dense ([\d.]+), default ([\d.]+), closed ([\d.]+)$", capsys.readouterr().out, re.MULTILINE
    )
    dense, default, closed = map(float, scores.groups())
    assert dense == 1
    assert default > 0.6
    assert closed < dense
