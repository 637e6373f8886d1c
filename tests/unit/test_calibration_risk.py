"""Tests of `patchattn.calibration.risk`: the promise, the budget, and what they cost."""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchattn.calibration.risk import Curves, documents_needed, rungs
from patchattn.errors import CalibrationError
from patchattn.gates import MomentGate, StaticGate
from patchattn.gates.thresholds import OpenFractionTarget, RiskTarget
from patchattn.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

ALPHAS = st.floats(0.03, 0.6)


def random_curves(*, layers=1, heads=3, margins=4, documents=(40, 40), seed=0) -> Curves:
    generator = torch.Generator().manual_seed(seed)
    worst = torch.rand(layers, heads, 1, generator=generator)
    missed = worst * torch.rand(2, layers, heads, margins + 2, generator=generator).sort(-1, descending=True).values
    opened = torch.rand(layers, heads, margins + 2, generator=generator).sort(-1).values
    missed[..., -1], opened[..., 0], opened[..., -1] = 0, 0, 1
    grid = torch.cat([torch.tensor([-math.inf]), torch.arange(float(margins)), torch.tensor([math.inf])])
    return Curves(grid, missed, opened, documents)


def mean_at(curve: torch.Tensor, chosen: torch.Tensor) -> float:
    return float(curve.double().gather(-1, chosen[..., None]).mean())


@given(ALPHAS, st.integers(0, 10_000))
def test_a_risk_per_head_takes_the_lowest_rung_that_keeps_the_bound(alpha, seed) -> None:
    curves = random_curves(seed=seed)
    chosen = rungs(curves, RiskTarget(alpha=alpha))
    missed = curves.missed_mass.mean(0)
    for head, rung in enumerate(chosen[0].tolist()):
        bounds = (80 * missed[0, head].double() + 1) / 81
        assert bounds[rung] <= alpha + 1e-9
        assert rung == 0 or bounds[rung - 1] > alpha - 1e-9


@given(st.sampled_from(["head", "model"]), ALPHAS, st.floats(1.0, 2.0), st.integers(0, 10_000))
def test_a_higher_risk_never_opens_more(scope, alpha, factor, seed) -> None:
    curves = random_curves(seed=seed)
    low, high = (rungs(curves, RiskTarget(alpha=a, scope=scope)) for a in (alpha, min(alpha * factor, 0.99)))
    assert (high <= low).all()


@given(ALPHAS, st.integers(0, 10_000))
def test_a_shared_risk_keeps_its_bound_on_the_documents_that_carry_it(alpha, seed) -> None:
    curves = random_curves(seed=seed, heads=5)
    chosen = rungs(curves, RiskTarget(alpha=alpha, scope="model"))
    assert (40 * mean_at(curves.missed_mass[0], chosen) + 1) / 41 <= alpha + 1e-9


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_documents_that_carry_a_shared_risk_do_not_decide_how_it_is_shared(seed, other) -> None:
    curves, same_order = random_curves(seed=seed, heads=5), random_curves(seed=seed, heads=5)
    same_order.missed_mass[0] = random_curves(seed=other, heads=5).missed_mass[0]
    chosen = [
        rungs(given, RiskTarget(alpha=alpha, scope="model"))
        for given in (curves, same_order)
        for alpha in (0.05, 0.1, 0.2, 0.3)
    ]
    # All allocations lie on one path, on which every head opens further or stays.
    for one, another in itertools.combinations(chosen, 2):
        assert (one <= another).all() or (one >= another).all()


def test_a_shared_risk_opens_everything_where_the_halves_disagree() -> None:
    curves = random_curves()
    curves.missed_mass[1] = 0
    curves.missed_mass[0, ..., :-1] = 0.9
    chosen = rungs(curves, RiskTarget(alpha=0.1, scope="model"))
    assert (chosen == 5).all()


