"""Compiled models: one graph without breaks, no recompilation as lengths grow, and the path that CUDA devices take."""

import copy
import functools
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, Policy
from patchattn.backends import flex
from patchattn.backends.flex import compiled as flex_compiled
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.hf.architecture import with_cache
from patchattn.hf.cache import COMPILED_CALLS_CAN_TRACK
from patchattn.moments.gaussian import CHUNK
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.testing import assert_within_budget, recorded_gates, replay_gates, tiny_model

SINK, WINDOW = 4, 32
MOMENTS = MomentGate(threshold=0.2, estimate="saturating")


def policy(gate, **fields):
    return Policy(**({"sink_size": SINK, "window_size": WINDOW, "min_bulk": 0, "gate": gate} | fields))


def tokens(length, batch=2, seed=0):
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def forward(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def make_cache(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=480)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


def assert_gated(report, phases=("prefill", "decode")):
    for phase in phases:
        assert 0 < report.open_fraction(phase) < 1
    assert not any(report.dense_calls.values())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.WARNING)  # pytest would format and keep every line
    yield
    trace.setLevel(level)
    flex_compiled.forget()
    torch.compiler.reset()


needs_tracking_in_graphs = pytest.mark.skipif(
    not COMPILED_CALLS_CAN_TRACK, reason="a compiled first call keeps no moments before torch 2.13"
)


def moments_of(entry):
    return entry._patchattn_moments


def assert_moments_equal_recomputation(cache, length):
    """What the cache carries after `length` tokens is what a pass over its keys gives."""
    for entry in cache.layers:
        keys = entry.keys[:, :, :length]
        regions = Regions.of(
            torch.ones(keys.shape[0], length), query_length=1, sink_size=SINK, window_size=WINDOW, query_slot=length - 1
        )
        query = keys.repeat_interleave(3, 1)[:, :, -1:]
        _, want = bulk_log_mass_from_prompt(AttentionInputs(query, keys, keys, regions, 1.0))
        got = moments_of(entry)
        assert torch.equal(got.chunks, want.chunks)
        assert (got.chunks == (length - SINK - WINDOW) // CHUNK).all()
        for part in ("count", "reference", "total", "outer"):
            assert torch.allclose(getattr(got, part), getattr(want, part), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "prefill"),
    [
        ("static", "eager"),
        pytest.param("static", "compiled", marks=needs_tracking_in_graphs),
        ("dynamic", "eager"),
        pytest.param("lazy", "compiled", marks=needs_tracking_in_graphs),
    ],
)
def test_decode_over_growing_lengths_compiles_nothing_after_warm_up(kind, prefill):
    ids, first, last = tokens(424), 412, 424  # the third chunk of bulk keys is complete at 420
    model = tiny_model("llama", num_hidden_layers=1).double()
    counter = CompileCounterWithBackend("eager")
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        want = forward(model, ids)
        handle.reset_report()
        cache = make_cache(kind, model)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        start = forward(compiled if prefill == "compiled" else model, ids[:, :first], **with_cache(model, cache))
        assert torch.allclose(start, want[:, :first], atol=1e-9)
        for entry in cache.layers:
            assert (moments_of(entry).chunks == 2).all()
        seen = []
        for at in range(first, last):
            got = forward(compiled, ids[:, at : at + 1], **with_cache(model, cache))
            assert torch.allclose(got, want[:, at : at + 1], atol=1e-9)
            seen.append(counter.frame_count)
        assert_gated(handle.report())
    # The second call of a dynamic cache makes its length a symbol, as without the patch.
    assert seen[2] == seen[-1] <= 3
    assert_moments_equal_recomputation(cache, last)


@needs_tracking_in_graphs
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_rows_of_a_cache_whose_first_call_was_compiled_are_followed(kind):
    ids, rows = tokens(400, batch=3), torch.tensor([2, 0, 0])
    model = tiny_model("llama", num_hidden_layers=1).double()
    with patchattn.patch(model, policy(MOMENTS)):
        cache = make_cache(kind, model)
        forward(torch.compile(model, backend="eager", fullgraph=True), ids, **with_cache(model, cache))
        cache.reorder_cache(rows)
        assert_moments_equal_recomputation(cache, 400)
        more = tokens(30, batch=3, seed=1)
        want = forward(model, torch.cat([ids[rows], more], 1))[:, 400:]
        assert torch.allclose(forward(model, more, **with_cache(model, cache)), want, atol=1e-9)
        copied = copy.deepcopy(cache)
        cache.reset()
        assert moments_of(cache.layers[0]) is None
        assert moments_of(copied.layers[0]) is not None


