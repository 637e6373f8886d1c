"""Tests of `calibrate(prices=True)`: broken off, shared by processes, refused, and never a trace on the model."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import patchattn
from patchattn import CalibrationError, KLTarget, MomentGate, Policy, UnsupportedModelError
from patchattn.calibration import Calibration
from patchattn.calibration.prices import TRIED
from patchattn.measuring import pricing
from patchattn.measuring.documents import cut_documents
from patchattn.measuring.pricing import GATED, Split, measured_kl, policies_tried
from patchattn.testing import tiny_model

sys.path.insert(0, str(Path(__file__).parent))

from test_measuring import OTHER_TEXT, POLICY, Killed, Letters, measure, texts

KL = POLICY.model_copy(update={"gate": MomentGate(threshold=KLTarget(nats=0.05))})


def priced(model=None, **fields) -> Calibration:
    return measure(model, **({"prices": True, "key_moments": False} | fields))


@functools.cache
def plain(policy: Policy = POLICY) -> Calibration:
    """What a run gives that nothing happens to; measured once for all tests, which only look at it."""
    return priced(policy=policy)


def assert_same(one: Calibration, other: Calibration) -> None:
    assert one.manifest == other.manifest
    assert one.policy == other.policy
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def documents() -> list[torch.Tensor]:
    return cut_documents(Letters(), texts(), (300,), documents=None, seed=0, local=(4, 32))


# Six documents are read; two are fitted to, two priced and then valued, two held out.
@pytest.mark.parametrize("last", [12, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 7, 8, 10, 11, 14))])
def test_a_broken_run_goes_on_at_every_stage(last: int, tmp_path: Path) -> None:
    kept, finished = tmp_path / "sums", []

    def die(done: int, of: int) -> None:
        finished.append(done)
        assert of == 14
        if done == last and len(finished) == last:
            raise Killed

    model = tiny_model("llama")
    with pytest.raises(Killed):
        priced(model, policy=KL, checkpoint=kept, progress=die)
    assert_untouched(model, tiny_model("llama"))
    resumed = priced(model, policy=KL, checkpoint=kept, progress=die)
    assert finished == list(range(1, 15))
    assert not kept.exists()
    assert_same(resumed, plain(KL))


def test_a_checkpoint_with_prices_is_not_one_without(tmp_path: Path) -> None:
    kept = tmp_path / "sums"

    def die(*_: int) -> None:
        raise Killed

    for first, second in ((True, False), (False, True)):
        with pytest.raises(Killed):
            priced(prices=first, checkpoint=kept, progress=die)
        with pytest.raises(CalibrationError, match="other settings"):
            priced(prices=second, checkpoint=kept)
        kept.unlink()


def test_prices_change_nothing_of_what_was_measured_before() -> None:
    with_prices, without = plain(), priced(prices=False)
    assert without.manifest == with_prices.manifest.model_copy(update={"prices": None})
    assert without.policy == with_prices.policy
    new = {"probe", "probe_offset", "probe_scale", "price", "value", "priced_open_fraction", "tried", "kl"}
    assert set(with_prices.tensors) == set(without.tensors) | new | {"kl_open_fraction"}
    for name, tensor in without.tensors.items():
        assert torch.equal(tensor, with_prices.tensors[name])
    source = with_prices.manifest.prices
    assert (source.estimate, source.hidden, source.fitted, source.priced, source.held_out) == ("lognormal", 96, 2, 2, 2)
    assert source.gated == GATED
    assert not torch.equal(with_prices.tensors["value"], with_prices.tensors["price"])


MEASURED = {
    "moments of the prompt": {},
    "moments of other text": {"policy": OTHER_TEXT},
    "prices": {"prices": True, "key_moments": False},
}
RANKS = """
import sys, torch
sys.path[:0] = [{here!r}]
from test_pricing import MEASURED, measure
rank, meeting, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{{meeting}}", rank=rank, world_size=2)
for name, fields in MEASURED.items():
    measure(**fields).save_pretrained(f"{{out}}-{{name}}-{{rank}}", card=False)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_documents_and_agree_with_one(tmp_path: Path) -> None:
    code = textwrap.dedent(RANKS).format(here=str(Path(__file__).parent))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "meeting"), str(tmp_path / "out")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for what, fields in MEASURED.items():
        zero, one = (Calibration.from_pretrained(tmp_path / f"out-{what}-{rank}") for rank in range(2))
        assert_same(zero, one)
        alone = measure(**fields)
        assert zero.manifest == alone.manifest
        # Sums in another order: a rounding of float64 may cross a rounding of half precision.
        close = {"rtol": 2e-3, "atol": 1e-5} if what == "prices" else {"rtol": 1e-3, "atol": 1e-6}
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(zero.tensors[name].float(), tensor.float(), **close, msg=f"{what}, {name}")


