"""`patch` on tiny random models: open gates are the stock model, closed gates are sink + window, and undo is exact."""

import copy
import pickle

import pytest
import torch
from pydantic import ValidationError
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, StaticGate
from patchattn.call.regions import Regions
from patchattn.hf.architecture import with_cache
from patchattn.testing import (
    assert_within_budget,
    gates_of_chunks,
    recorded_gates,
    replay_gates,
    tiny_model,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = (300, 243, 160)


def padded_batch(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 128, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids * mask, mask


def policy(gate, **fields):
    return Policy(**({"sink_size": 4, "window_size": 32, "min_bulk": 0, "gate": gate} | fields))


def forward(model, ids, mask, **kwargs):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **kwargs).logits


def generate(model, ids, mask, **kwargs):
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_open_gates_equal_the_stock_model(family, backend, dtype):
    ids, mask = padded_batch()
    real = mask.bool()
    model = tiny_model(family, dtype=dtype)
    plain = forward(model, ids, mask)[real]
    truth = forward(copy.deepcopy(model).double(), ids, mask)[real]
    with patchattn.patch(model, policy(OpenGate()), backend=backend) as handle:
        got = forward(model, ids, mask)[real]
    assert_within_budget(got, plain, truth)
    report = handle.report()
    assert report.open_fraction("prefill") == 1.0
    assert not any(report.dense_calls.values())


@pytest.mark.parametrize("cache", [None, "static"])
def test_open_gates_generate_the_same_tokens(family, cache):
    ids, mask = padded_batch()
    model = tiny_model(family)
    stock = generate(model, ids, mask)
    with patchattn.patch(model, policy(OpenGate())) as handle:
        got = generate(model, ids, mask, cache_implementation=cache)
    assert torch.equal(got, stock)
    for phase in ("prefill", "decode"):
        assert handle.report().open_fraction(phase) == 1.0
    assert not any(handle.report().dense_calls.values())


def test_closed_gates_equal_the_stock_model_under_the_sink_and_window_mask(family):
    ids, mask = padded_batch()
    model = tiny_model(family)
    regions = Regions.of(mask, query_length=ids.shape[1], sink_size=4, window_size=32)
    # The stock model derives positions from the cache, not from the mask, so padding does not shift them.
    local = regions.local_mask()[:, None] | ~mask.bool()[:, None, :, None]
    plain = forward(model, ids, local)[mask.bool()]
    truth = forward(copy.deepcopy(model).double(), ids, local)[mask.bool()]
    with patchattn.patch(model, policy(ClosedGate())) as handle:
        got = forward(model, ids, mask)[mask.bool()]
    assert_within_budget(got, plain, truth)
    assert handle.report().open_fraction() == 0.0
    assert not torch.allclose(got, forward(model, ids, mask)[mask.bool()], atol=1e-3)


def assert_mixed(gates):
    for calls in gates.values():
        for opened in calls:
            assert opened.any()
            assert not opened.all()


@pytest.mark.parametrize(
    "gate", [MomentGate(threshold=0.3), MomentGate(threshold=0.3, estimate="lognormal"), OracleGate(threshold=0.3)]
)
def test_mixed_gates_equal_the_reference_with_replayed_decisions(family, gate):
    ids, mask = padded_batch()
    real = mask.bool()
    model = tiny_model(family)
    with patchattn.patch(model, policy(gate), record="timeline") as handle:
        got = forward(model, ids, mask)[real]
    gates = recorded_gates(handle)
    assert_mixed(gates)
    results = []
    for twin in (model, copy.deepcopy(model).double()):
        with patchattn.patch(twin, policy(gate), backend="reference") as handle:
            replay_gates(handle, gates)
            results.append(forward(twin, ids, mask)[real])
    assert_within_budget(got, *results)


def test_decisions_agree_with_float64_outside_the_rounding_of_the_margin():
    # The same float64 model on both backends must take the same decisions everywhere.
    ids, mask = padded_batch()
    model = tiny_model("llama").double()
    gates = []
    for backend in ("reference", "blockwise"):
        with patchattn.patch(model, policy(MomentGate(threshold=0.3)), backend=backend, record="timeline") as handle:
            forward(model, ids, mask)
        gates.append(recorded_gates(handle))
    assert_mixed(gates[0])
    for layer, calls in gates[0].items():
        assert torch.equal(calls[0], gates[1][layer][0])


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "gate", [MomentGate(threshold=0.3), OracleGate(threshold=0.3), StaticGate(open_heads=((1, 2),))]
)
def test_prefill_in_pieces_and_decode_equal_one_prefill(make_cache, gate):
    ids, mask = padded_batch((320, 251, 180))
    pieces = [150, 60, 1, 1, 107, 1]
    model = tiny_model("llama").double()
    with patchattn.patch(model, policy(gate), record="timeline") as handle:
        whole = forward(model, ids, mask)
        gates = recorded_gates(handle)
        assert any(opened.any() and not opened.all() for calls in gates.values() for opened in calls)
        handle.reset_report()
        cache = DynamicCache() if make_cache == "dynamic" else StaticCache(config=model.config, max_cache_len=400)
        outputs, seen = [], 0
        for piece in pieces:
            now = slice(seen, seen + piece)
            seen += piece
            outputs.append(forward(model, ids[:, now], mask[:, :seen], **with_cache(model, cache)))
        in_pieces = recorded_gates(handle)
    real = mask.bool()
    assert torch.allclose(torch.cat(outputs, 1)[real], whole[real], atol=1e-9)
    for layer, calls in gates.items():
        assert len(in_pieces[layer]) == len(pieces)
        for want, got in zip(gates_of_chunks(calls, pieces), in_pieces[layer], strict=True):
            assert torch.equal(want, got)