def test_moments_of_a_static_cache_stay_in_place():
    """A CUDA graph finds them where they were when it was recorded, whatever comes between two steps."""
    ids, others = tokens(432), tokens(432, seed=1)
    model = tiny_model("llama", num_hidden_layers=1).double()
    with patchattn.patch(model, policy(MOMENTS)):
        want = forward(model, ids, use_cache=False)[:, 412:]
        cache, step = make_cache("static", model), torch.compile(model, backend="eager", fullgraph=True)
        forward(model, ids[:, :412], **with_cache(model, cache))
        kept, copied = [parts_of(cache)], copy.deepcopy(cache)
        # Steps that are not compiled before and after those that are, which complete a chunk of keys at 420.
        runs = [model, *[step] * 18, model]
        got = [forward(run, ids[:, at : at + 1], **with_cache(model, cache)) for at, run in enumerate(runs, 412)]
        assert torch.allclose(torch.cat(got, 1), want, atol=1e-9)
        assert (moments_of(copied.layers[0]).chunks == 2).all()
        kept.append(parts_of(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        assert_moments_equal_recomputation(cache, 432)
        kept.append(parts_of(cache))
        cache.reset()
        forward(model, others[:, :300], **with_cache(model, cache))
        assert_moments_equal_recomputation(cache, 300)
        kept.append(parts_of(cache))
    assert all(a is b for after in kept[1:] for a, b in zip(kept[0], after, strict=True))


@needs_tracking_in_graphs
def test_moments_of_a_static_cache_have_a_place_before_the_first_compiled_step():
    ids, model = tokens(432), tiny_model("llama", num_hidden_layers=1).double()
    with patchattn.patch(model, policy(MOMENTS, phases=("decode",))) as handle:
        cache, step = make_cache("static", model), torch.compile(model, backend="eager", fullgraph=True)
        forward(model, ids[:, :412], **with_cache(model, cache))
        assert handle.report().dense_calls[0] == {"phase": 1}
        places = cache.layers[0]._patchattn_places
        for at in range(412, 432):
            forward(step, ids[:, at : at + 1], **with_cache(model, cache))
        assert_moments_equal_recomputation(cache, 432)
        assert handle.report().rebuilt[0] == {"never kept": 1}
    assert all(a is b for a, b in zip(places, parts_of(cache), strict=True))
    assert all(place._dynamo_static_input_type == "unguarded" for place in places)


def parts_of(cache):
    return [part for entry in cache.layers for part in moments_of(entry).parts]


def test_a_compiled_call_without_a_cache_is_gated():
    ids = tokens(420)
    model = tiny_model("qwen3", num_hidden_layers=1).double()
    counter = CompileCounterWithBackend("eager")
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        want = forward(model, ids, use_cache=False)
        handle.reset_report()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for length in (420, 400, 300):
            got = forward(compiled, ids[:, :length], use_cache=False)
            assert torch.allclose(got, want[:, :length], atol=1e-9)
        assert_gated(handle.report(), ["prefill"])
        embedded = forward(compiled, None, inputs_embeds=model.model.embed_tokens(ids).detach(), use_cache=False)
        assert torch.allclose(embedded, want, atol=1e-9)
        assert_gated(handle.report(), ["prefill"])
        frames = counter.frame_count
        # Positions of the caller's own could be those of packed sequences: dense, and counted.
        forward(compiled, ids, position_ids=torch.arange(420)[None], use_cache=False)
        assert handle.report().dense_calls[0] == {"mask": 1}
    # One graph for the first length, one for all others of as many chunks, one for embeddings, one for positions.
    assert frames <= 3
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_compiled_step_is_compiled_once_for_prompts_of_any_length(family):
    model = tiny_model(family, num_hidden_layers=1)
    counter = CompileCounterWithBackend("eager")
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        step = torch.compile(model, backend=counter, fullgraph=True)
        for length in (200, 300, 430):
            cache, ids = StaticCache(config=model.config, max_cache_len=480), tokens(length, batch=1)
            forward(model, ids, **with_cache(model, cache))
            positions = torch.tensor([[length]])
            forward(step, tokens(1, batch=1), **with_cache(model, cache), position_ids=positions)
        assert_gated(handle.report(), ["decode"])
    assert counter.frame_count == 1


def test_generate_compiles_decode_by_itself():
    from transformers import CompileConfig

    ids = tokens(400)
    model = tiny_model("llama", num_hidden_layers=1)
    graphs = torch._dynamo.utils.counters["stats"]
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True  # transformers leaves CPU out
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    static = {"cache_implementation": "static", "compile_config": settings}
    stock = model.generate(ids, **options)
    with patchattn.patch(model, policy(OpenGate())):
        assert torch.equal(model.generate(ids, **options, **static), stock)
    # transformers keeps the compiled call with the model, over patch and unpatch.
    assert torch.equal(model.generate(ids, **options, **static), stock)
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        want = model.generate(ids, **options)
        handle.reset_report()
        before = graphs["unique_graphs"]
        assert torch.equal(model.generate(ids, **options, **static), want)
        assert_gated(handle.report())
        assert graphs["unique_graphs"] == before + 1
        assert torch.equal(model.generate(ids, **options, **static), want)
        assert graphs["unique_graphs"] == before + 1
    assert torch.equal(model.generate(ids, **options, **static), stock)
    assert not torch.equal(want, stock)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, 2.13
def test_inductor():
    ids = tokens(300)
    model = tiny_model("llama", num_hidden_layers=1)
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        want = forward(model, ids)
        handle.reset_report()
        cache = StaticCache(config=model.config, max_cache_len=320)
        start = forward(model, ids[:, :290], **with_cache(model, cache))
        compiled = torch.compile(model, fullgraph=True)
        steps = [forward(compiled, ids[:, at : at + 1], **with_cache(model, cache)) for at in range(290, 300)]
        assert_gated(handle.report())
    assert torch.allclose(torch.cat([start, *steps], 1), want, atol=1e-4)


def through_cuda_path(handle):
    """Let a patched model attend as it would on a CUDA device: two passes of FlexAttention, merged by log-sum-exp."""
    for state in handle.states.values():
        state.attend = functools.partial(flex.attend_with, compiler="aot_eager")
        state.weighed = functools.partial(flex.weigh_and_attend_with, compiler="aot_eager")


def padded(lengths=(300, 243)):
    ids = tokens(max(lengths), batch=len(lengths), seed=2)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids * mask, mask


def prefill_and_decode(model, ids, mask):
    """Read all but the last three tokens at once and those one by one; returns the logits of the real tokens."""
    cache, cut = DynamicCache(config=model.config), ids.shape[1] - 3
    logits = [forward(model, ids[:, :cut], attention_mask=mask[:, :cut], **with_cache(model, cache))]
    for end in range(cut + 1, ids.shape[1] + 1):
        step = {"attention_mask": mask[:, :end], **with_cache(model, cache)}
        logits.append(forward(model, ids[:, end - 1 : end], **step))
    return torch.cat(logits, 1)[mask.bool()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cuda_path_of_flex(dtype):
    batch = padded()
    # All in one test: the families' calls are of one kind, which takes long to compile.
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        model = tiny_model(family, dtype=dtype)
        double = copy.deepcopy(model).double()
        for gate in (OpenGate(), ClosedGate(), MOMENTS):
            with patchattn.patch(model, policy(gate), record="timeline") as handle:
                through_cuda_path(handle)
                got = prefill_and_decode(model, *batch)
            gates, report = recorded_gates(handle), handle.report()
            if gate is MOMENTS:
                assert_gated(report)
            else:
                assert report.open_fraction() == float(isinstance(gate, OpenGate))
                assert not any(report.dense_calls.values())
            results = []
            for twin in (model, double):
                with patchattn.patch(twin, policy(gate), backend="reference") as handle:
                    replay_gates(handle, gates)
                    results.append(prefill_and_decode(twin, *batch))
            assert_within_budget(got, *results, what=f"{family}, {gate.kind}")
            if isinstance(gate, OpenGate):
                stock = [prefill_and_decode(twin, *batch) for twin in (model, double)]
                assert_within_budget(got, *stock, what=f"{family}, stock")
    # Of a prefill and of a decode step, with given gates and with such that are weighed.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
def test_the_cuda_path_of_flex_inside_a_compiled_model():
    ids = tokens(300)
    model = tiny_model("llama", num_hidden_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        want = forward(model, ids)
        handle.reset_report()
        cache = StaticCache(config=model.config, max_cache_len=320)
        logits = [forward(model, ids[:, :290], **with_cache(model, cache))]
        through_cuda_path(handle)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        logits += [forward(compiled, ids[:, at : at + 1], **with_cache(model, cache)) for at in range(290, 300)]
        assert_gated(handle.report())
    assert counter.frame_count == 1
    assert torch.allclose(torch.cat(logits, 1), want, atol=1e-4)


@pytest.mark.parametrize(("path", "of_each_layer"), [("own", 0), ("cuda", 1)])  # the order of the open rows
def test_a_compiled_model_computes_what_its_layers_share_once(path: str, of_each_layer: int):
    def sums(layers: int) -> int:
        found = []

        def keep(graph, _):
            found.append(sum("cumsum" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        model = tiny_model("llama", num_hidden_layers=layers)
        with patchattn.patch(model, policy(ClosedGate())) as handle:
            if path == "cuda":
                through_cuda_path(handle)
            forward(torch.compile(model, backend=keep, fullgraph=True), tokens(100), use_cache=False)
        assert len(found) == 1
        return found[0]

    once = sums(1) - of_each_layer
    assert once > 0
    assert sums(2) == once + 2 * of_each_layer


def test_inputs_of_the_moments_helper_are_what_the_backends_get():
    """The recomputation above is on the grid that the model's calls use."""
    ids = tokens(300)
    model = tiny_model("llama", num_hidden_layers=1).double()
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        cache, seen = DynamicCache(), []
        state = handle.states[0]
        attend = state.attend

        def watch(inputs: AttentionInputs, *rest):
            seen.append(inputs)
            return attend(inputs, *rest)

        state.attend = watch
        forward(model, ids, **with_cache(model, cache))
    assert torch.equal(seen[0].key, cache.layers[0].keys)
    assert_moments_equal_recomputation(cache, 300)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_timeline_recorded_in_a_graph_compiles_nothing_more(backend):
    ids = tokens(320)
    model = tiny_model("llama", num_hidden_layers=2)
    counter = CompileCounterWithBackend(backend)
    with patchattn.patch(model, policy(MOMENTS), record="timeline") as handle:
        forward(model, ids)
        want = recorded_gates(handle)
        handle.reset_report()
        cache = StaticCache(config=model.config, max_cache_len=330)
        forward(model, ids[:, :300], **with_cache(model, cache))
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        seen = []
        for at in range(300, 320):
            forward(compiled, ids[:, at : at + 1], **with_cache(model, cache))
            seen.append(counter.frame_count)
        got = recorded_gates(handle)
    assert seen[0] == seen[-1] == 1
    assert_gated(handle.report())
    for layer, calls in want.items():
        assert len(got[layer]) == 21
        assert torch.equal(torch.cat(got[layer], 2), calls[0])


def test_another_patch_of_a_compiled_model_compiles_no_more_for_its_timeline():
    ids, counts = tokens(60), {}
    for record in ("summary", "timeline"):
        model, counter = tiny_model("llama", num_hidden_layers=1), CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter)
        for _ in range(4):
            with patchattn.patch(model, policy(OpenGate()), record=record) as handle:
                forward(compiled, ids)
                assert len(handle.report().timeline[0]) == (record == "timeline")
        counts[record] = counter.frame_count
        torch.compiler.reset()
    assert counts["timeline"] == counts["summary"] < 4


@pytest.mark.slow
def test_a_timeline_outlives_the_memory_of_its_graph():
    ids = tokens(400, batch=1)
    model = tiny_model("llama", num_hidden_layers=2)
    gate, timelines = MomentGate(threshold=0.99999), []
    for is_compiled in (False, True):
        with patchattn.patch(model, policy(gate), backend="reference", record="timeline") as handle:
            forward(torch.compile(model, backend="inductor") if is_compiled else model, ids)
            timelines.append(recorded_gates(handle))
    for layer, (opened,) in timelines[0].items():
        assert opened.any()
        assert (opened != timelines[1][layer][0]).float().mean() < 0.001  # rounding near the threshold


def test_a_copy_of_a_model_keeps_a_timeline_of_its_own():
    ids = tokens(40)
    model = tiny_model("llama", num_hidden_layers=1)
    with patchattn.patch(model, policy(MOMENTS), record="timeline") as handle:
        twin = copy.deepcopy(model)
        forward(torch.compile(twin, backend="eager", fullgraph=True), ids)
        assert not handle.report().timeline[0]
        assert len(twin.model.layers[0].self_attn.patchattn_layer.timeline) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "gemma4_text"])
def test_generate_compiles_a_static_step_as_often_as_the_stock_model(family, monkeypatch):
    """The sliding layers run the model's own attention, found at patch time and not looked up in the graph."""
    model = tiny_model(family)
    # transformers compiles on accelerators only.
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_, **__: True)
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "compile_config": compiling}
    ids = tokens(60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    stock = model.generate(ids, attention_mask=mask, **kwargs)
    graphs = counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    counters.clear()
    with patchattn.patch(model, policy(OpenGate())) as handle:
        assert torch.equal(model.generate(ids, attention_mask=mask, **kwargs), stock)
    assert counters["stats"]["unique_graphs"] == graphs >= 1
    assert handle.report().open_fraction("decode") == 1.0
