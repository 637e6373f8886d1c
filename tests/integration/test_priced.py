"""`patch` with a `KLTarget`: probes of the hidden state decide as they should, in every way a model is called."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn import CalibrationError, KLTarget, MomentGate, OpenFractionTarget, Policy, PolicyError, RiskTarget
from patchattn.backends import flex
from patchattn.calibration import Calibration
from patchattn.gates.measured import MeasuredHeads
from patchattn.hf.architecture import with_cache
from patchattn.hf.observe import observing
from patchattn.measuring.prices import given_to
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.testing import assert_within_budget, recorded_gates, replay_gates, tiny_model
from patchattn.testing.models import FAMILIES, HYBRID_FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_measuring import Letters, texts

POLICY = Policy(sink_size=4, window_size=32, min_bulk=0)


def measured(model, **fields) -> Calibration:
    fields = {"lengths": (300,), "prices": True, "key_moments": False} | fields
    return patchattn.calibrate(model, Letters(), texts(), POLICY, **fields)


@functools.cache
def llama() -> Calibration:
    return measured(tiny_model("llama"))


def aimed_at(calibration: Calibration, fraction: float = 0.3, **fields) -> Policy:
    """A policy for the KL that is expected where such a fraction of the pairs is open."""
    nats = calibration.findings.expected_kl(OpenFractionTarget(fraction=fraction))
    return POLICY.model_copy(update={"gate": MomentGate(threshold=KLTarget(nats=nats))} | fields)


def tokens(rows: int = 2, length: int = 300) -> torch.Tensor:
    return torch.tensor([Letters()(text)["input_ids"][:length] for text in texts()[:rows]])


@torch.no_grad()
def run(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs)


def by_hand(model, calibration, policy, ids):
    """Decisions of the patched model, found from its attention calls, its hidden states and the calibration alone."""
    margins, wanted, hidden = calibration.thresholds(policy.gate.threshold), {}, {}
    estimate = policy.gate.estimate

    def decide(layer, inputs, attend):
        at = calibration.manifest.layers.index(layer)
        with torch.no_grad():
            mass = bulk_log_mass_from_prompt(inputs, estimate=estimate)[0]
            weights, offset = calibration.tensors["probe"][at].float(), calibration.tensors["probe_offset"][at]
            said = torch.einsum("bqd,hd->bhq", hidden[layer].float(), weights) + offset[:, None]
        attended = attend()
        local = locals_of(inputs)
        closed = local - (mass + said) >= margins[at][:, None]
        wanted[layer] = (inputs.regions.asked[:, None] & ~closed, (local - mass - said - margins[at][:, None]).abs())
        return attended

    with patchattn.patch(model, policy, calibration=calibration, record="timeline") as handle:
        with observing(handle, decide), given_to(model, hidden):
            run(model, ids, use_cache=False)
    return {layer: calls[0] for layer, calls in recorded_gates(handle).items() if calls}, wanted, handle


def locals_of(inputs):
    from patchattn.call.masses import exact_attention

    return exact_attention(inputs)[1]


OTHERS = [family for family in (*FAMILIES, *HYBRID_FAMILIES) if family not in ("llama", "gemma2", "gpt_oss")]


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_oss", *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_the_patched_model_decides_as_the_calibration_says(family) -> None:
    model = tiny_model(family)
    calibration = llama() if family == "llama" else measured(model)
    got, wanted, handle = by_hand(model, calibration, aimed_at(calibration), tokens(1))
    assert 0.02 < handle.report().open_fraction() < 0.98
    assert set(wanted) == set(calibration.manifest.layers)
    for layer, (opened, distance) in wanted.items():
        differ = got[layer] != opened
        assert not (differ & (distance > 1e-3)).any()
        assert differ.float().mean() < 0.01


@pytest.mark.slow
def test_all_backends_decide_and_answer_alike(monkeypatch) -> None:
    model, calibration = tiny_model("llama"), llama()
    double = copy.deepcopy(model).double()
    policy, (ids, mask) = aimed_at(calibration), padded()
    found = {}
    for backend in ("reference", "blockwise", "flex"):
        with patchattn.patch(
            model, policy, calibration=calibration, record="timeline", backend=backend.replace("flex", "reference")
        ) as handle:
            if backend == "flex":
                through_cuda_path(handle)
            found[backend] = in_pieces(model, ids, mask), recorded_gates(handle), handle.report()
    for output, gates, report in found.values():
        assert not any(report.dense_calls.values())
        assert 0.1 < report.open_fraction("prefill") < 0.9
        assert 0 < report.open_fraction("decode") < 1
        for layer, calls in found["reference"][1].items():
            for want, got in zip(calls, gates[layer], strict=True):
                assert (want != got).float().mean() < 5e-3
        # Rounding may flip a decision, so that each is compared under its own.
        replayed = []
        for twin in (model, double):
            with patchattn.patch(twin, POLICY, backend="reference") as handle:
                replay_gates(handle, gates)
                replayed.append(in_pieces(twin, ids, mask))
        assert_within_budget(output, *replayed)


def padded(lengths=(300, 243)):
    ids, mask = tokens(2, max(lengths)), torch.zeros(2, max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids * mask, mask


def in_pieces(model, ids, mask):
    """Read all but the last three tokens at once and those one by one; returns the logits of the real tokens."""
    cache, cut = DynamicCache(config=model.config), ids.shape[1] - 3
    logits = [run(model, ids[:, :cut], attention_mask=mask[:, :cut], **with_cache(model, cache)).logits]
    for end in range(cut + 1, ids.shape[1] + 1):
        call = {"attention_mask": mask[:, :end], **with_cache(model, cache)}
        logits.append(run(model, ids[:, end - 1 : end], **call).logits)
    return torch.cat(logits, 1)[mask.bool()]


def through_cuda_path(handle):
    """Let a patched model attend as it would on a CUDA device."""
    for state in handle.states.values():
        state.attend = functools.partial(flex.attend_with, compiler="aot_eager")
        state.weighed = functools.partial(flex.weigh_and_attend_with, compiler="aot_eager")


def test_a_padded_row_decides_as_it_does_alone() -> None:
    model, calibration = tiny_model("llama"), llama()
    ids, mask = padded()
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration, record="timeline") as handle:
        run(model, ids, attention_mask=mask, use_cache=False)
        together = recorded_gates(handle)[0][0][1, :, -243:]
        handle.reset_report()
        run(model, ids[1:, -243:], use_cache=False)
        alone = recorded_gates(handle)[0][0][0]
    assert torch.equal(together, alone)
    assert 0 < alone[:, 36:].float().mean() < 1


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_decode_decides_as_one_prefill(kind) -> None:
    model, calibration, ids = tiny_model("llama"), llama(), tokens()
    policy = aimed_at(calibration, 0.6)
    with patchattn.patch(model, policy, calibration=calibration, record="timeline") as handle:
        run(model, ids, use_cache=False)
        whole = recorded_gates(handle)
        handle.reset_report()
        cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=320)
        run(model, ids[:, :200], **with_cache(model, cache))
        for begin, end in ((200, 290), *((at, at + 1) for at in range(290, 300))):
            run(model, ids[:, begin:end], **with_cache(model, cache))
        pieces = recorded_gates(handle)
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 305)
    for layer, calls in whole.items():
        assert torch.equal(torch.cat(pieces[layer], dim=2), calls[0])
    assert 0 < sum(calls[0][..., 290:].float().mean() for calls in whole.values()) < 3


@pytest.mark.parametrize("backend", ["reference", "blockwise", pytest.param("flex", marks=pytest.mark.slow)])
def test_in_decode_a_group_opens_as_a_whole_if_the_policy_says_so(backend) -> None:
    model, calibration, ids = tiny_model("llama"), llama(), tokens()
    found = {}
    for whole_groups in (False, True):
        policy = aimed_at(calibration, whole_groups=whole_groups)
        with patchattn.patch(
            model, policy, calibration=calibration, record="timeline", backend=backend.replace("flex", "reference")
        ) as handle:
            if backend == "flex":
                through_cuda_path(handle)
            cache = DynamicCache(config=model.config)
            run(model, ids[:, :280], **with_cache(model, cache))
            for at in range(280, 290):
                run(model, ids[:, at : at + 1], **with_cache(model, cache))
            found[whole_groups] = recorded_gates(handle)
    for layer, (alone, whole) in enumerate(zip(found[False].values(), found[True].values(), strict=True)):
        assert torch.equal(alone[0], whole[0])
        by_group = torch.cat(whole[1:], 2).unflatten(1, (2, 3))
        assert torch.equal(by_group.any(2), by_group.all(2))
        if layer == 0:
            # Later layers are given something else.
            heads = torch.cat(alone[1:], 2).unflatten(1, (2, 3))
            assert torch.equal(heads.any(2), by_group.all(2))
            assert not torch.equal(heads.any(2), heads.all(2))


@pytest.mark.slow
def test_a_compiled_model_decides_alike_without_a_graph_for_each_length() -> None:
    model, calibration = tiny_model("llama"), llama()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration) as handle:
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for length in (260, 270, 280, 290):
            want = run(model, tokens(2, length), use_cache=False).logits
            before = handle.report().open_fraction()
            handle.reset_report()
            got = run(compiled, tokens(2, length), use_cache=False).logits
            assert handle.report().open_fraction() == pytest.approx(before, abs=2e-3)
            torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
            handle.reset_report()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_steps_of_decode_are_compiled_once() -> None:
    model, calibration, ids = tiny_model("llama"), llama(), tokens()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration, record="timeline") as handle:
        run(model, ids, use_cache=False)
        whole = recorded_gates(handle)
        cache = StaticCache(config=model.config, max_cache_len=320)
        run(model, ids[:, :290], **with_cache(model, cache))
        handle.reset_report()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for at in range(290, 300):
            run(compiled, ids[:, at : at + 1], **with_cache(model, cache))
        pieces = recorded_gates(handle)
    for layer, calls in whole.items():
        assert torch.equal(torch.cat(pieces[layer], dim=2), calls[0][..., 290:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_the_probe_survives_casts_copies_and_pickles() -> None:
    model, calibration = tiny_model("llama"), llama()
    margins, probe = calibration.findings.offsets(aimed_at(calibration).gate.threshold)
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration, record="timeline") as handle:
        run(model, tokens(), use_cache=False)
        want = recorded_gates(handle)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16().float()):
            for layer, state in enumerate(part.self_attn._modules["patchattn_layer"] for part in twin.model.layers):
                assert torch.equal(state.measured.probe, probe[layer])
                assert torch.equal(state.measured.margins, margins[layer])
                state.reset_report()
            run(twin, tokens(), use_cache=False)
            states = [part.self_attn._modules["patchattn_layer"] for part in twin.model.layers]
            gates = [torch.cat([opened for _, opened in state.timeline]) for state in states]
            if twin.dtype == model.dtype and torch.equal(twin.lm_head.weight, model.lm_head.weight):
                assert all(torch.equal(gates[layer], want[layer][0]) for layer in want)
        low = copy.deepcopy(model).bfloat16()
        assert torch.equal(low.model.layers[1].self_attn._modules["patchattn_layer"].measured.probe, probe[1])
        run(low, tokens(), use_cache=False)
        assert not [name for name in model.state_dict() if "patchattn" in name]


def test_unpatch_gives_the_model_back_exactly() -> None:
    model, calibration = tiny_model("llama"), llama()
    before, config = run(model, tokens()).logits, model.config.to_dict()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration):
        assert not torch.equal(run(model, tokens(), use_cache=False).logits, before)
    assert torch.equal(run(model, tokens()).logits, before)
    assert model.config.to_dict() == config
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.slow
def test_low_precision_models_are_priced_and_patched() -> None:
    for family, dtype in (("llama", torch.bfloat16), ("gemma2", torch.bfloat16), ("gpt_oss", torch.bfloat16)):
        model = tiny_model(family, dtype=dtype)
        calibration = measured(model)
        assert calibration.findings.priced().price[..., 0].sum() > 0
        with patchattn.patch(model, aimed_at(calibration), calibration=calibration) as handle:
            run(model, tokens(), use_cache=False)
        assert 0.02 < handle.report().open_fraction() < 0.98


def test_a_slice_of_heads_takes_its_part_of_the_probe() -> None:
    margins, probe = torch.arange(6.0), torch.randn(6, 8, dtype=torch.float64).float()
    hidden, whole = torch.randn(2, 5, 8), MeasuredHeads(margins, probe=probe)
    part = MeasuredHeads.of_bits(whole.of_heads(slice(2, 4), slice(1, 2)).bits())
    want = whole.offsets(hidden, torch.float64)
    torch.testing.assert_close(part.offsets(hidden, torch.float64), want[:, 2:4])
    assert want.shape == (2, 6, 5)
    torch.testing.assert_close(want, torch.einsum("bqd,hd->bhq", hidden.double(), probe.double()) + margins[:, None])


def test_where_the_hidden_state_is_not_known_heads_open_but_those_that_never_do() -> None:
    measured_heads = MeasuredHeads(torch.tensor([-torch.inf, 0.0, torch.inf]), probe=torch.ones(3, 8))
    offsets = measured_heads.offsets(None, torch.float32)
    assert offsets[0] == -torch.inf
    assert offsets[1:].isnan().all()


# peft 0.21 asks for an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_wrapped_model_is_measured_and_patched_as_the_one_inside() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    inside = llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    calibration = measured(wrapped)
    # An adapter that was never trained changes nothing.
    for name in ("price", "probe", "kl"):
        torch.testing.assert_close(calibration.tensors[name], inside.tensors[name])
    trained = [parameter.requires_grad for parameter in wrapped.parameters()]
    assert any(trained)
    assert not all(trained)
    with patchattn.patch(wrapped, aimed_at(calibration), calibration=calibration) as handle:
        run(wrapped, tokens(), use_cache=False)
    assert 0 < handle.report().open_fraction() < 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
def test_text_towers_are_measured_and_patched(family) -> None:
    model = tiny_model(family)
    calibration = measured(model)
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration) as handle:
        run(model, tokens(1).clamp(max=120), use_cache=False)
    assert 0 < handle.report().open_fraction() < 1


def test_a_patched_model_is_trained_with_checkpoints_and_measured_again() -> None:
    model, calibration = tiny_model("llama"), llama()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with patchattn.patch(model, aimed_at(calibration), calibration=calibration, backend="reference"):
        model.train()
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    assert measured(model.eval()).tensors["price"].equal(calibration.tensors["price"])


def test_policies_without_what_they_need_are_refused() -> None:
    model, calibration = tiny_model("llama"), llama()
    plain = patchattn.calibrate(model, Letters(), texts(), POLICY, lengths=(300,), key_moments=False)
    gate = MomentGate(threshold=KLTarget(nats=0.1))
    wrong = {
        "needs a calibration: KLTarget": (gate, None, PolicyError),
        "measured without prices": (gate, plain, CalibrationError),
        "with the estimate 'lognormal', not 'saturating'": (
            MomentGate(threshold=KLTarget(nats=0.1), estimate="saturating"),
            calibration,
            CalibrationError,
        ),
        "needs 9 held-out documents; the calibration has 2": (
            MomentGate(threshold=KLTarget(nats=0.01, promised=True)),
            calibration,
            CalibrationError,
        ),
    }
    for words, (wanted, given, kind) in wrong.items():
        with pytest.raises(kind, match=words) as caught:
            patchattn.patch(model, POLICY.model_copy(update={"gate": wanted}), calibration=given)
        assert caught.value.fix
        assert not patchattn.is_patched(model)


def test_a_model_with_a_smaller_hidden_state_is_refused() -> None:
    model = tiny_model("llama", hidden_size=48)
    with pytest.raises(patchattn.CalibrationMismatchError, match="of size 96; this model has 48"):
        patchattn.patch(model, aimed_at(llama()), calibration=llama())
    assert not patchattn.is_patched(model)


def test_what_is_expected_is_said_for_the_layers_with_gates() -> None:
    model, calibration = tiny_model("llama"), llama()
    policy = aimed_at(calibration)
    said, prices = {}, calibration.findings.priced()
    for layers in (None, (0,), (0, 1)):
        with patchattn.patch(model, policy.model_copy(update={"layers": layers}), calibration=calibration) as handle:
            run(model, tokens(), use_cache=False)
        said[layers] = handle.report().expected_kl
    chosen = prices.rungs(policy.gate.threshold)
    assert said[None] == pytest.approx(prices.expected(chosen))
    # The fewer layers have gates, the less is lost.
    assert 0 < said[0,] < said[0, 1] < said[None]
    assert said[None] <= policy.gate.threshold.nats
    with patchattn.patch(model, POLICY, calibration=calibration) as handle:
        assert handle.report().expected_kl is None
    risk = POLICY.model_copy(update={"gate": MomentGate(threshold=RiskTarget(alpha=0.3))})
    with patchattn.patch(model, risk, calibration=calibration) as handle:
        assert handle.report().expected_kl is None


def test_a_budget_by_price_is_kept() -> None:
    calibration = llama()
    prices = calibration.findings.priced()
    for fraction in (0.05, 0.2, 0.5, 0.9):
        target = OpenFractionTarget(fraction=fraction)
        margins = calibration.thresholds(target) / calibration.tensors["probe_scale"]
        rungs = (prices.margins - margins[..., None]).nan_to_num(nan=0.0).abs().argmin(-1)
        assert fraction - 0.1 < prices.opened(rungs) <= fraction
        assert calibration.findings.offsets(target)[1] is not None


def test_a_calibration_of_some_layers_goes_with_gates_that_take_nothing_from_it() -> None:
    model = tiny_model("llama")
    some = patchattn.calibrate(model, Letters(), texts(), POLICY.model_copy(update={"layers": (0,)}), lengths=(300,))
    for gate in (MomentGate(threshold=0.8), patchattn.ClosedGate()):
        with patchattn.patch(model, POLICY.model_copy(update={"gate": gate}), calibration=some) as handle:
            assert handle.expected_kl is None


def test_nothing_is_expected_of_a_prompt_that_is_read_densely() -> None:
    calibration = llama()
    policy = aimed_at(calibration)
    assert calibration.expected_kl(policy) is not None
    assert calibration.expected_kl(policy.model_copy(update={"phases": frozenset({"decode"})})) is None
