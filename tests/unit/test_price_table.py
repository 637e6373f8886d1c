"""Tests of what prices say in a few numbers, and of the picture of them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.transforms import Bbox

from patchattn.calibration import Calibration
from patchattn.calibration.pictures import prices_figure
from patchattn.calibration.price_table import PriceTable, price_table
from patchattn.gates import MomentGate, OracleGate
from patchattn.gates.thresholds import KL_BOUND, KLTarget

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

SHAPES = [{"layers": 3, "query_heads": 6}, {"layers": 30, "query_heads": 9, "kv_heads": 3}]


def table_of(calibration: Calibration) -> PriceTable:
    found = price_table(calibration.findings)
    assert found is not None
    return found


def with_tensors(calibration: Calibration, **tensors: torch.Tensor) -> Calibration:
    return Calibration(calibration.manifest, calibration.policy, calibration.tensors | tensors)


def test_without_prices_there_is_no_table() -> None:
    assert price_table(made_up_calibration().findings) is None


def test_prices_are_shown_whatever_gate_the_own_policy_has() -> None:
    calibration = made_up_calibration(estimates=("saturating", "lognormal"), prices=True)
    assert calibration.policy.gate.estimate == "saturating"
    lognormal = calibration.policy.model_copy(update={"gate": MomentGate(estimate="lognormal")})
    expected = table_of(Calibration(calibration.manifest, lognormal, calibration.tensors))
    exact = calibration.policy.model_copy(update={"gate": OracleGate()})
    for other in (calibration, Calibration(calibration.manifest, exact, calibration.tensors)):
        assert table_of(other) == expected
        assert other.heads_by_price()[0] == (expected.dearest[0].layer, expected.dearest[0].query_head)
    target = KLTarget(nats=0.01)
    assert torch.equal(other.thresholds(target), calibration.thresholds(target, estimate="lognormal"))


def test_the_dearest_heads_come_first_with_their_share() -> None:
    calibration = made_up_calibration(layers=2, query_heads=4, prices=True)
    price = torch.zeros_like(calibration.tensors["price"])
    price[0, 2, 0], price[1, 1, 0], price[1, 3, 0] = 1, 5, 2
    found = table_of(with_tensors(calibration, value=price))
    heads = [(head.layer, head.query_head, head.nats, head.share) for head in found.dearest[:4]]
    assert heads == [(1, 1, 5, 0.625), (1, 3, 2, 0.25), (0, 2, 1, 0.125), (0, 0, 0, 0)]
    many = table_of(made_up_calibration(**SHAPES[1], prices=True))
    assert (len(many.dearest), many.heads) == (10, 270)
    share = sum(head.share for head in many.dearest)
    assert many.concentration() == f"10 of 270 heads carry {share:.0%} of the price of closing them all"


def test_layers_are_those_that_were_measured() -> None:
    calibration = made_up_calibration(layers=2, query_heads=4, prices=True)
    fingerprint = calibration.manifest.fingerprint.model_copy(update={"layers": 9})
    manifest = calibration.manifest.model_copy(update={"layers": (3, 7), "fingerprint": fingerprint})
    found = table_of(Calibration(manifest, calibration.policy, calibration.tensors))
    assert {head.layer for head in found.dearest} == {3, 7}


def test_what_was_tried_is_what_was_measured_and_can_be_promised() -> None:
    calibration = made_up_calibration(**SHAPES[1], prices=True)
    prices, kl = calibration.findings.priced(), calibration.tensors["kl"].double()
    for at, row in enumerate(table_of(calibration).tried):
        assert (row.predicted, row.measured) == prices.measured()[at]
        assert row.bound == pytest.approx(float(kl[:, at].clamp(max=KL_BOUND).sum() + KL_BOUND) / 10)
        assert row.open_fraction == pytest.approx(float(calibration.tensors["kl_open_fraction"][0, at]))
        target = KLTarget(nats=row.bound * 1.0001, promised=True)
        assert prices.predicted(prices.rungs(target)) >= row.predicted


def test_nothing_was_tried_where_nothing_was_held_out() -> None:
    calibration = made_up_calibration(prices=True)
    source = calibration.manifest.prices.model_copy(update={"held_out": 0})
    nothing = {name: calibration.tensors[name][:0] for name in ("kl", "kl_open_fraction")}
    manifest = calibration.manifest.model_copy(update={"prices": source})
    alone = Calibration(manifest, calibration.policy, calibration.tensors | nothing)
    found = table_of(alone)
    assert found.tried == []
    assert len(prices_figure(alone.findings, found).axes[1].lines) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_picture_shows_heads_and_what_was_measured(shape) -> None:
    calibration = made_up_calibration(**shape, prices=True)
    table = table_of(calibration)
    figure = prices_figure(calibration.findings, table)
    grid, curve, _ = figure.axes
    assert grid.get_title() == table.concentration()
    # What ranks the heads is what the colours show, within their scale.
    shown = calibration.tensors["value"][..., 0].clamp(*grid.images[0].get_clim())
    assert torch.equal(torch.tensor(grid.images[0].get_array().data), shown)
    ranks = {text.get_text(): text.get_position() for text in grid.texts}
    assert ranks == {str(at): (head.query_head, head.layer) for at, head in enumerate(table.dearest, 1)}
    predicted, expected, measured = curve.lines
    assert list(measured.get_ydata()) == [row.measured for row in table.tried]
    assert (measured.get_xdata() == [100 * row.open_fraction for row in table.tried]).all()
    prices = calibration.findings.priced()
    for x, y, z in zip(predicted.get_xdata(), predicted.get_ydata(), expected.get_ydata(), strict=True):
        assert 0 <= x <= 100
        assert z == pytest.approx(y * prices.factor(x / 100))
    assert (torch.tensor(predicted.get_ydata()).diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_in_the_picture_overlaps(shape) -> None:
    calibration = made_up_calibration(**shape, prices=True)
    figure = prices_figure(calibration.findings, table_of(calibration))
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for one, other in itertools.combinations(boxes, 2):
        assert Bbox.intersection(one, other) is None
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
    points = figure.axes[1].lines[2].get_window_extent()
    assert Bbox.intersection(points, figure.axes[1].get_legend().get_window_extent()) is None


def test_heads_that_cost_nothing_are_drawn() -> None:
    calibration = made_up_calibration(**SHAPES[0], prices=True)
    nothing = torch.zeros_like(calibration.tensors["price"])
    free = with_tensors(calibration, price=nothing, value=nothing)
    figure = prices_figure(free.findings, table_of(free))
    figure.draw_without_rendering()
    assert figure.axes[0].get_title() == "10 of 18 heads carry 0% of the price of closing them all"