@given(st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_a_budget_is_kept_and_spent_about_as_well_as_can_be(fraction, seed) -> None:
    curves = random_curves(seed=seed, heads=3, margins=3)
    chosen = rungs(curves, OpenFractionTarget(fraction=fraction))
    opened, missed = curves.open_fraction, curves.missed_mass_of_all
    assert mean_at(opened, chosen) <= fraction + 1e-9
    every = [torch.tensor([list(c)]) for c in itertools.product(range(5), repeat=3)]
    best = min(mean_at(missed, c) for c in every if mean_at(opened, c) <= fraction)
    # The price finds the best allocation but for one head's step.
    step = float((missed[..., :-1] - missed[..., 1:]).max()) / 3
    assert best <= mean_at(missed, chosen) + 1e-9
    assert mean_at(missed, chosen) <= best + step + 1e-9


def test_one_budget_beats_the_same_fraction_for_each_head() -> None:
    curves = random_curves(layers=4, heads=8, margins=30, seed=3)
    chosen = rungs(curves, OpenFractionTarget(fraction=0.2))
    same = (curves.open_fraction <= 0.2).sum(-1) - 1
    missed = curves.missed_mass_of_all
    assert mean_at(curves.open_fraction, chosen) > 0.18
    assert mean_at(missed, chosen) < 0.8 * mean_at(missed, same)


@pytest.mark.parametrize(("alpha", "scope", "needed"), [(0.02, "head", 49), (0.005, "head", 199), (0.02, "model", 98)])
def test_too_few_documents_say_how_many_are_needed(alpha, scope, needed) -> None:
    target = RiskTarget(alpha=alpha, scope=scope)
    assert documents_needed(target) == needed
    enough = (needed, 0) if scope == "head" else (needed // 2, needed // 2)
    rungs(random_curves(documents=enough), target)
    fewer = (enough[0] - 1, enough[1])
    with pytest.raises(CalibrationError, match=f"needs {needed} documents; the calibration has {sum(fewer)}"):
        rungs(random_curves(documents=fewer), target)


@given(st.integers(0, 1000))
def test_the_promise_holds_for_documents_that_were_not_measured(seed) -> None:
    # Losses of single documents, in [0, 1], heavy tailed: a few documents miss nearly everything.
    generator = torch.Generator().manual_seed(seed)
    worst = torch.rand(600, 1, generator=generator) ** 8
    losses = worst * torch.rand(600, 12, generator=generator).sort(-1, descending=True).values
    losses[:, -1] = 0
    held_out = []
    for split in range(40):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(split))
        measured, rest = losses[order[:60]], losses[order[60:]]
        halves = torch.stack([measured[::2].mean(0), measured[1::2].mean(0)])[:, None, None]
        opened = torch.linspace(0, 1, 12)[None, None]
        curves = Curves(torch.linspace(-1, 1, 12), halves, opened, (30, 30))
        held_out.append(rest[:, int(rungs(curves, RiskTarget(alpha=0.06)))].mean())
    assert float(torch.stack(held_out).mean()) <= 0.06


def test_thresholds_of_a_calibration_are_margins_per_layer_and_head() -> None:
    calibration = made_up_calibration()
    margins = calibration.thresholds(RiskTarget(alpha=0.2))
    assert margins.shape == (2, 4)
    assert set(margins.flatten().tolist()) <= {-math.inf, math.inf, *calibration.tensors["margins"].tolist()}
    expected = calibration.expected(margins)
    assert (expected.missed_mass <= 0.2).all()
    assert (expected.open_fraction[margins == math.inf] == 1).all()
    assert (expected.open_fraction[margins == -math.inf] == 0).all()


def test_estimates_that_were_not_measured_are_refused() -> None:
    with pytest.raises(CalibrationError, match="'guarded' was not measured"):
        made_up_calibration().thresholds(RiskTarget(alpha=0.2), estimate="guarded")


def test_static_gate_takes_the_heads_that_the_oracle_opens_most() -> None:
    calibration = made_up_calibration()
    ranked = calibration.heads_by_oracle()
    fractions = [float(calibration.tensors["oracle_open_fraction"][pair]) for pair in ranked]
    assert fractions == sorted(fractions, reverse=True)
    assert StaticGate.from_calibration(calibration, heads=3).open_heads == tuple(sorted(ranked[:3]))


def test_reading_a_file_and_choosing_thresholds_for_8b_parameters_is_fast(tmp_path: Path) -> None:
    from patchattn.calibration import Calibration

    shape = {"layers": 32, "query_heads": 32, "kv_heads": 8, "head_dim": 128}
    made_up_calibration(**shape).save_pretrained(tmp_path, card=False)
    seconds = []
    for _ in range(5):
        # Of processor time, so that a busy machine does not count.
        begin = time.process_time()
        Calibration.from_pretrained(tmp_path).thresholds(RiskTarget(alpha=0.05))
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.1


def test_targets_survive_json_and_refuse_nonsense() -> None:
    for threshold in (RiskTarget(alpha=0.01, scope="model"), OpenFractionTarget(fraction=0.2)):
        policy = Policy(gate=MomentGate(threshold=threshold))
        assert Policy.model_validate_json(policy.model_dump_json()) == policy
    for wrong in ({"alpha": 0}, {"kind": "risk"}, {"kind": "else"}, 1.0, "cheap"):
        with pytest.raises(ValueError, match="threshold"):
            MomentGate.model_validate({"threshold": wrong})