def test_documents_are_shared_out_and_none_does_two_things() -> None:
    for count in (3, 4, 5, 6, 20, 36, 100):
        split = Split.of(list(range(count)), 16)
        parts = (split.fitted, split.priced, split.held_out)
        together = [index for part in parts for index in part]
        assert all(parts)
        assert sorted(set(together)) == together
        assert len(together) <= count
        # What is priced is read again, in a gated model.
        assert split.count == len(together) + len(split.priced)
    assert [len(part) for part in parts] == [12, 8, 16]
    assert len(Split.of(list(range(100)), 49).held_out) == 49


def assert_untouched(model, twin) -> None:
    assert not patchattn.is_patched(model)
    wanted = [parameter.requires_grad for parameter in twin.parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        assert vars(module).get("forward") is None
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks"):
            assert len(getattr(module, hooks)) == len(getattr(other, hooks)), hooks
    assert model.config.to_dict() == twin.config.to_dict()
    assert model.config._attn_implementation == twin.config._attn_implementation


PLACES = {
    "in the first forward pass": ("patchattn.measuring.prices.dense_with_graph", RuntimeError),
    "where logits are made": ("patchattn.measuring.prices.drawn", ValueError),
    "in the backward pass": ("patchattn.measuring.prices.closed_attention", KeyboardInterrupt),
    "in the sums": ("patchattn.measuring.probe.Probe.fit_to", ZeroDivisionError),
    "in the fit": ("patchattn.measuring.probe.Probe._of_layer", ValueError),
    "in the prices": ("patchattn.measuring.probe.closed_sums", MemoryError),
    "in the gated model": ("patchattn.measuring.values.local_with_graph", ValueError),
    "in the slopes": ("patchattn.measuring.probe.Probe.add_slopes", KeyboardInterrupt),
    "where the KL is measured": ("patchattn.measuring.pricing.head_of", OSError),
    "in the patched model": ("patchattn.gates.moment.bulk_log_mass_from_prompt", ZeroDivisionError),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_fails_the_model_is_as_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind = PLACES[place]

    def fail(*_, **__):
        raise kind("on purpose")

    monkeypatch.setattr(name, fail)
    model, twin = tiny_model("llama"), tiny_model("llama")
    # Weights that are not trained stay so.
    for one in (model, twin):
        one.model.embed_tokens.requires_grad_(requires_grad=False)
    with pytest.raises((kind, CalibrationError), match="on purpose"):
        priced(model)
    assert_untouched(model, twin)
    monkeypatch.undo()
    assert_same(priced(model), plain())


def test_errors_of_the_library_and_of_memory_are_not_taken_for_missing_gradients(monkeypatch) -> None:
    for kind in (patchattn.UnsupportedCallError, torch.OutOfMemoryError):

        def fail(*_, kind=kind, **__):
            raise kind("full") if kind is torch.OutOfMemoryError else kind("full", fix="none")

        monkeypatch.setattr("patchattn.measuring.prices.closed_attention", fail)
        with pytest.raises(kind, match="full"):
            priced()


def test_what_cannot_be_priced_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_, **__):
        raise AssertionError("it went on")

    monkeypatch.setattr("patchattn.measuring.collect.read_document", work)
    config = tiny_model("llama").config
    labels = AutoModelForSequenceClassification.from_config(config).eval()
    wrong = {
        "Prices need 3 documents or more": {"documents": 2},
        'Prices go with moments="prompt"': {"policy": OTHER_TEXT, "key_moments": True},
        "which LlamaModel does not make": {"model": AutoModel.from_config(config).eval()},
        "which LlamaForSequenceClassification does not make": {"model": labels},
        "which needs prices": {"policy": KL, "prices": False},
        "training mode": {"model": tiny_model("llama").train()},
    }
    for words, fields in wrong.items():
        with pytest.raises(CalibrationError, match=words) as caught:
            priced(**fields)
        assert caught.value.fix
    with pytest.raises(UnsupportedModelError):
        priced(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layers", [(1,), *(pytest.param(layers, marks=pytest.mark.slow) for layers in ((0,), (0, 2)))])
def test_layers_that_are_left_out_are_not_priced_and_pass_gradients_on(layers) -> None:
    policy = POLICY.model_copy(update={"layers": layers})
    some, every = priced(policy=policy), plain()
    # What is closed at other rungs hangs on logarithms of prices near zero, and so on rounding.
    of_all, of_some = (calibration.tensors["price"][..., 0] for calibration in (every, some))
    torch.testing.assert_close(of_some, of_all[list(layers)], rtol=1e-3, atol=1e-6)
    assert some.tensors["kl"].mean() > 0
    target = KL.model_copy(update={"layers": layers, "min_bulk": 0})
    model = tiny_model("llama")
    with patchattn.patch(model, target, calibration=some) as handle:
        model(documents()[0][None], use_cache=False)
    assert set(handle.report().counts("prefill")) >= set(layers)


def test_break_even_of_the_policy_is_its_own_business() -> None:
    """Prices are of all pairs; a policy that asks fewer of them changes nothing about them."""
    assert KL.min_bulk == "auto"
    one, other = plain(KL), priced(policy=KL.model_copy(update={"min_bulk": 500}))
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name])
    model = tiny_model("llama")
    with patchattn.patch(model, calibration=other) as handle:
        model(documents()[0][None], use_cache=False)
    assert handle.report().dense_calls[0] == {"short": 1}


