"""Tests of `patchattn.calibration.prices`: the cheapest thresholds for a KL, what is expected of them, the promise."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from patchattn import CalibrationError, KLTarget, MomentGate, OpenFractionTarget, Policy, RiskTarget, StaticGate
from patchattn.calibration import Calibration
from patchattn.calibration.prices import TRIED, Prices, documents_needed
from patchattn.calibration.risk import at_price
from patchattn.gates.thresholds import KL_BOUND

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

NATS = st.floats(1e-4, 0.5)
SEEDS = st.integers(0, 10_000)
GATED = 0.2


def random_prices(seed: int = 0, *, layers=2, heads=4, margins=6, documents=0, spread=1.0) -> Prices:
    """Prices and values of heads that differ as those of models do; in all a few tenths of a nat."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    worst = uniform(layers, heads, 1).pow(4)
    price = worst * uniform(layers, heads, margins + 2).sort(-1, descending=True).values / worst.sum() / 2
    value = 3 * uniform(layers, heads, 1) * uniform(*price.shape).sort(-1, descending=True).values * price[..., :1]
    opened = uniform(layers, heads, margins + 2).sort(-1).values
    price[..., -1], value[..., -1], opened[..., 0], opened[..., -1] = 0, 0, 0, 1
    grid = torch.cat([torch.tensor([-math.inf]), torch.arange(float(margins)), torch.tensor([math.inf])])
    nothing = torch.zeros(0, len(TRIED))
    found = Prices(grid, price, value, opened, torch.tensor(TRIED), nothing, nothing, GATED)
    factor = torch.exp(spread * torch.randn(documents, len(TRIED), generator=generator))
    kl = factor * torch.tensor([found.predicted(found.at(fraction)) for fraction in found.tried.tolist()])
    return replace(found, kl=kl, kl_open_fraction=torch.ones_like(kl))


@given(NATS, SEEDS, st.sampled_from([0, 1, 5, 16]))
def test_what_is_expected_is_at_most_the_target_and_one_step_less_open_would_not_do(nats, seed, documents) -> None:
    prices = random_prices(seed, documents=documents)
    chosen = prices.rungs(KLTarget(nats=nats))
    assert prices.expected(chosen) <= nats
    if not documents:
        assert prices.predicted(chosen) <= nats
    step = round(200 * prices._expected(nats))
    assert torch.equal(chosen, prices.at(step / 200))
    if step > 0:
        assert prices.expected(prices.at((step - 1) / 200)) > nats


