"""What a model does with its mask before attention sees it, and what is looked at in slots of padding."""

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, Policy
from patchattn.hf.architecture import with_cache
from patchattn.hf.mask import CausalMask
from patchattn.testing import tiny_model

OPEN = Policy(sink_size=4, window_size=16, min_bulk=0, gate=OpenGate())
SHARED = {"num_kv_shared_layers": 2, "num_hidden_layers": 4}
SHARED_TYPES = ["sliding_attention", "full_attention"] * 2


def batch(length=60, padding=9, side="left"):
    ids = torch.randint(2, 120, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(0, padding) if side == "left" else slice(length - padding, length)] = 0
    return ids, mask


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("keep", [0, 1, 3, 4, 20])
def test_layers_that_go_on_with_the_last_queries_only(original, padded, keep):
    # Layers of Gemma 4 that share keys with earlier ones get only the queries whose logits are kept, with a cut mask.
    model = tiny_model("gemma4_text", **SHARED, layer_types=SHARED_TYPES)
    model.set_attn_implementation(original)
    ids, mask = batch()
    given = {"attention_mask": mask} if padded else {}
    want = logits(model, ids, logits_to_keep=keep, **given)
    with patchattn.patch(model, OPEN) as handle:
        got = logits(model, ids, logits_to_keep=keep, **given)
    real = mask[:, -want.shape[1] :].bool() if padded else slice(None)
    assert torch.allclose(got[real], want[real], atol=2e-5)
    assert handle.report().open_fraction() == 1.0
    assert handle.report().dense_calls_by_reason() == {"local": 2}


def test_a_mask_that_a_model_changes_goes_to_its_own_attention():
    model = tiny_model("llama")
    ids, mask = batch()
    bias = torch.randn(1, 1, 60, 60, generator=torch.Generator().manual_seed(0))

    def add_bias(module, args, kwargs):
        given = kwargs["attention_mask"]
        given = torch.where(given, 0.0, -torch.inf) if given is not None else torch.full((60, 60), -torch.inf).triu(1)
        return args, {**kwargs, "attention_mask": given + bias}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(add_bias, with_kwargs=True)
    for given in ({}, {"attention_mask": mask}):
        want = logits(model, ids, **given)
        with patchattn.patch(model, Policy(sink_size=4, window_size=16, min_bulk=0, gate=ClosedGate())) as handle:
            got = logits(model, ids, **given)
        real = mask.bool() if given else slice(None)
        assert torch.allclose(got[real], want[real], atol=1e-5)
        assert handle.report().dense_calls_by_reason() == {"mask": 3}


def test_a_mask_of_a_call_that_does_not_fit_is_a_typed_error():
    model = tiny_model("llama")
    ids, mask = batch()

    def halve(module, args, kwargs):
        given = kwargs["attention_mask"]
        assert isinstance(given, CausalMask)
        return args, {**kwargs, "attention_mask": given[:, :, :30]}

    model.model.layers[1].self_attn.register_forward_pre_hook(halve, with_kwargs=True)
    with patchattn.patch(model, OPEN), pytest.raises(patchattn.ShapeError, match=r"30, 60.*Unpatch"):
        logits(model, ids, attention_mask=mask)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_a_callers_own_integers_are_the_callers_mask(rows):
    # Three rows of int32 once were the sign of a mask of the library's own.
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    ids, _ = batch()
    mask = torch.randint(-3, 1, (2, 1, rows, 60), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    want = logits(model, ids[:, :rows], attention_mask=mask[..., :rows])
    with patchattn.patch(model, OPEN) as handle:
        got = logits(model, ids[:, :rows], attention_mask=mask[..., :rows], **with_cache(model, cache))
    assert torch.equal(got, want)
    assert handle.report().dense_calls_by_reason() == {"mask": 3}


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize(
    "gate", [OpenGate(), ClosedGate(), MomentGate(threshold=0.1)], ids=["open", "closed", "moment"]
)
@pytest.mark.parametrize("min_bulk", [0, 30, 4096])
def test_queries_in_slots_of_padding_read_what_they_read_in_the_stock_model(backend, gate, min_bulk):
    ids, mask = batch(300, 170, side="right")
    model = tiny_model("llama").double()
    want = logits(model, ids, attention_mask=mask)
    policy = Policy(sink_size=4, window_size=16, min_bulk=min_bulk, gate=gate)
    with patchattn.patch(model, policy, backend=backend, record="timeline") as handle:
        got = logits(model, ids, attention_mask=mask)
        report = handle.report()
    if gate == OpenGate() or min_bulk == 4096:
        assert torch.allclose(got, want, atol=1e-9)
    first = torch.cat([opened for _, opened in report.timeline.get(0, [])], 2) if report.timeline.get(0) else None
    assert first is None or not first[1, :, 130:].any()  # they are not asked
    if min_bulk == 0:
        assert report.layers[0]["prefill"].asked == 300 - 20 + 130 - 20
    # In the first layer, where both have the same inputs, every gate gives the stock output there.
    outputs = {}
    for patched in (False, True):
        hook = model.model.layers[0].self_attn.register_forward_hook(
            lambda module, args, output, key=patched: outputs.update({key: output[0]})
        )
        handle = patchattn.patch(model, policy, backend=backend) if patched else None
        logits(model, ids, attention_mask=mask)
        hook.remove()
        if handle is not None:
            handle.unpatch()
    assert torch.allclose(outputs[True][1, 130:], outputs[False][1, 130:], atol=1e-9)


def test_what_padding_reads_is_counted_as_work():
    ids, mask = batch(300, 170, side="right")
    model = tiny_model("llama", num_hidden_layers=1)
    with patchattn.patch(model, OPEN, backend="reference") as handle:
        logits(model, ids, attention_mask=mask)
    assert handle.report().realised_density("prefill") == 1.0


@pytest.mark.parametrize("make", ["dynamic", "static"])
def test_a_decode_step_whose_mask_was_not_extended(make):
    from transformers import StaticCache

    model = tiny_model("llama")
    ids, mask = batch(80)
    ids, mask = ids[:, :80], mask[:, :80]
    got = []
    for patched in (False, True):
        cache = DynamicCache(config=model.config) if make == "dynamic" else StaticCache(model.config, max_cache_len=90)
        handle = patchattn.patch(model, OPEN) if patched else None
        logits(model, ids, attention_mask=mask, **with_cache(model, cache))
        got.append(logits(model, ids[:, :1], attention_mask=mask, **with_cache(model, cache)))
        if handle is not None:
            handle.unpatch()
    assert torch.allclose(*got, atol=1e-5)


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_a_first_layer_without_keys(original):
    # transformers takes the sizes of the mask from the first layer's cache; a linear layer's tells only the number of
    # queries. The stock model then masks all keys of a row that begins with padding.
    model = tiny_model("minimax")
    model.set_attn_implementation(original)
    ids, mask = batch()
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    whole = model.generate(ids, **kwargs)
    alone = model.generate(ids[1:, 9:], **kwargs)
    with patchattn.patch(model, OPEN) as handle:
        assert torch.equal(model.generate(ids, **kwargs), whole)
        assert torch.equal(model.generate(ids, attention_mask=mask, **kwargs)[1:, 9:], alone)
    report = handle.report()
    assert report.open_fraction() == 1.0
    assert report.rebuilt_by_reason() == {}
    assert set(report.layers) == {1, 2}