def test_a_cache_is_reused_over_turns_and_conversations_interleave():
    model = tiny_model("qwen3").double()
    first, _ = padded_batch((260,), seed=1)
    second, _ = padded_batch((280,), seed=2)
    more, _ = padded_batch((70,), seed=3)
    ones = torch.ones(1, 1, dtype=torch.long)
    with patchattn.patch(model, policy(MomentGate(threshold=0.3))) as handle:
        want = [
            forward(model, torch.cat([turn, more], 1), ones.expand(1, turn.shape[1] + 70)) for turn in (first, second)
        ]
        caches = [DynamicCache(), DynamicCache()]
        for turn, cache in zip((first, second), caches, strict=True):
            forward(model, turn, ones.expand(1, turn.shape[1]), **with_cache(model, cache))
        for turn, cache, whole in zip((first, second), caches, want, strict=True):
            got = forward(model, more, ones.expand(1, turn.shape[1] + 70), **with_cache(model, cache))
            assert torch.allclose(got, whole[:, -70:], atol=1e-9)
        assert 0 < handle.report().open_fraction() < 1


def stock_cache_keeps_its_length():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    cache.reset()
    return cache.get_seq_length() > 0


@pytest.mark.parametrize("change", ["crop", "crop_far", "reorder", "select", "repeat", "deepcopy", "pickle", "reset"])
def test_moments_follow_what_happens_to_the_cache(change):
    ids, mask = padded_batch((300, 300, 300), seed=4)
    model = tiny_model("llama").double()
    with patchattn.patch(model, policy(MomentGate(threshold=0.3)), record="timeline") as handle:
        cache = DynamicCache()
        forward(model, ids, mask, **with_cache(model, cache))
        rows, kept = torch.arange(3), 300
        if change == "crop":
            cache.crop(-20)
            kept = 280
        elif change == "crop_far":
            cache.crop(-200)
            kept = 100
        elif change == "reorder":
            rows = torch.tensor([2, 0, 0])
            cache.reorder_cache(rows)
        elif change == "select":
            rows = torch.tensor([2, 1])
            cache.batch_select_indices(rows)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2)
        elif change == "deepcopy":
            cache = copy.deepcopy(cache)
        elif change == "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        elif change == "reset":
            cache.reset()
            if stock_cache_keeps_its_length():
                pytest.skip("reset() of a stock dynamic cache keeps its length in this version of transformers (5.17)")
            assert cache.get_seq_length() == 0
            kept = 0
        more, _ = padded_batch((200,) * len(rows), seed=5)
        handle.reset_report()
        whole_mask = torch.ones(len(rows), kept + 200, dtype=torch.long)
        got = forward(model, more, whole_mask, **with_cache(model, cache))
        gates = recorded_gates(handle)
        handle.reset_report()
        want = forward(model, torch.cat([ids[rows, :kept], more], 1), whole_mask)[:, kept:]
        for layer, calls in recorded_gates(handle).items():
            assert torch.equal(calls[0][:, :, kept:], gates[layer][0])
    assert_mixed(gates)
    assert torch.allclose(got, want, atol=1e-9)