@settings(max_examples=settings().max_examples // 2)
@given(NATS, st.floats(1.0, 10.0), SEEDS, st.sampled_from([0, 3, 16]))
def test_more_nats_never_ask_for_more_open_pairs(nats, factor, seed, documents) -> None:
    prices = random_prices(seed, documents=documents)
    assert prices._expected(nats * factor) <= prices._expected(nats)
    if documents == 16 and nats >= prices.bounds()[0]:
        assert prices._promised(nats * factor) <= prices._promised(nats)
    # Where heads cost the same however much is closed, none opens.
    same = replace(prices, value=prices.price)
    low, high = (same.rungs(KLTarget(nats=x)) for x in (nats, nats * factor))
    assert (high <= low).all()
    assert same.opened(high) <= same.opened(low)


@given(st.floats(KL_BOUND / 16, 0.0999), SEEDS)
def test_the_promise_is_kept_by_the_bound_and_never_dearer_than_what_was_tried(nats, seed) -> None:
    prices, target = random_prices(seed, documents=16, spread=0.3), KLTarget(nats=nats, promised=True)
    worst = [[min(max(row[: at + 1]), KL_BOUND) for at in range(len(TRIED))] for row in prices.kl.double().tolist()]
    bounds = (torch.tensor(worst, dtype=torch.float64).sum(0) + KL_BOUND) / 17
    torch.testing.assert_close(prices.bounds(), bounds)
    kept = [at for at in range(len(TRIED)) if (bounds[: at + 1] <= nats * (1 + 1e-9)).all()]
    if kept:
        assert torch.equal(prices.rungs(target), prices.at(float(prices.tried[kept[-1]])))
        return
    with pytest.raises(CalibrationError, match="is not kept by any thresholds that were tried") as caught:
        prices.rungs(target)
    # What the error offers is a promise that is kept.
    offered = float(str(caught.value).split("promised for ")[1].split(" nats")[0])
    assert prices.bounds()[0] <= offered <= prices.bounds()[0] * 1.1
    if offered < KL_BOUND:
        assert prices.opened(prices.rungs(KLTarget(nats=offered, promised=True))) < 1


def test_a_document_counts_as_the_worst_of_what_is_safer_and_for_no_more_than_the_bound() -> None:
    prices = replace(random_prices(), kl=torch.tensor([[0.0, 0.02, 0.01, 0.01, 3.0, 0.0], [-1e-5, 0.0, 0, 0, 0.05, 0]]))
    want = torch.tensor([0.0, 0.02, 0.02, 0.02, KL_BOUND + 0.05, KL_BOUND + 0.05], dtype=torch.float64)
    torch.testing.assert_close(prices.bounds(), (want + KL_BOUND) / 3)
    chosen = prices.rungs(KLTarget(nats=0.045, promised=True))
    assert torch.equal(chosen, prices.at(float(prices.tried[3])))


def test_documents_that_a_promise_needs() -> None:
    assert [documents_needed(nats) for nats in (0.1, 0.05, 0.02, 0.01, 1 / 170, 1.0)] == [1, 1, 4, 9, 16, 1]
    prices = random_prices(documents=9)
    exact = replace(prices, kl=torch.zeros_like(prices.kl))
    assert torch.equal(exact.rungs(KLTarget(nats=0.01, promised=True)), exact.at(float(exact.tried[-1])))
    with pytest.raises(CalibrationError, match="needs 10 held-out documents; the calibration has 9"):
        prices.rungs(KLTarget(nats=0.0095, promised=True))
    with pytest.raises(CalibrationError, match="the calibration has 0"):
        random_prices().rungs(KLTarget(nats=0.09, promised=True))
    with pytest.raises(ValidationError, match="promise nothing"):
        KLTarget(nats=KL_BOUND, promised=True)


def test_a_target_that_nothing_reaches_opens_everything_and_one_that_all_reach_closes_it() -> None:
    prices = random_prices()
    assert prices.predicted(prices.rungs(KLTarget(nats=1e-12))) == 0
    assert prices.opened(prices.rungs(KLTarget(nats=1e-12))) == 1
    assert not prices.rungs(KLTarget(nats=10)).any()


def test_heads_that_cost_nothing_close() -> None:
    prices = random_prices()
    price, value = prices.price.clone(), prices.value.clone()
    price[0, 1], value[0, 1] = 0, 0
    assert replace(prices, price=price, value=value).rungs(KLTarget(nats=1e-3))[0, 1] == 0
    free = torch.zeros_like(price)
    assert not replace(prices, price=free, value=free).rungs(KLTarget(nats=1e-3)).any()


@given(st.floats(0.0, 0.99), SEEDS)
def test_the_more_is_closed_the_more_values_count_and_from_the_gated_model_on_they_alone(fraction, seed) -> None:
    prices = random_prices(seed)
    share = min((1 - fraction) / (1 - GATED), 1.0)
    mixed = ((1 - share) * prices.price.double() + share * prices.value.double()).float()
    by_hand = replace(prices, price=mixed, value=mixed).at(fraction)
    # But for what rounding to single precision makes of equals.
    cost = [float(mixed.double().gather(-1, of[..., None]).sum()) for of in (prices.at(fraction), by_hand)]
    assert cost[0] == pytest.approx(cost[1], rel=1e-5, abs=1e-9)
    assert prices.opened(prices.at(fraction)) == pytest.approx(prices.opened(by_hand), rel=1e-5, abs=1e-9)
    other = replace(prices, price=prices.price.flip(1))
    if fraction <= GATED:
        assert torch.equal(other.at(fraction), prices.at(fraction))


def one_head(tried=(0.75, 0.25), kl=(), gated=GATED) -> Prices:
    """One head that has a rung at every quarter, worth twice its price; `kl` are multiples of what is predicted."""
    opened = torch.arange(5) / 4
    price = 0.1 * (1 - opened).square()
    grid = torch.tensor([-math.inf, 0, 1, 2, math.inf])
    curves = (price[None, None], 2 * price[None, None], opened[None, None])
    nothing = torch.zeros(0, len(tried))
    prices = Prices(grid, *curves, torch.tensor(tried), nothing, nothing, gated)
    if not kl:
        return prices
    found = torch.tensor([[prices.predicted(prices.at(at)) for at in tried]]) * torch.tensor(kl)
    return replace(prices, kl=found, kl_open_fraction=torch.ones_like(found))


def test_what_is_predicted_lies_between_prices_and_values() -> None:
    # From dense to half closed, values count from not at all to two thirds: a third on average.
    prices = one_head(gated=0.25)
    for rung, mean in enumerate((1 / 2, 1 / 2, 1 / 3, 1 / 6, 0)):
        price = 0.1 * (1 - rung / 4) ** 2
        assert prices.predicted(torch.tensor([[rung]])) == pytest.approx((1 + mean) * price)


def test_the_factor_goes_between_what_was_measured_and_stays_at_the_ends() -> None:
    prices = one_head(kl=(1.0, 2.0))
    assert prices.factor(0.75) == prices.factor(1.0) == pytest.approx(1)
    assert prices.factor(0.25) == prices.factor(0.0) == pytest.approx(2)
    assert prices.factor(0.5) == pytest.approx(math.sqrt(2))
    assert prices.factor(0.375) == pytest.approx(2**0.75)
    half = torch.tensor([[2]])
    assert prices.expected(half) == pytest.approx(math.sqrt(2) * prices.predicted(half))
    # Where two settings came to the same thresholds, and so to the same KL.
    twice = one_head(tried=(0.75, 0.3, 0.25), kl=(1.0, 2.0, 2.0))
    for opened in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0):
        assert twice.factor(opened) == pytest.approx(prices.factor(opened))


