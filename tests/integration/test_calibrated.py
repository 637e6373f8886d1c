"""`patch(model, calibration=...)`: thresholds per head and moments from a calibration decide as they should."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch

import patchattn
from patchattn import (
    CalibrationError,
    CalibrationMismatchError,
    CalibrationNotFoundError,
    MomentGate,
    OpenFractionTarget,
    OracleGate,
    Policy,
    PolicyError,
    RiskTarget,
    StaticGate,
)
from patchattn.backends.reference import attend
from patchattn.calibration import Calibration
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates import moment
from patchattn.gates.base import Known
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.moment import with_offsets
from patchattn.hf.architecture import cache_of, with_cache
from patchattn.moments.gaussian import KeyMoments
from patchattn.moments.text import RotaryMoments
from patchattn.testing import recorded_gates, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_measuring import Letters, texts

TARGET = RiskTarget(alpha=0.2)
POLICY = Policy(sink_size=4, window_size=32, gate=MomentGate(threshold=TARGET), min_bulk=0)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return patchattn.calibrate(tiny_model("llama"), Letters(), texts(), POLICY, lengths=(300,))


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.tensor([Letters()(text)["input_ids"][:300] for text in texts()[:rows]])


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs)


def with_gate(gate, **fields) -> Policy:
    return POLICY.model_copy(update={"gate": gate} | fields)


def test_the_calibration_brings_its_own_policy_and_hits_its_open_fraction(calibration, tmp_path: Path) -> None:
    calibration.save_pretrained(tmp_path, card=False)
    model = tiny_model("llama")
    with patchattn.patch(model, calibration=str(tmp_path)) as handle:
        for text in texts():
            run(model, torch.tensor([Letters()(text)["input_ids"][:300]]), use_cache=False)
    assert handle.policy.gate == MomentGate(threshold=TARGET)
    want = calibration.expected(calibration.thresholds(TARGET)).open_fraction
    got = torch.tensor(list(handle.report().head_open_fractions("prefill").values()))
    # The first layer sees dense activations; above it they differ a little.
    torch.testing.assert_close(got[0], want[0], atol=1e-3, rtol=0)
    assert 0.05 < float(want.mean()) < 0.95
    torch.testing.assert_close(got, want, atol=0.15, rtol=0)
    assert not any(handle.report().dense_calls.values())


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("target", [TARGET, RiskTarget(alpha=0.3, scope="model"), OpenFractionTarget(fraction=0.4)])
def test_each_head_closes_from_its_own_margin(calibration, backend, target) -> None:
    """With one head's margin for all heads, that head decides as it does with the margins of all."""
    model = tiny_model("llama").double()
    model.config.dtype = torch.float32
    margins = calibration.thresholds(target)
    policy = with_gate(MomentGate(threshold=target))
    fits = Calibration(
        calibration.manifest.model_copy(
            update={"fingerprint": calibration.manifest.fingerprint.model_copy(update={"dtype": "float64"})}
        ),
        calibration.policy,
        calibration.tensors,
    )
    with patchattn.patch(model, policy, calibration=fits, backend=backend, record="timeline") as handle:
        run(model, tokens(), use_cache=False)
    gates = recorded_gates(handle)[0][0]
    finite = 0
    for head, margin in enumerate(margins[0].tolist()):
        if abs(margin) == float("inf"):
            assert gates[:, head, 36:].all() if margin > 0 else not gates[:, head].any()
            continue
        finite += 1
        alone = with_gate(MomentGate(threshold=torch.tensor(margin).double().sigmoid().item()))
        with patchattn.patch(model, alone, backend=backend, record="timeline") as handle:
            run(model, tokens(), use_cache=False)
        assert torch.equal(recorded_gates(handle)[0][0][:, head], gates[:, head])
    assert finite


