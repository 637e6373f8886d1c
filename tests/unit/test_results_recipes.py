"""The arithmetic behind the results pages: what rows are reduced to, and what the pages say about them."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from patchattn import MomentGate, OracleGate, Policy, patch
from patchattn.evaluation.margins import Margins, record_margins
from patchattn.measuring.collect import read_document
from patchattn.testing.models import tiny_model

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "recipes" / "evaluate"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_recorded_margins_decide_like_the_gates_of_the_first_layer() -> None:
    model = tiny_model("llama").eval()
    ids = torch.randint(0, model.config.vocab_size, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    found = record_margins(model, ids, sink_size=4, windows=(16, 500))
    assert list(found) == [16]
    assert set(found[16]) == set(range(model.config.num_hidden_layers))
    margins = found[16][0]
    assert margins.positions.tolist() == list(range(20, 300))
    for gate, estimate in ((OracleGate(threshold=0.1), None), (MomentGate(threshold=0.1), ("prompt", "guarded"))):
        with patch(model, Policy(sink_size=4, window_size=16, min_bulk=0, gate=gate), record="timeline") as handle:
            read_document(model, torch.tensor(ids))
        opened = handle.report().timeline[0][0][1][0][:, margins.positions]
        assert 0 < opened.double().mean() < 1
        torch.testing.assert_close(margins.opens(0.1, estimate), opened)


def test_curves_are_averaged_over_the_logarithm(recipe: Any) -> None:
    mean = recipe("intervals").mean_over_log
    x = np.array([0.01, 0.1, 0.5])
    assert mean(x, np.log(x), 0.02, 0.4) == pytest.approx((math.log(0.02) + math.log(0.4)) / 2)
    assert mean(x, np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]]), 0.01, 0.1).tolist() == pytest.approx([1.0, 1.0])


def test_a_bootstrap_is_as_wide_as_its_standard_error(recipe: Any) -> None:
    ratio = recipe("intervals").ratio_of_sums
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = ratio(values, np.ones(400))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bins_say_which_thresholds_open(recipe: Any) -> None:
    recording = recipe("recording")
    margin = torch.tensor([-math.inf, math.nan, -50.0, math.log(0.6 / 0.4) - 1e-4, math.log(0.6 / 0.4) + 1e-4, 50.0])
    for at, threshold in enumerate(recording.THRESHOLDS):
        opens = ~(margin.double() >= math.log(threshold / (1 - threshold)))
        assert (recording.bins(margin) <= at).tolist() == opens.tolist()


def test_a_layer_is_reduced_to_what_its_pairs_say(recipe: Any) -> None:
    recording, classification = recipe("recording"), recipe("classification")
    generator = torch.Generator().manual_seed(0)
    local, bulk, noise = (torch.randn(3, 400, generator=generator) for _ in range(3))
    margins = Margins(torch.arange(400), local, bulk, bulk - 1, {("prompt", "guarded"): bulk + noise})
    task = torch.arange(400) % 4
    layer = recording.reduce_layer(margins, task)
    row = {"length": 1, "window": 1, "document": 0, "layers": [layer]}
    place = classification.Recorded([row], 1, 1)
    oracle, gate = margins.opens(0.6), margins.opens(0.6, ("prompt", "guarded"))
    found = place.confusion("prompt/guarded", 0.6)
    cells = [oracle & gate, ~oracle & gate, oracle & ~gate, ~oracle & ~gate]
    assert found.counts[0].tolist() == [int(cell.sum()) for cell in cells]
    assert found.missed[0] == pytest.approx(float(margins.bulk_share[~gate].sum()), rel=1e-5)
    recall = found.measures["recall"]
    assert recall.value == pytest.approx(float((oracle & gate).sum() / oracle.sum()))
    by_task = torch.tensor(layer["oracle_by_task"])[..., :6].sum(-1)
    assert by_task[:, 1].tolist() == oracle[:, task == 1].sum(1).tolist()
    assert layer["ranks"]["prompt/guarded"][0] == pytest.approx(
        recording.spearman((local - bulk)[0], (local - bulk - noise)[0])
    )
    assert recording.spearman(torch.arange(20.0), torch.arange(20.0).exp()) == pytest.approx(1.0)


def test_thresholds_are_quantiles_and_none_lies_below_the_floor(recipe: Any) -> None:
    ranking = recipe("ranking")
    local = torch.linspace(-2, 2, 1000)[None]
    guess = torch.zeros(1, 1000)
    guess[0, :40] = math.inf
    margins = Margins(torch.arange(1000), local, torch.zeros(1, 1000), guess, {("prompt", "guarded"): guess})
    found = json.loads(json.dumps(ranking.of_window([({0: margins}, torch.full((1000,), 3))])))
    assert found["floor"] == {"oracle": 0.0, "prompt/guarded": pytest.approx(0.04)}
    share = ranking.threshold(found, "oracle", 0.2)
    assert margins.opens(share).double().mean() == pytest.approx(0.2, abs=2e-3)
    assert ranking.threshold(found, "prompt/guarded", 0.03) is None
    share = ranking.threshold(found, "prompt/guarded", 0.2)
    assert margins.opens(share, ("prompt", "guarded")).double().mean() == pytest.approx(0.2, abs=2e-3)
    assert found["heads"] == found["heads_answering"] == [[0, 0]]


def row(family: str, setting: str, document: int, right: int, loss: float, opened: int) -> dict[str, Any]:
    about = {"kinds": "facts", "length": 4096, "window": 256, "family": family, "setting": setting}
    counts = [opened, 1000, 2 * opened, 4000]
    return about | {
        "document": document,
        "counts": counts,
        "right": {"fact": right},
        "asked": {"fact": 36},
        "loss": loss,
    }


def test_a_gate_is_compared_with_dense_attention_on_the_same_documents(recipe: Any) -> None:
    rows = [row("open", "", at, 34, 2.0 + at, 1000) for at in range(4)]
    rows += [row("oracle", "0.6", at, 34 - at, 1.02 * (2.0 + at), 100) for at in range(2)]
    found = next(one for one in recipe("summary").summaries(rows) if one.family == "oracle")
    assert (found.documents, found.right, found.asked, found.open_fraction) == (2, 67, 72, 0.1)
    assert found.lost.value == pytest.approx(100 / 72)
    assert (found.rise.value, found.rise.low, found.rise.high) == pytest.approx((0.02, 0.02, 0.02))


def test_only_curves_that_reach_both_ends_have_an_area(recipe: Any) -> None:
    summary = recipe("summary")
    rows = [row("open", "", at, 36, 2.0, 1000) for at in range(3)]
    for opened, right in ((40, 18), (100, 18), (300, 18)):
        rows += [row("oracle", f"{opened}", at, right, 2.02, opened) for at in range(3)]
        rows += [row("prompt/guarded", f"{opened}", at, right, 2.02, opened + 200) for at in range(3)]
    found = {area.family: area for area in summary.areas(rows, ("facts", 4096, 256))}
    assert found["prompt/guarded"].lost is None
    assert found["oracle"].lost.value == pytest.approx(50.0)
    assert found["oracle"].rise.value == pytest.approx(1.0)


def test_goals_are_met_within_one_point_and_two_percent(recipe: Any) -> None:
    page, grid = recipe("gates_page"), recipe("grid")
    rows = [row("open", "", at, 36, 2.0, 1000) for at in range(3)]
    rows += [row("closed", "", at, 0, 2.2, 0) for at in range(3)]
    rows += [row("oracle", "for 15%", at, 36, 2.01, 150) for at in range(3)]
    rows += [row("risk, each head", "0.2", at, 35, 2.02, 150) for at in range(3)]
    rows += [row("prompt/guarded", "0.6", at, 27, 2.0, 420) for at in range(3)]
    full = [one for one in recipe("summary").summaries(rows) if one.place == grid.FULL.key]
    assert page.best(full, 0.2).family == "risk, each head"
    lines = page.goals(full).splitlines()
    assert any("risk, each head" in line and "| no |" in line for line in lines), "2.8 points are more than one"
    assert any("oracle" in line and "| yes |" in line for line in lines)