def test_what_was_measured_as_nothing_says_nothing_about_the_factor() -> None:
    assert one_head().factor(0.5) == 1
    assert one_head(kl=(0.0, -1e-6)).factor(0.5) == 1
    assert one_head(tried=(1.0, 0.25), kl=(1.0, 1.5)).factor(1.0) == pytest.approx(1.5), "all open predicts nothing"
    assert one_head(kl=(-1e-9, 1.5)).factor(0.9) == pytest.approx(1.5)


def test_means_of_documents_are_compared_with_what_was_predicted() -> None:
    prices = random_prices(documents=5)
    want = [prices.predicted(prices.rungs(OpenFractionTarget(fraction=at))) for at in prices.tried.tolist()]
    predicted, measured = zip(*prices.measured(), strict=True)
    assert list(predicted) == want
    assert list(measured) == pytest.approx(prices.kl.mean(0).tolist())
    assert random_prices().measured() == []


@given(st.floats(0.01, 0.99), SEEDS)
def test_a_budget_by_price_is_kept_and_spent_where_it_gains_most(fraction, seed) -> None:
    prices = random_prices(seed, layers=1, heads=3, margins=4)
    chosen = prices.rungs(OpenFractionTarget(fraction=fraction))
    assert prices.opened(chosen) <= fraction + 1e-6
    share = min((1 - fraction) / (1 - GATED), 1.0)
    curve = (1 - share) * prices.price.double() + share * prices.value.double()

    def cost(rungs: torch.Tensor) -> float:
        return float(curve.gather(-1, rungs[..., None]).sum())

    # Nothing that opens no more costs less.
    for rungs in itertools.product(range(6), repeat=3):
        other = torch.tensor([rungs])
        if prices.opened(other) <= prices.opened(chosen):
            assert cost(other) >= cost(chosen) - 1e-6
    # What any one rate of nats for open pairs leaves open within the budget is no more.
    for rate in (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0):
        if (opened := prices.opened(at_price(curve, prices.open_fraction, rate))) <= fraction:
            assert opened <= prices.opened(chosen) + 1e-6


