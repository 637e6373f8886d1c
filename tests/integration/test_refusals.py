"""What can't be patched or asked for is refused with the typed error, and the model is left alone."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaAttention

import patchattn
from patchattn import MomentGate, OpenGate, Policy, StaticGate
from patchattn.backends import blockwise, reference
from patchattn.hf.architecture import with_cache
from patchattn.testing import tiny_model
from patchattn.testing.models import REFUSED_FAMILIES

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(kind, auto=AutoModelForCausalLM, **fields):
    return auto.from_config(AutoConfig.for_model(kind, **fields))


class OwnAttention(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def llama_with(attention, **fields):
    """A tiny Llama one of whose layers has attention of another class."""
    model = tiny_model("llama", **fields)
    layer = model.model.layers[1]
    own = attention(model.config, 1)
    own.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = own
    return model


def not_causal(model):
    model.config.is_causal = False
    return model


def in_sdpa(model):
    model.config._attn_implementation_internal = "sdpa"  # newer versions refuse set_attn_implementation
    return model


REFUSED = {
    "linear": (lambda: torch.nn.Linear(2, 2), "PreTrainedModel"),
    "string": (lambda: "model", "torch.nn.Module"),
    "compiled": (lambda: torch.compile(tiny_model("llama"), backend="eager"), "Patch the LlamaForCausalLM inside it"),
    "encoder": (lambda: make("bert", AutoModel, **SMALL, intermediate_size=32), "decoder-only"),
    "vision tower": (lambda: tiny_model("gemma3").model.vision_tower, "decoder-only"),
    "encoder-decoder": (
        lambda: make(
            "t5", AutoModelForSeq2SeqLM, vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
        ),
        "decoder-only",
    ),
    "decoder of an encoder-decoder": (
        lambda: make("bart", vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=4, is_decoder=True),
        "is a second attention module",
    ),
    "both directions": (lambda: not_causal(tiny_model("llama")), "decoder-only"),
    "own attention": (lambda: llama_with(OwnAttention), "OwnAttention computes attention itself"),
    "other implementation": (
        lambda: tiny_model("llama", attn_implementation="flex_attention"),
        "'flex_attention'; call model.set_attn_implementation",
    ),
    "softcap in sdpa": (lambda: in_sdpa(tiny_model("gemma2")), "set_attn_implementation('eager')"),
    "bloom": (lambda: tiny_model("bloom"), "BloomAttention computes attention itself"),
    "falcon": (lambda: tiny_model("falcon"), "FalconAttention computes attention itself"),
    "doge": (lambda: make("doge", **SMALL, intermediate_size=32), "DogeAttention makes a mask of its own"),
    "deepseek_v32": (lambda: tiny_model("deepseek_v32"), "selects or biases keys on its own"),
    "sliding": (lambda: tiny_model("mistral", sliding_window=32), "all its layers are sliding"),
    "wide sliding": (lambda: tiny_model("phi3", sliding_window=8192), "model.config.sliding_window = None"),
}


def test_every_refused_family_is_tested():
    assert set(REFUSED_FAMILIES) <= set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(name):
    model, reason = REFUSED[name]
    model = model()
    support = patchattn.check_support(model)
    assert not support
    assert reason in str(support)
    with pytest.raises(patchattn.UnsupportedModelError) as caught:
        patchattn.patch(model)
    assert all(one in str(caught.value) for one in support.reasons)


def test_a_sliding_window_that_covers_everything_can_be_dropped_as_the_reason_says():
    ids = torch.randint(2, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    model = tiny_model("phi3", sliding_window=8192)
    with torch.no_grad():
        stock = model(ids).logits
        model.config.sliding_window = None
        with patchattn.patch(model, OPEN) as handle:
            assert torch.allclose(model(ids).logits, stock, atol=1e-4)
    assert handle.report().open_fraction() == 1.0


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = make("llama", **SMALL, intermediate_size=32)
    with pytest.raises(patchattn.UnsupportedModelError, match="meta device"):
        patchattn.patch(model)


OPEN = Policy(sink_size=4, window_size=16, min_bulk=0, gate=OpenGate())


class UserAttention(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)


class UserModel(LlamaForCausalLM):
    pass


def without_source():
    names = {}
    exec(
        "class Typed(Base):\n    def forward(self, *args, **kwargs):\n"
        "        return Base.forward(self, *args, **kwargs)\n",
        {"Base": LlamaAttention},
        names,
    )
    return names["Typed"]


def user_model():
    model = tiny_model("llama")
    twin = UserModel(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "build",
    [
        user_model,
        lambda: llama_with(UserAttention),
        lambda: llama_with(without_source()),
        lambda: tiny_model("llama").model,
        lambda: tiny_model("gemma3").model.language_model,
        lambda: tiny_model("gemma3").model,
    ],
    ids=["subclass", "attention", "no source", "no head", "text tower", "vision model"],
)
def test_classes_of_the_user_and_parts_of_models_are_patched(build, original):
    ids = torch.randint(2, 120, (1, 200), generator=torch.Generator().manual_seed(0))
    packed = torch.cat([torch.arange(120), torch.arange(80)])[None]
    model = build()
    model.set_attn_implementation(original)
    with torch.no_grad():
        stock, apart = model(ids)[0], model(ids, position_ids=packed, use_cache=False)[0]
        with patchattn.patch(model, OPEN) as handle:
            assert torch.allclose(model(ids)[0], stock, atol=2e-4)
            assert handle.report().open_fraction() == 1.0
            # The masks that stay with the model reach its own function, eager or not.
            assert torch.equal(model(ids, position_ids=packed, use_cache=False)[0], apart)
    assert handle.report().dense_calls[max(handle.report().dense_calls)] == {"mask": 1}


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


def test_a_backend_that_computes_something_else_is_refused(monkeypatch):
    model = tiny_model("llama")
    patchattn.patch(model, backend="blockwise").unpatch()

    def wrong(inputs, mass, threshold):
        right = reference.attend(inputs, mass, threshold)
        return dataclasses.replace(right, output=right.output + 1e-2)

    monkeypatch.setattr(blockwise, "BACKEND", dataclasses.replace(blockwise.BACKEND, attend=wrong))
    with pytest.raises(patchattn.BackendError, match="disagrees with the reference"):
        patchattn.patch(model, backend="blockwise")
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


@pytest.mark.parametrize("where", ["model", "decoder", "text tower"])
def test_a_configuration_that_asks_for_attention_weights_is_refused(where):
    model = tiny_model("gemma3" if where == "text tower" else "llama")
    model.set_attn_implementation("eager")
    config = model.config.get_text_config() if where == "text tower" else model.config
    config.output_attentions = True
    part = model.model if where == "decoder" else model
    assert "set model.config.output_attentions = False" in str(patchattn.check_support(part))
    with pytest.raises(patchattn.UnsupportedModelError, match="output_attentions"):
        patchattn.patch(part)
    config.output_attentions = False
    with patchattn.patch(part, OPEN), pytest.raises(ValueError, match="output_attentions"):
        config.output_attentions = True  # transformers says that the implementation has no weights


HARMLESS = {
    "shift_labels": lambda ids: {"labels": ids, "shift_labels": ids.roll(-1, 1)},
    "ignore_index": lambda ids: {"labels": ids, "ignore_index": 3},
    "num_items_in_batch": lambda ids: {"labels": ids, "num_items_in_batch": 7},
    "an unknown argument of the loss": lambda ids: {"labels": ids, "label_smoothing_of_mine": 0.1},
    "token_type_ids": lambda ids: {"labels": ids, "token_type_ids": torch.zeros_like(ids)},
    "tokenizer": lambda ids: {"labels": ids, "tokenizer": object()},
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_arguments_that_no_attention_function_reads_are_no_business_of_the_gate(name, original):
    model = tiny_model("llama")
    model.set_attn_implementation(original)
    ids = torch.randint(2, 128, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(ids, **HARMLESS[name](ids)).loss
        with patchattn.patch(model, OPEN) as handle:
            got = model(ids, **HARMLESS[name](ids)).loss
    assert torch.allclose(got, stock, atol=1e-5)
    assert handle.report().open_fraction() == 1.0


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "position_bias", "max_length_k"])
def test_arguments_that_an_attention_function_reads_are_refused_by_name(name):
    model = tiny_model("llama")
    with patchattn.patch(model, OPEN), pytest.raises(patchattn.UnsupportedCallError, match=f"{name}.*\n.*drop the"):
        model(torch.ones(1, 80, dtype=torch.long), **{name: torch.ones(2)})


@pytest.mark.parametrize(("name", "given"), [("softcap", 2.0), ("s_aux", torch.zeros(6))])
def test_scores_are_capped_only_in_models_that_cap_them(name, given):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with patchattn.patch(model, OPEN), pytest.raises(patchattn.UnsupportedCallError, match=name):
        model(torch.ones(1, 80, dtype=torch.long), **{name: given})


def test_stop_strings_with_a_tokenizer(tmp_path):
    from patchattn import demo

    model, tokenizer = demo.load()
    prompt = tokenizer(demo.sample_text()[:800], return_tensors="pt")
    kwargs = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [" "], "tokenizer": tokenizer}
    stock = model.generate(**prompt, **kwargs)
    with patchattn.patch(model, OPEN):
        assert torch.equal(model.generate(**prompt, **kwargs), stock)


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


@pytest.mark.parametrize("queries", [1, 3, 4])
@pytest.mark.parametrize("heads", [1, 6])
def test_a_mask_of_integers_of_the_callers_own_stays_with_the_model(queries, heads):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    ids = torch.randint(2, 128, (1, 40 + queries), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, heads, queries, 40 + queries, dtype=torch.int32)
    mask[..., ::3] = -100_000
    with torch.no_grad():
        model(ids[:, :40], **with_cache(model, cache))
        want = model(ids[:, 40:], **with_cache(model, copy.deepcopy(cache)), attention_mask=mask).logits
        with patchattn.patch(model, Policy(sink_size=4, window_size=16, min_bulk=0)) as handle:
            got = model(ids[:, 40:], **with_cache(model, copy.deepcopy(cache)), attention_mask=mask).logits
    assert torch.equal(got, want)
    assert handle.report().dense_calls_by_reason() == {"mask": model.config.num_hidden_layers}


@pytest.mark.parametrize("queries", [2, 3, 4])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_any_number_of_queries_goes_through_the_gate(queries, compiled):
    model = tiny_model("llama", num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=80)
    ids = torch.randint(2, 128, (2, 60 + queries), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    policy = Policy(sink_size=4, window_size=16, min_bulk=0, gate=OpenGate())
    with torch.no_grad(), patchattn.patch(model, policy) as handle:
        want = model(ids, attention_mask=mask).logits[:, -queries:]
        handle.reset_report()
        model(ids[:, :60], attention_mask=mask[:, :60], **with_cache(model, cache))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        got = run(ids[:, 60:], attention_mask=mask, **with_cache(model, cache)).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert not handle.report().dense_calls_by_reason()
    assert handle.report().layers[0]["prefill"].gated_calls == 2


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


def test_continuous_batching_of_older_versions_is_refused(monkeypatch):
    managers = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
    if hasattr(managers.ContinuousBatchingManager, "switch_to_cb_friendly_attn"):
        monkeypatch.delattr(managers.ContinuousBatchingManager, "switch_to_cb_friendly_attn")
    model = tiny_model("llama")
    with patchattn.patch(model):
        for start in (model.init_continuous_batching, lambda: model.generate_batch([[5, 6, 7]], max_new_tokens=2)):
            with pytest.raises(patchattn.UnsupportedCallError, match="24 and later can"):
                start()
        assert patchattn.is_patched(model)


def test_a_model_without_continuous_batching_is_patched_all_the_same(monkeypatch):
    from transformers import GenerationMixin

    for kind in GenerationMixin.__mro__:
        if "init_continuous_batching" in vars(kind):
            monkeypatch.delattr(kind, "init_continuous_batching")
    model = tiny_model("llama")
    with patchattn.patch(model):
        assert "init_continuous_batching" not in vars(model)