@pytest.mark.slow
def test_within_inference_mode_it_is_the_same() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        inside = priced(model)
    with torch.no_grad():
        assert_same(plain(), inside)


@pytest.mark.slow
def test_a_document_with_few_bulk_keys_has_a_price_and_a_kl() -> None:
    short = measure(prices=True, key_moments=False, lengths=(300, 40, 37))
    assert all(tensor.isfinite().all() for tensor in short.tensors.values())


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt_oss"))]
)
def test_the_measured_kl_is_that_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, dtype=torch.float64)
    calibration, ids = priced(model), documents()[0]
    source = calibration.manifest.prices.model_copy(update={"held_out": 0})
    manifest = calibration.manifest.model_copy(update={"prices": source})
    nothing = {name: calibration.tensors[name][:0] for name in ("kl", "kl_open_fraction")}
    policy = Policy(sink_size=4, window_size=32, gate=MomentGate())
    before = Calibration(manifest, policy, calibration.tensors | nothing)
    monkeypatch.setattr(pricing, "_TOKENS_AT_A_TIME", 7)
    kl, opened = measured_kl(model, before, ids)
    tried = policies_tried(before)
    assert len(tried) == len(TRIED) == len(kl)
    with torch.no_grad():
        dense = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        for at, policy in enumerate(tried):
            with patchattn.patch(model, policy, calibration=before) as handle:
                other = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
            want = (dense.exp() * (dense - other)).sum(-1)[3::4].mean()
            assert float(kl[at]) == pytest.approx(float(want), rel=1e-6, abs=1e-12)
            assert float(opened[at]) == handle.report().open_fraction()
    assert (kl.diff() >= -0.02).all()
    assert kl[-1] > 0


def test_open_fractions_in_the_file_are_of_the_policies_that_were_measured() -> None:
    calibration = plain()
    prices, tried = calibration.findings.priced(), calibration.tensors["tried"]
    assert tried.tolist() == torch.tensor(TRIED).tolist()
    for policy, fraction, (predicted, _) in zip(policies_tried(calibration), tried, prices.measured(), strict=True):
        chosen = prices.at(float(fraction))
        wanted = prices.margins[chosen] * calibration.tensors["probe_scale"]
        assert torch.equal(calibration.thresholds(policy.gate.threshold), wanted)
        assert predicted == prices.predicted(chosen)
        assert prices.opened(chosen) <= fraction