def snapshot(model):
    return {
        "modules": [name for name, _ in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "buffers": [name for name, _ in model.named_buffers()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
        "state": list(model.state_dict()),
    }


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_unpatch_gives_back_the_same_model(original):
    ids, mask = padded_batch()
    model = tiny_model("llama")
    model.set_attn_implementation(original)
    before, logits = snapshot(model), forward(model, ids, mask)
    handle = patchattn.patch(model, policy(MomentGate()))
    forward(model, ids, mask)
    assert patchattn.is_patched(model)
    patchattn.unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, ids, mask), logits)
    handle.unpatch()  # the second time does nothing
    assert handle.report().open_fraction() >= 0
    with pytest.raises(patchattn.PatchStateError, match="not patched"):
        patchattn.unpatch(model)


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=range(3)
)
def test_a_patch_is_undone_from_whichever_module_holds_the_layers(copied):
    model = tiny_model("llama")
    own = set(vars(model))
    patchattn.patch(model, policy(MomentGate()))
    twin = copied(model)
    assert "init_continuous_batching" in vars(twin)
    with pytest.raises(patchattn.PatchStateError, match="only a part"):
        patchattn.unpatch(twin.model.layers[0])
    patchattn.unpatch(twin.model)
    assert set(vars(twin)) == own
    assert not patchattn.is_patched(twin)
    assert patchattn.is_patched(model) == (twin is not model)
    patchattn.patch(twin.model)
    patchattn.unpatch(twin)
    assert set(vars(twin)) == own


def test_a_copy_of_a_part_of_a_patched_model_leaves_the_model_alone():
    model = tiny_model("llama")
    with patchattn.patch(model, policy(MomentGate())):
        patchattn.unpatch(copy.deepcopy(model.model))
        assert patchattn.is_patched(model)
        assert "init_continuous_batching" in vars(model)


def test_the_context_manager_undoes_after_an_exception():
    model = tiny_model("llama")
    before = snapshot(model)

    def fail():
        with patchattn.patch(model):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert snapshot(model) == before


@pytest.mark.parametrize("order", ["first in, first out", "last in, first out"])
def test_models_of_one_configuration_are_patched_and_unpatched_apart(order):
    ids, mask = padded_batch()
    models = [tiny_model("llama")]
    models.append(type(models[0])(models[0].config).eval())
    before, stock = [snapshot(model) for model in models], [forward(model, ids, mask) for model in models]
    patchattn.patch(models[0], policy(ClosedGate()))
    assert not patchattn.is_patched(models[1])
    assert torch.equal(forward(models[1], ids, mask), stock[1])  # although its configuration says patched
    handle = patchattn.patch(models[1], policy(OpenGate()))
    assert torch.allclose(forward(models[1], ids, mask)[mask.bool()], stock[1][mask.bool()], atol=1e-4)
    assert handle.report().open_fraction() == 1.0
    for at in (0, 1) if order.startswith("first") else (1, 0):
        closed = forward(models[0], ids, mask)
        assert torch.equal(closed, stock[0]) == (not patchattn.is_patched(models[0]))
        patchattn.unpatch(models[at])
        assert torch.equal(forward(models[at], ids, mask), stock[at])
    assert [snapshot(model) for model in models] == before


def test_what_is_held_of_a_patched_model_does_not_keep_the_configuration():
    model = tiny_model("llama")
    patchattn.patch(model)
    layer = model.model.layers[2]
    held = [layer, [copy.copy(part) for part in model.modules()]]
    del model.model.layers[2]
    patchattn.unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert held


def test_layers_that_came_after_the_patch_are_no_obstacle_to_undoing_it():
    model = tiny_model("llama")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    patchattn.patch(model)
    model.model.layers.append(tiny_model("llama", num_hidden_layers=4).model.layers[3])
    patchattn.unpatch(model)
    del model.model.layers[3]
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.config._attn_implementation == "sdpa"


