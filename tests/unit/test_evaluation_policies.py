"""Tests of short names that ask a calibration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from patchattn.calibration import Calibration
from patchattn.errors import CalibrationError, CalibrationMismatchError, PolicyError
from patchattn.evaluation import named_policy
from patchattn.gates import MomentGate, StaticGate
from patchattn.gates.thresholds import KLTarget, OpenFractionTarget
from patchattn.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration, made_up_manifest, made_up_tensors

BASE = Policy(sink_size=4, window_size=32, min_bulk=0)


@pytest.fixture(scope="module")
def priced() -> Calibration:
    return made_up_calibration(estimates=("saturating", "lognormal"), prices=True)


def test_targets_by_name_take_the_estimate_that_has_prices(priced: Calibration) -> None:
    assert priced.policy.gate.estimate == "saturating"
    for name, target in (("kl:0.05", KLTarget(nats=0.05)), ("budget:0.3", OpenFractionTarget(fraction=0.3))):
        found = named_policy(name, BASE, calibration=priced)
        assert found == BASE.model_copy(update={"gate": MomentGate(threshold=target, estimate="lognormal")})
        assert priced.expected_kl(found) is not None


def test_a_budget_needs_no_prices() -> None:
    manifest = made_up_manifest(moments="calibration", estimates=("saturating",))
    calibration = Calibration(manifest, BASE, made_up_tensors(manifest))
    gate = named_policy("budget:0.3", BASE, calibration=calibration).gate
    target = OpenFractionTarget(fraction=0.3)
    assert gate == MomentGate(threshold=target, estimate="saturating", moments="calibration")


def test_static_heads_by_price(priced: Calibration) -> None:
    ranked = priced.heads_by_price()
    assert ranked != priced.heads_by_oracle()
    for name, count in (("static-price:0.5", 4), ("static-price", 2)):
        found = named_policy(name, BASE, calibration=priced)
        assert found == BASE.model_copy(update={"gate": StaticGate(open_heads=tuple(ranked[:count]))})


@pytest.mark.parametrize("name", ["kl", "budget", "kl:0", "kl:1.5", "budget:30%", "kl:much", "static-price:2"])
def test_numbers_that_are_none_are_refused(name: str, priced: Calibration) -> None:
    with pytest.raises(PolicyError, match="no number") as caught:
        named_policy(name, BASE, calibration=priced)
    assert (f"{name.split(':')[0]}:0.01" if "static" not in name else "0.8") in caught.value.fix


@pytest.mark.parametrize("name", ["kl:0.01", "budget:0.3", "static-price"])
def test_what_a_calibration_gives_needs_one(name: str) -> None:
    with pytest.raises(PolicyError, match=f"{name.split(':')[0]} needs a calibration"):
        named_policy(name, BASE)


def test_what_the_calibration_cannot_give_is_refused_at_once(priced: Calibration) -> None:
    for name in ("kl:0.01", "static-price"):
        with pytest.raises(CalibrationError, match="measured without prices"):
            named_policy(name, BASE, calibration=made_up_calibration())
    with pytest.raises(CalibrationMismatchError, match="measured sink 4 and window 32"):
        named_policy("kl:0.01", Policy(window_size=64), calibration=priced)
    with pytest.raises(PolicyError, match=r"no policy 'calibrated:0\.3'"):
        named_policy("calibrated:0.3", BASE, calibration=priced)
