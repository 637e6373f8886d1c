"""Tests of `patchattn.calibration.prices`: the cheapest thresholds for a KL, what is expected of them, the promise."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from patchattn import CalibrationError, KLTarget, MomentGate, OpenFractionTarget, Policy, RiskTarget, StaticGate
from patchattn.calibration import Calibration
from patchattn.calibration.prices import TRIED, Prices, documents_needed
from patchattn.gates.thresholds import KL_BOUND

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

NATS = st.floats(1e-4, 0.5)
SEEDS = st.integers(0, 10_000)


def random_prices(seed: int = 0, *, layers=2, heads=4, margins=6, documents=0, spread=1.0) -> Prices:
    """Prices of heads that differ as those of models do; in all a few tenths of a nat."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    worst = uniform(layers, heads, 1).pow(4)
    price = worst * uniform(layers, heads, margins + 2).sort(-1, descending=True).values / worst.sum() / 2
    opened = uniform(layers, heads, margins + 2).sort(-1).values
    price[..., -1], opened[..., 0], opened[..., -1] = 0, 0, 1
    grid = torch.cat([torch.tensor([-math.inf]), torch.arange(float(margins)), torch.tensor([math.inf])])
    nothing = torch.zeros(0, len(TRIED))
    value = price * (0.5 + 3 * uniform(layers, heads, 1))
    found = Prices(grid, price, value, opened, torch.tensor(TRIED), nothing, nothing, 0.2)
    factor = torch.exp(spread * torch.randn(documents, len(TRIED), generator=generator))
    kl = factor * torch.tensor([found.predicted(found.at(float(fraction))) for fraction in found.tried])
    return replace(found, kl=kl, kl_open_fraction=torch.ones_like(kl))


@given(NATS, st.floats(1.0, 10.0), SEEDS, st.sampled_from([0, 3, 16]))
def test_more_nats_never_open_more(nats, factor, seed, documents) -> None:
    prices = random_prices(seed, documents=documents)
    low, high = (prices.rungs(KLTarget(nats=x)) for x in (nats, nats * factor))
    assert prices.opened(high) <= prices.opened(low)


@given(NATS, SEEDS, st.sampled_from([1, 5, 16]))
def test_what_is_expected_is_at_most_the_target(nats, seed, documents) -> None:
    prices = random_prices(seed, documents=documents)
    chosen = prices.rungs(KLTarget(nats=nats))
    assert prices.expected(chosen) <= nats


@given(st.floats(KL_BOUND / 16, 0.2), SEEDS)
def test_the_promise_is_kept_by_the_bound(nats, seed) -> None:
    prices = random_prices(seed, documents=16, spread=0.3)
    chosen = prices.rungs(KLTarget(nats=nats, promised=True))
    # A document's KL does not fall as less is open.
    kl = prices.kl.double().clamp(max=KL_BOUND).cummax(-1).values
    bounds = (kl.sum(0) + KL_BOUND) / 17
    torch.testing.assert_close(prices.bounds(), bounds)
    kept = int((bounds <= nats * (1 + 1e-9)).sum())
    assert torch.equal(chosen, prices.at(float(prices.tried[kept - 1]) if kept else 1.0))


def test_documents_that_a_promise_needs() -> None:
    assert [documents_needed(nats) for nats in (0.1, 0.05, 0.02, 0.01, 1 / 170, 1.0)] == [1, 1, 4, 9, 16, 1]
    prices = random_prices(documents=9)
    prices.rungs(KLTarget(nats=0.01, promised=True))
    with pytest.raises(CalibrationError, match="needs 10 held-out documents; the calibration has 9") as caught:
        prices.rungs(KLTarget(nats=0.0095, promised=True))
    assert "at least 0.01 nats" in caught.value.fix
    with pytest.raises(CalibrationError, match="the calibration has 0"):
        random_prices().rungs(KLTarget(nats=0.1, promised=True))


def test_a_target_that_nothing_reaches_opens_everything_and_one_that_all_reach_closes_it() -> None:
    prices = random_prices()
    assert prices.predicted(prices.rungs(KLTarget(nats=1e-12))) == 0
    assert prices.opened(prices.rungs(KLTarget(nats=1e-12))) == 1
    assert not prices.rungs(KLTarget(nats=10)).any()


def test_heads_that_cost_nothing_close() -> None:
    prices = random_prices()
    price = prices.price.clone()
    price[0, 1] = 0
    assert replace(prices, price=price, value=price).rungs(KLTarget(nats=1e-3))[0, 1] == 0


def test_means_of_documents_are_compared_with_what_was_predicted() -> None:
    prices = random_prices(documents=5)
    for (predicted, measured), kl, fraction in zip(prices.measured(), prices.kl.mean(0).tolist(), TRIED, strict=True):
        assert measured == pytest.approx(kl)
        assert predicted == prices.predicted(prices.at(torch.tensor(fraction).item()))
    assert random_prices().measured() == []


@given(st.floats(0.01, 0.99), SEEDS)
def test_a_budget_by_price_is_kept(fraction, seed) -> None:
    prices = random_prices(seed)
    chosen = prices.rungs(OpenFractionTarget(fraction=fraction))
    assert prices.opened(chosen) <= fraction + 1e-6


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
    assert torch.equal(margins, priced.thresholds(kl) + priced.tensors["probe_offset"])
    assert torch.equal(probe, priced.tensors["probe"].float())
    assert priced.findings.expected_kl(kl) <= 0.02
    assert priced.findings.expected_kl(kl, [0]) < priced.findings.expected_kl(kl)
    assert priced.findings.expected_kl(kl, []) == 0
    assert priced.findings.expected_kl(risk) is None
    assert len(priced.findings.kl_table()) == 5
    assert plain.findings.kl_table() == []


def test_heads_are_ranked_by_price() -> None:
    calibration = made_up_calibration(prices=4)
    by_hand = sorted(
        ((layer, head) for layer in range(2) for head in range(4)),
        key=lambda at: -float(calibration.tensors["price"][at][0]),
    )
    assert calibration.heads_by_price() == by_hand
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