def test_a_patch_that_breaks_off_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama")
    before, installed = snapshot(model), []

    def install(module):
        installed.append(module)
        if len(installed) == 2:
            raise MemoryError("simulated")
        return patchattn.hf.hooks.install_cache_hook(module)

    monkeypatch.setattr("patchattn.hf.patching.install_cache_hook", install)
    with pytest.raises(MemoryError):
        patchattn.patch(model)
    assert snapshot(model) == before
    assert not patchattn.is_patched(model)


def test_a_cache_that_is_handed_on_by_place_is_found():
    ids, mask = padded_batch((300,))
    model = tiny_model("llama")

    def by_place(module, args, kwargs):
        names = ["hidden_states", "position_embeddings", "attention_mask", *with_cache(module, None)]
        return tuple(kwargs.pop(name) for name in names), kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(by_place, with_kwargs=True)
    with patchattn.patch(model, policy(MomentGate(threshold=0.3))) as handle:
        generate(model, ids, mask)
    assert handle.report().layers[0]["decode"].gated_calls == 7
    assert handle.report().rebuilt_by_reason() == {}


def test_a_model_made_from_a_copy_of_a_patched_configuration_is_stock_and_can_be_patched():
    ids, mask = padded_batch()
    model = tiny_model("llama")
    with patchattn.patch(model):
        twin = type(model)(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    stock = forward(model, ids, mask)
    assert torch.equal(forward(twin, ids, mask), stock)
    with patchattn.patch(twin, policy(OpenGate())) as handle:
        assert torch.allclose(forward(twin, ids, mask)[mask.bool()], stock[mask.bool()], atol=1e-4)
    assert handle.report().open_fraction() == 1.0
    assert twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [{"window_size": -5}, {"min_bulk": "many"}, {"layers": ()}])
def test_a_policy_copied_with_a_wrong_value_is_refused_before_the_model_is_touched(wrong):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        patchattn.patch(model, Policy().model_copy(update=wrong))
    assert snapshot(model) == before


def test_a_patched_model_can_be_copied_and_pickled():
    ids, mask = padded_batch()
    model = tiny_model("llama")
    patchattn.patch(model, policy(MomentGate(threshold=0.3)))
    want = forward(model, ids, mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(forward(twin, ids, mask), want)
        patchattn.unpatch(twin)
    assert patchattn.is_patched(model)


def test_state_dict_and_saved_config_do_not_change(tmp_path):
    model = tiny_model("llama")
    names = list(model.state_dict())
    with patchattn.patch(model):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
    assert "patchattn" not in (tmp_path / "config.json").read_text()


def test_a_compiled_model_takes_the_same_path():
    ids, mask = padded_batch()
    model = tiny_model("llama")
    with patchattn.patch(model, policy(MomentGate(threshold=0.3))) as handle:
        want = forward(model, ids, mask)
        asked = handle.report().layers[0]["prefill"].asked
        handle.reset_report()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = forward(compiled, ids, mask, **with_cache(model, DynamicCache(config=model.config)))
        report = handle.report()
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-4)
    assert report.layers[0]["prefill"].asked == asked
    assert 0 < report.open_fraction() < 1


def test_dense_calls_are_counted_by_reason():
    model = tiny_model("llama")
    ids, mask = padded_batch((100,))
    stock = forward(model, ids, mask)
    causal = torch.ones(100, 100).tril().bool()[None, None]
    with patchattn.patch(model, policy(ClosedGate(), layers=(0,), phases=frozenset({"prefill"}))) as handle:
        assert torch.allclose(forward(model, ids, causal), stock, atol=1e-5)
        assert handle.report().dense_calls[0] == {"mask": 1}
        handle.reset_report()
        cache = DynamicCache()
        forward(model, ids, mask, **with_cache(model, cache))
        forward(model, ids[:, :1], torch.ones(1, 101), **with_cache(model, cache))
        report = handle.report()
    assert report.dense_calls == {0: {"phase": 1}, 1: {"layer": 2}, 2: {"layer": 2}}
    with patchattn.patch(model, policy(ClosedGate(), min_bulk=500)) as handle:
        assert torch.allclose(forward(model, ids, mask), stock, atol=1e-5)
    assert handle.report().dense_calls[1] == {"short": 1}


