"""What can't be patched or asked for is refused with the typed error, and the model is left alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import patchattn
from patchattn import MomentGate, Policy, StaticGate
from patchattn.testing import tiny_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(kind, auto=AutoModelForCausalLM, **fields):
    return auto.from_config(AutoConfig.for_model(kind, **fields))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "PreTrainedModel"),
        (lambda: "model", "torch.nn.Module"),
        (lambda: make("bert", AutoModel, **SMALL, intermediate_size=32), "decoder-only"),
        (
            lambda: make(
                "t5", AutoModelForSeq2SeqLM, vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
            ),
            "decoder-only",
        ),
        (lambda: make("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "AttentionInterface"),
        (lambda: make("gptj", vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "AttentionInterface"),
        (lambda: make("falcon", **SMALL), "AttentionInterface"),
        (lambda: tiny_model("mistral", sliding_window=32), "sliding"),
    ],
    ids=["linear", "string", "bert", "t5", "bloom", "gptj", "falcon", "sliding"],
)
def test_unsupported_models_are_refused_with_the_reason(model, reason):
    model = model()
    support = patchattn.check_support(model)
    assert not support
    assert reason in str(support)
    with pytest.raises(patchattn.UnsupportedModelError, match=reason):
        patchattn.patch(model)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = make("llama", **SMALL, intermediate_size=32)
    with pytest.raises(patchattn.UnsupportedModelError, match="meta device"):
        patchattn.patch(model)


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (Policy(layers=(0, 9)), r"layers \[9\]"),
        (Policy(gate=StaticGate(open_heads=((0, 6),))), r"\(0, 6\)"),
        (Policy(gate=StaticGate(open_heads=((3, 0),))), r"\(3, 0\)"),
        ({"window_size": 3}, "dict"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_before_anything_changes(policy, complaint):
    model = tiny_model("llama")
    with pytest.raises(patchattn.PolicyError, match=complaint):
        patchattn.patch(model, policy)
    assert not patchattn.is_patched(model)
    assert model.config._attn_implementation == "sdpa"


def test_unknown_backends_and_records_are_refused():
    model = tiny_model("llama")
    with pytest.raises(patchattn.BackendError, match="Unknown backend"):
        patchattn.patch(model, backend="triton")
    with pytest.raises(patchattn.PolicyError, match="record"):
        patchattn.patch(model, record="everything")
    assert not patchattn.is_patched(model)


def test_patching_twice_is_refused():
    model = tiny_model("llama")
    with patchattn.patch(model):
        with pytest.raises(patchattn.PatchStateError, match="already"):
            patchattn.patch(model)
        assert patchattn.is_patched(model)


def test_attention_weights_are_refused():
    model = tiny_model("llama")
    with patchattn.patch(model), pytest.raises((patchattn.UnsupportedCallError, ValueError), match="output_attentions"):
        model(torch.ones(1, 8, dtype=torch.long), output_attentions=True)


def test_attention_dropout_in_training_is_refused():
    model = tiny_model("llama", attention_dropout=0.1).train()
    with patchattn.patch(model), pytest.raises(patchattn.UnsupportedCallError, match="dropout"):
        model(torch.ones(1, 8, dtype=torch.long))


def test_backward_is_refused_and_forward_under_grad_mode_is_not():
    model = tiny_model("llama")
    ids = torch.randint(2, 128, (1, 80))
    with patchattn.patch(model, Policy(sink_size=4, window_size=16, min_bulk=0)):
        loss = model(ids, labels=ids).loss
        with pytest.raises(patchattn.UnsupportedCallError, match=r"(?i)backward"):
            loss.backward()


def test_continuous_batching_is_refused():
    model = tiny_model("llama")
    with patchattn.patch(model):
        for name in ("generate_batch", "init_continuous_batching"):
            with pytest.raises(patchattn.UnsupportedCallError, match="Continuous batching"):
                getattr(model, name)([[1, 2]])
    assert "generate_batch" not in vars(model)


def test_a_later_change_of_the_attention_implementation_is_seen():
    model = tiny_model("llama")
    handle = patchattn.patch(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(patchattn.PatchStateError, match="'sdpa'"):
        model(torch.ones(1, 8, dtype=torch.long))
    handle.unpatch()
    model(torch.ones(1, 8, dtype=torch.long))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_open_the_gate(bad):
    model = tiny_model("llama", num_hidden_layers=1)
    ids = torch.randint(2, 127, (1, 300))
    ids[0, 100] = 127
    with torch.no_grad():
        model.model.embed_tokens.weight[127] = bad
        with patchattn.patch(
            model, Policy(sink_size=4, window_size=16, min_bulk=0, gate=MomentGate(threshold=0.01)), record="timeline"
        ) as handle:
            model(ids)
    opened = handle.report().timeline[0][0][1]
    # From the first chunk boundary behind the bad key on, its moments are not finite.
    assert opened[0, :, 4 + 128 + 16 :].all()


def test_fully_padded_rows_give_zeros():
    model = tiny_model("llama", num_hidden_layers=1)
    ids, mask = torch.randint(2, 128, (2, 90)), torch.ones(2, 90, dtype=torch.long)
    mask[1] = 0
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), patchattn.patch(model, Policy(sink_size=2, window_size=8, min_bulk=0)):
        model(ids, attention_mask=mask)
    hook.remove()
    assert torch.isfinite(seen[0]).all()
    assert (seen[0][1] == 0).all()
    assert (seen[0][0] != 0).any()