def test_prefill_and_decode_take_the_same_decisions(calibration) -> None:
    for gate in (MomentGate(threshold=TARGET), MomentGate(threshold=0.5, moments="calibration")):
        model = tiny_model("llama")
        with patchattn.patch(model, with_gate(gate), calibration=calibration, record="timeline") as handle:
            run(model, tokens(), use_cache=False)
            whole = recorded_gates(handle)
            handle.reset_report()
            cache = cache_of(run(model, tokens()[:, :290]))
            for at in range(290, 300):
                run(model, tokens()[:, at : at + 1], **with_cache(model, cache))
            pieces = recorded_gates(handle)
        for layer, calls in whole.items():
            assert torch.equal(torch.cat(pieces[layer], dim=2), calls[0])
            assert calls[0].any()
            assert not calls[0][:, :, 36:].all()


def left_padded(ids: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows: a text behind padding, and one without."""
    filler = tokens(1)[:, :pad]
    padded = torch.cat([torch.zeros_like(filler), ids], dim=1)
    mask = torch.ones(2, padded.shape[1], dtype=torch.long)
    mask[0, :pad] = 0
    return torch.cat([padded, torch.cat([filler, ids], dim=1)]), mask


POSITIONS = {
    "counted from the first slot": lambda mask: None,
    "counted from the first real token": lambda mask: (mask.cumsum(1) - 1).clamp(min=0),
    "counted from further on": lambda mask: torch.arange(mask.shape[1])[None] + 1000,
}


@pytest.mark.parametrize("numbered", list(POSITIONS))
def test_estimates_of_a_padded_row_are_those_of_the_row_alone(calibration, numbered, monkeypatch) -> None:
    """The rotary embedding is relative: from where positions count changes no score, so it may change no estimate."""
    model, ids, pad = tiny_model("llama").double(), tokens(1), 50
    model.config.dtype = torch.float32
    calibration = changed(calibration, dtype="float64")
    policy = with_gate(MomentGate(threshold=0.5, moments="calibration", estimate="saturating"))
    found: list[torch.Tensor] = []

    def keep(*arguments, **fields):
        found.append(from_text(*arguments, **fields))
        return found[-1]

    from_text = moment.bulk_log_mass_from_text
    monkeypatch.setattr("patchattn.gates.moment.bulk_log_mass_from_text", keep)

    def estimates(ids: torch.Tensor, split: int | None = None, **call) -> list[torch.Tensor]:
        found.clear()
        positions = call.pop("position_ids", None)
        mask = call.get("attention_mask")
        cache, step = None, ids.shape[1] if split is None else split
        with patchattn.patch(model, policy, calibration=calibration):
            for begin, end in ((0, step), *((at, at + 1) for at in range(step, ids.shape[1]))):
                if mask is not None:
                    call["attention_mask"] = mask[:, :end]
                if positions is not None:
                    call["position_ids"] = positions[:, begin:end]
                cache = cache_of(run(model, ids[:, begin:end], **with_cache(model, cache), **call))
        layers = 3
        return [torch.cat(found[layer::layers], dim=2) for layer in range(layers)]

    alone = estimates(ids)
    padded, mask = left_padded(ids, pad)
    for split in (None, 340):
        together = estimates(padded, split, attention_mask=mask, position_ids=POSITIONS[numbered](mask))
        for want, got in zip(alone, together, strict=True):
            assert want[0, :, 36:].isfinite().all()
            torch.testing.assert_close(got[0, :, pad:], want[0], rtol=1e-4, atol=1e-4)


def test_positions_that_do_not_count_on_open_the_gate(calibration) -> None:
    """Where positions jump, or are not known behind padding, turned moments would be a guess."""
    model, ids = tiny_model("llama"), tokens(1)
    positions = torch.arange(300)[None].clone()
    positions[:, 200:] += 7
    policy = with_gate(MomentGate(threshold=0.01, moments="calibration", estimate="saturating"))
    with patchattn.patch(model, policy, calibration=calibration, record="timeline") as handle:
        run(model, ids, use_cache=False)
        plain = recorded_gates(handle)[0][0]
        handle.reset_report()
        run(model, ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
        jumped = recorded_gates(handle)[0][0]
    assert not plain[:, :, 200:].all()
    assert torch.equal(jumped[:, :, :200], plain[:, :, :200])
    assert jumped[:, :, 200:].all()

    inputs = make_inputs()
    valid = torch.ones(2, 400)
    valid[1, :20] = 0
    regions = Regions.of(valid, query_length=400, sink_size=4, window_size=32)
    twice = (part.expand(2, -1, -1, -1) for part in (inputs.query, inputs.key, inputs.value))
    inputs = AttentionInputs(*twice, regions, 0.4)
    moments = RotaryMoments(torch.zeros(2, 8).double(), torch.eye(8).double().expand(2, 8, 8), torch.ones(4).double())
    mass, _ = policy.gate.weigh(inputs, Known(measured=MeasuredHeads(moments=moments)))
    opened = attend(inputs, mass, policy.gate.margin).open
    assert not opened[0].any()
    assert opened[1, :, 56:].all()
    assert not opened[1, :, :56].any()


def test_margins_survive_casts_copies_pickles_and_resets(calibration) -> None:
    model = tiny_model("llama")
    with patchattn.patch(model, calibration=calibration, record="timeline") as handle:
        run(model, tokens(), use_cache=False)
        want = recorded_gates(handle)
        handle.reset_report()
        run(model, tokens(), use_cache=False)
        assert all(torch.equal(recorded_gates(handle)[layer][0], want[layer][0]) for layer in want)
        state = model.model.layers[0].self_attn._modules["patchattn_layer"]
        margins = state.measured.margins.clone()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16()):
            kept = twin.model.layers[0].self_attn._modules["patchattn_layer"].measured.margins
            assert torch.equal(kept, margins)
        assert not [name for name in model.state_dict() if "patchattn" in name]
    assert torch.equal(margins, calibration.thresholds(TARGET)[0])


def make_inputs(length=400) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    regions = Regions.of(torch.ones(1, length), query_length=length, sink_size=4, window_size=32)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    return AttentionInputs(query, key, value, regions, 0.4)


def test_moments_of_a_calibration_are_turned_to_the_chunk_of_the_query() -> None:
    inputs = make_inputs()
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.2, 0.04, 0.0], dtype=torch.float64)
    moments = RotaryMoments(torch.randn(2, 8, generator=generator).double(), root @ root.mT, frequencies)
    policy = with_gate(MomentGate(threshold=0.5, moments="calibration"))
    mass, state = policy.gate.weigh(inputs, Known(measured=MeasuredHeads(moments=moments)))
    assert state is None
    n_bulk = inputs.regions.n_bulk[0]
    assert (mass[0, :, n_bulk == 0] == -torch.inf).all()
    for row, middle in ((36, 64), (36 + 126, 64), (36 + 127, 192), (399, 320)):
        turned = moments.over_slots(4, torch.tensor(middle))
        for head in range(4):
            kv_head = slice(head // 2, head // 2 + 1)
            one = KeyMoments(turned.count[kv_head], turned.mean[kv_head], turned.covariance[kv_head])
            want = one.log_mass(inputs.query[0, head, row][None, None], n_bulk[row], scale=0.4)
            torch.testing.assert_close(mass[0, head, row], want[0, 0])
    missing, _ = policy.gate.weigh(inputs, Known())
    assert attend(inputs, missing, policy.gate.margin).open[:, :, 36:].all()


def test_a_margin_of_minus_infinity_closes_and_of_plus_infinity_opens() -> None:
    mass = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.0]).expand(1, 3, 4)
    margins = torch.tensor([-torch.inf, torch.inf, 1.0])
    folded = with_offsets(mass, margins[:, None])[0]
    local = torch.zeros(4)
    closes = local - folded >= 0
    assert closes.tolist() == [[True] * 4, [False] * 4, [False, True, False, False]]


def test_slices_of_heads_for_tensor_parallel_ranks() -> None:
    moments = RotaryMoments(torch.randn(2, 8), torch.randn(2, 8, 8), torch.randn(4), torch.arange(8).flip(0))
    measured = MeasuredHeads(torch.arange(8.0), moments)
    part = measured.of_heads(slice(4, 8), slice(1, 2))
    assert part.margins.tolist() == [4, 5, 6, 7]
    assert torch.equal(part.moments.mean, moments.mean[1:])
    again = MeasuredHeads.of_bits(part.bits())
    assert again.margins.tolist() == [4, 5, 6, 7]
    assert torch.equal(again.moments.covariance, moments.covariance[1:])
    assert torch.equal(again.moments.order, moments.order)


def changed(calibration: Calibration, **fields) -> Calibration:
    fingerprint = calibration.manifest.fingerprint.model_copy(update=fields)
    return Calibration(
        calibration.manifest.model_copy(update={"fingerprint": fingerprint}), calibration.policy, calibration.tensors
    )


@pytest.mark.parametrize(("field", "value"), [("layers", 4), ("rope", '{"rope_theta": 1.0}'), ("dtype", "bfloat16")])
def test_another_model_is_refused_and_named(calibration, field, value) -> None:
    model = tiny_model("llama")
    with pytest.raises(CalibrationMismatchError, match=f"{field}: {value}".replace("{", r"\{")):
        patchattn.patch(model, calibration=changed(calibration, **{field: value}))
    assert not patchattn.is_patched(model)


def test_models_with_other_heads_are_refused(calibration) -> None:
    for family in ("gpt_oss", "deepseek_v3"):
        with pytest.raises(CalibrationMismatchError, match="differs from this model"):
            patchattn.patch(tiny_model(family), calibration=calibration)


def test_policies_the_calibration_cannot_carry_are_refused(calibration) -> None:
    model = tiny_model("llama")
    wrong = {
        "needs a calibration": (POLICY, None, PolicyError),
        'moments="calibration"': (with_gate(MomentGate(moments="calibration")), None, PolicyError),
        "window 32; the policy has sink 4 and window 64": (
            POLICY.model_copy(update={"window_size": 64}),
            calibration,
            CalibrationMismatchError,
        ),
        "needs 99 documents": (with_gate(MomentGate(threshold=RiskTarget(alpha=0.01))), calibration, CalibrationError),
        "no-such-folder": (None, "./no-such-folder", CalibrationNotFoundError),
    }
    for words, (policy, given, kind) in wrong.items():
        with pytest.raises(kind, match=words):
            patchattn.patch(model, policy, calibration=given)
        assert not patchattn.is_patched(model)


def test_a_layer_that_was_not_measured_is_refused() -> None:
    model = tiny_model("llama")
    some = patchattn.calibrate(
        model, Letters(), texts(2), POLICY.model_copy(update={"layers": (0, 2)}), lengths=(300,), key_moments=False
    )
    with pytest.raises(CalibrationError, match="Layer 1 was not measured"):
        patchattn.patch(model, with_gate(MomentGate(threshold=OpenFractionTarget(fraction=0.3))), calibration=some)
    with pytest.raises(CalibrationError, match="no key moments"):
        patchattn.patch(model, with_gate(MomentGate(moments="calibration"), layers=(0,)), calibration=some)


def test_gates_without_targets_work_beside_a_calibration(calibration) -> None:
    model = tiny_model("llama")
    static = StaticGate.from_calibration(calibration, heads=5)
    for gate in (OracleGate(), static, MomentGate(threshold=0.5)):
        with patchattn.patch(model, with_gate(gate), calibration=calibration) as handle:
            run(model, tokens(), use_cache=False)
        assert 0 < handle.report().open_fraction() < 1
    assert len(static.open_heads) == 5