@pytest.mark.parametrize("make", ["dynamic", "static"])
def test_moments_stay_with_the_cache_through_generation(make):
    """Under whatever name this version of transformers hands the cache on: else each step would take them anew."""
    ids, mask = padded_batch((260, 240))
    model = tiny_model("llama")
    kwargs = {"cache_implementation": "static"} if make == "static" else {}
    with patchattn.patch(model, policy(MomentGate(threshold=0.3))) as handle:
        generate(model, ids, mask, **kwargs)
    report = handle.report()
    assert report.layers[0]["decode"].gated_calls == 7
    assert report.rebuilt_by_reason() == {}
    assert "from all keys again" not in str(report)


REBUILT = {
    "no cache": lambda model, cache, step: step(use_cache=False),
    "never kept": lambda model, cache, step: step(**with_cache(model, cache)),
    "other sizes": lambda model, cache, step: [step(**with_cache(model, cache)) for _ in range(2)],
    "taken back": lambda model, cache, step: (cache.crop(-40), step(**with_cache(model, cache))),
}


@pytest.mark.parametrize("reason", REBUILT)
def test_steps_that_take_moments_anew_are_counted_by_reason(reason):
    ids, mask = padded_batch((300,))
    model, cache = tiny_model("llama"), DynamicCache()
    if reason == "never kept":
        forward(model, ids, mask, **with_cache(model, cache))
    moments = policy(MomentGate(threshold=0.3))
    if reason in ("other sizes", "taken back"):
        with patchattn.patch(model, moments if reason == "taken back" else policy(MomentGate(), window_size=16)):
            forward(model, ids, mask, **with_cache(model, cache))

    def step(**kwargs):
        with torch.no_grad():
            model(ids[:, :1] if kwargs.get("use_cache", True) else ids, **kwargs)

    if reason == "no cache":
        # A step without a cache has no keys before it: only an engine that keeps keys elsewhere makes such a call.
        cached = DynamicCache()
        forward(model, ids, mask, **with_cache(model, cached))

        def step(**kwargs):
            hook = model.model.layers[0].self_attn.register_forward_pre_hook(
                lambda module, args, given: (args, {**given, "patchattn_cache": None}), with_kwargs=True
            )
            forward(model, ids[:, :1], torch.ones(1, 301), **with_cache(model, cached))
            hook.remove()

    with patchattn.patch(model, moments) as handle:
        REBUILT[reason](model, cache, step)
    report = handle.report()
    counts = report.rebuilt[0]
    assert counts == {reason: 1}
    assert f"1 ({reason})" in str(report) or f"3 ({reason})" in str(report)
    assert report.to_dict()["rebuilt"]["0"] == counts


def test_packed_sequences_stay_apart():
    model = tiny_model("llama")
    ids, _ = padded_batch((200,))
    position_ids = torch.cat([torch.arange(120), torch.arange(80)])[None]
    with torch.no_grad():
        stock = model(ids, position_ids=position_ids, use_cache=False).logits
        with patchattn.patch(model, policy(ClosedGate())) as handle:
            got = model(ids, position_ids=position_ids, use_cache=False).logits
    assert torch.equal(got, stock)
    assert handle.report().dense_calls[0] == {"mask": 1}


@pytest.mark.parametrize(
    "gate_and_bulk",
    [(MomentGate(threshold=0.3, estimate="saturating"), 0), (MomentGate(threshold=0.3), 60), (OpenGate(), 4096)],
    ids=["gated", "partly below break-even", "dense"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_the_host_knows_of_a_plain_call_changes_nothing(gate_and_bulk, batch, monkeypatch):
    """Prefill, a second prefill and decode: the same logits and the same counts as with the layout read back."""
    gate, min_bulk = gate_and_bulk
    ids, mask = padded_batch((330,) * batch, seed=6)
    model = tiny_model("qwen2").double()
    seen = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr("patchattn.hf.mask._is_plain", lambda *_: False)
        with patchattn.patch(model, policy(gate, min_bulk=min_bulk)) as handle:
            cache = DynamicCache()
            logits = [
                forward(model, ids[:, begin:end], mask[:, :end], **with_cache(model, cache))
                for begin, end in ((0, 300), (300, 320), *((at, at + 1) for at in range(320, 330)))
            ]
            report = handle.report().to_dict()
        seen.append((torch.cat(logits, 1), report))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=1e-10)
    assert seen[0][1] == seen[1][1]
    assert any(seen[0][1]["dense_calls"]["0"].values()) == (min_bulk == 4096)