def test_targets_are_checked_and_go_through_json() -> None:
    for nats in (0.0, -1.0, 11.0, math.nan, math.inf):
        with pytest.raises(ValidationError):
            KLTarget(nats=nats)
    for promised in (False, True):
        policy = Policy(gate=MomentGate(threshold=KLTarget(nats=0.02, promised=promised)))
        assert Policy.model_validate_json(policy.model_dump_json()) == policy
        assert policy.gate.needs_calibration
        assert policy.gate.margin == 0


def test_a_calibration_takes_prices_where_it_has_them() -> None:
    priced, plain = made_up_calibration(prices=16), made_up_calibration()
    kl, budget, risk = KLTarget(nats=0.02), OpenFractionTarget(fraction=0.3), RiskTarget(alpha=0.1)
    with pytest.raises(CalibrationError, match="measured without prices") as caught:
        plain.thresholds(kl)
    assert "prices=True" in caught.value.fix
    with pytest.raises(CalibrationError, match="with the estimate 'lognormal', not 'saturating'") as caught:
        priced.thresholds(kl, estimate="saturating")
    assert caught.value.fix == "use MomentGate(estimate='lognormal')"
    assert torch.equal(priced.thresholds(risk), priced.findings.by_mass(risk))
    assert not torch.equal(priced.thresholds(budget), priced.findings.by_mass(budget))
    # With another estimate a budget goes by the missed mass.
    other = priced._found("saturating")
    assert other.offsets(budget)[1] is None
    assert torch.equal(other.thresholds(budget), other.by_mass(budget))
    margins, probe = priced.findings.offsets(kl)
    rungs, scale = priced.findings.priced().rungs(kl), priced.tensors["probe_scale"]
    assert torch.equal(priced.thresholds(kl), priced.findings.priced().margins[rungs] * scale)
    assert torch.equal(margins, priced.thresholds(kl) + priced.tensors["probe_offset"])
    assert torch.equal(probe, priced.tensors["probe"].float())
    assert priced.findings.expected_kl(kl) <= 0.02
    assert priced.findings.expected_kl(kl, [0]) < priced.findings.expected_kl(kl)
    assert priced.findings.expected_kl(kl, []) == 0
    assert priced.findings.expected_kl(risk) is None
    assert len(priced.findings.kl_table()) == 5
    assert plain.findings.kl_table() == []


def test_heads_are_ranked_by_what_they_are_worth_in_a_gated_model() -> None:
    made_up = made_up_calibration(prices=4)
    value = made_up.tensors["value"] * torch.rand(2, 4, 1, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(made_up.manifest, made_up.policy, made_up.tensors | {"value": value})
    by_hand = sorted(
        ((layer, head) for layer in range(2) for head in range(4)),
        key=lambda at: -float(value[at][0]),
    )
    assert calibration.heads_by_price() == by_hand != made_up.heads_by_price()
    gate = StaticGate.from_calibration(calibration, heads=3, by="price")
    assert set(gate.open_heads) == set(by_hand[:3])
    with pytest.raises(CalibrationError, match="without prices"):
        StaticGate.from_calibration(made_up_calibration(), heads=3, by="price")


def test_a_file_is_read_with_the_same_policies(tmp_path: Path) -> None:
    calibration = made_up_calibration(prices=16)
    calibration.save_pretrained(tmp_path, card=False)
    again = Calibration.from_pretrained(tmp_path)
    for target in (KLTarget(nats=0.02), KLTarget(nats=0.02, promised=True), OpenFractionTarget(fraction=0.3)):
        for one, other in zip(calibration.findings.offsets(target), again.findings.offsets(target), strict=True):
            assert torch.equal(one, other)
