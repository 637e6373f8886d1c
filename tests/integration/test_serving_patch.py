"""Patching, copying and undoing around continuous batching; what can't be served is refused before anything starts."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

sys.path.insert(0, str(Path(__file__).parent))

from serving import MIXED, PROMPTS, alone, config, finished, greedy, policy, prompt, running, serve, tokens
from test_patching import snapshot

import patchattn
from patchattn import ClosedGate, PatchStateError, UnsupportedCallError
from patchattn.testing import tiny_model

KEPT = "_cached_continuous_batching_manager"


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def patched(model: Any, gate: Any = MIXED, **given: Any) -> Any:
    return patchattn.patch(model, policy(gate), **({"backend": "blockwise"} | given))


@pytest.mark.parametrize("original", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_unpatch_gives_back_the_same_model(model, original):
    model.set_attn_implementation(original)
    stock, before = tokens(serve(model, PROMPTS)), snapshot(model)
    with patched(model):
        gated = tokens(serve(model, PROMPTS))
        assert gated == [alone(model, each) for each in PROMPTS]
    assert snapshot(model) == before
    assert tokens(serve(model, PROMPTS)) == stock != gated
    assert not hasattr(serve(model, PROMPTS)[0], "gates")


def test_unpatch_waits_for_the_manager_to_stop(model):
    handle = patched(model)
    with running(model) as manager:
        for undo in (handle.unpatch, lambda: patchattn.unpatch(model)):
            with pytest.raises(PatchStateError, match=r"stop the manager first: manager.stop\(block=True\)"):
                undo()
        assert patchattn.is_patched(model)
        name = manager.add_request(PROMPTS[0])
        want = finished(manager, {name})[name].generated_tokens
    assert want == alone(model, PROMPTS[0])
    handle.unpatch()
    assert not patchattn.is_patched(model)


def test_a_manager_ends_with_its_patch(model):
    handle = patched(model)
    manager = model.init_continuous_batching(greedy(), config())
    handle.unpatch()
    for gate in (None, ClosedGate()):
        if gate is not None:
            patched(model, gate)
        try:
            with pytest.raises(PatchStateError, match="made for is undone"):
                manager.start()
        finally:
            manager.stop(block=True, hard_stop=True)  # a thread that runs would keep the process
    assert tokens(serve(model, PROMPTS)) == [alone(model, each) for each in PROMPTS]


def test_a_manager_that_was_kept_serves_on_and_ends_with_its_patch(model):
    handle = patched(model)
    want = [alone(model, each) for each in PROMPTS]
    for _ in range(2):
        assert tokens(serve(model, PROMPTS, persistent_manager=True)) == want
        assert model.init_continuous_batching() is getattr(model, KEPT)
        assert [alone(model, each) for each in PROMPTS] == want
    handle.unpatch()
    assert not hasattr(model, KEPT)


@pytest.mark.slow
def test_the_room_of_a_manager_that_was_kept_is_that_of_an_empty_cache(model):
    with patched(model):
        for seed in range(3):
            found = serve(model, [prompt(240, seed)], num_blocks=16, allow_block_sharing=True, persistent_manager=True)
            assert tokens(found) == [alone(model, prompt(240, seed))]


@pytest.mark.slow
def test_a_manager_from_before_the_patch_is_refused(model):
    serve(model, PROMPTS, persistent_manager=True)
    handle = patched(model)
    with pytest.raises(PatchStateError, match="destroy_cached_continuous_batching_manager"):
        serve(model, PROMPTS)
    handle.unpatch()
    assert getattr(model, KEPT) is model.init_continuous_batching()
    patched(model)
    model.destroy_cached_continuous_batching_manager()
    assert tokens(serve(model, PROMPTS)) == [alone(model, each) for each in PROMPTS]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=range(2))
@pytest.mark.slow
def test_a_copy_serves_by_itself(model, copied):
    handle = patched(model)
    want = [alone(model, each) for each in PROMPTS]
    twin = copied(model)
    handle.reset_report()
    assert tokens(serve(twin, PROMPTS)) == want
    assert handle.report().open_fraction() != handle.report().open_fraction()  # nothing was asked here
    with running(model):
        patchattn.unpatch(twin)
    assert "init_continuous_batching" not in vars(twin)
    assert tokens(serve(model, PROMPTS)) == want


@pytest.mark.slow
def test_two_models_are_served_at_once(model):
    other = tiny_model("qwen3")
    with patched(model) as one, patched(other, ClosedGate()) as two:
        want = {each: [alone(each, text) for text in PROMPTS] for each in (model, other)}
        with running(model) as first, running(other) as second:
            names = [(each, each.add_request(text)) for text in PROMPTS for each in (first, second)]
            found = {each: finished(each, {name for of, name in names if of is each}) for each in (first, second)}
            for each, manager in ((model, first), (other, second)):
                outputs = [found[manager][name] for of, name in names if of is manager]
                assert tokens(outputs) == want[each]
        assert one.report().open_fraction() > 0.5
        assert two.report().open_fraction() == 0.0


def test_generate_between_and_while_serving(model):
    with patched(model):
        want = [alone(model, each, 20) for each in PROMPTS]
        with running(model, 20) as manager:
            for _ in range(2):
                names = [manager.add_request(each) for each in PROMPTS]
                assert [alone(model, each, 20) for each in PROMPTS] == want
                found = finished(manager, set(names))
                assert tokens([found[name] for name in names]) == want
            with manager.pause():
                assert [alone(model, each, 20) for each in PROMPTS] == want


@pytest.mark.slow
def test_serving_in_inference_mode_and_in_a_thread_of_its_own(model):
    with patched(model):
        want = [alone(model, each) for each in PROMPTS]
        with torch.inference_mode():
            assert tokens(serve(model, PROMPTS)) == want
        found = []
        thread = threading.Thread(target=lambda: found.extend(tokens(serve(model, PROMPTS))))
        thread.start()
        thread.join()
        assert found == want


@pytest.mark.slow
def test_a_patched_model_is_not_patched_again(model):
    handle = patched(model)
    with pytest.raises(PatchStateError, match="already"):
        patched(model)
    assert tokens(serve(model, PROMPTS)) == [alone(model, each) for each in PROMPTS]
    handle.unpatch()
    with patched(model, ClosedGate()):
        assert [output.gates.open_fraction() for output in serve(model, PROMPTS)] == [0.0] * len(PROMPTS)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        pytest.param({"backend": "flex"}, "no log-sum-exp on a CPU", marks=pytest.mark.slow),
        ({"record": "timeline"}, "decisions of one text"),
    ],
)
def test_patches_that_are_refused(model, given, match):
    with patched(model, **given), pytest.raises(UnsupportedCallError, match=match):
        model.init_continuous_batching()


@pytest.mark.parametrize(
    "fields",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"use_async_batching": True},
        {"varlen_compile_config": CompileConfig()},
        {"decode_compile_config": CompileConfig()},
        {"default_compile_level": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_configurations_that_are_refused(model, fields):
    with patched(model):
        with pytest.raises(UnsupportedCallError, match=next(iter(fields))):
            serve(model, PROMPTS, **fields)
        generation = greedy()
        generation.continuous_batching_config = config(**fields)
        with pytest.raises(UnsupportedCallError, match=next(iter(fields))):
            model.init_continuous_batching(generation)


def test_a_configuration_may_say_no_to_what_would_be_refused(model):
    off = {"use_cuda_graph": False, "use_async_batching": False, "default_compile_level": 0}
    with patched(model):
        assert tokens(serve(model, PROMPTS, **off)) == [alone(model, each) for each in PROMPTS]


def test_a_model_that_would_be_compiled_is_refused(model):
    # The engine takes this one where its own configuration says nothing.
    model.config.compile_config = CompileConfig()
    with patched(model), pytest.raises(UnsupportedCallError, match="varlen_compile_config"):
        model.init_continuous_batching(greedy(), config())


def test_the_configuration_may_come_with_that_of_generation(model):
    generation = greedy()
    generation.continuous_batching_config = config(num_blocks=33)
    with patched(model):
        manager = model.init_continuous_batching(generation)
        assert manager.continuous_batching_config.num_blocks == 33
        assert model.init_continuous_batching(greedy(), config()).continuous_batching_config.num_blocks == 64


@pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention"])
def test_layers_without_pages_are_refused(model, kind):
    with patched(model):
        model.config.layer_types = [kind, "full_attention", "full_attention"]
        with pytest.raises(UnsupportedCallError, match=f"no pages for layers of {kind}"):
            model.init_continuous_batching()


def test_a_request_larger_than_the_cache_fails_alone(model):
    with patched(model):
        outputs = serve(model, [prompt(250), *PROMPTS[1:], prompt(249)], num_blocks=16)
        assert outputs[0].error == (
            "The request needs 257 tokens of cache for a prompt of 250 and 8 new ones; the cache holds 256. "
            "Shorten it, ask for fewer new tokens, or serve with more blocks."
        )
        assert outputs[0].gates.asked == {"prefill": 0, "decode": 0}
        assert tokens(outputs[1:]) == [alone(model, each) for each in (*PROMPTS[1:], prompt(249))]


def test_prompts_that_cannot_be_read_fail_alone(model):
    with patched(model):
        outputs = serve(model, [[], [5, 1000], [-1, 5], *PROMPTS])
        said = "The prompt's tokens go from {}; the model knows 0 to 127. Make them with the model's own tokenizer."
        assert [output.error for output in outputs[:3]] == [
            "The prompt is empty. Give it at least one token.",
            said.format("5 to 1,000"),
            said.format("-1 to 5"),
        ]
        assert tokens(outputs[3:]) == [alone(model, each) for each in PROMPTS]


@pytest.mark.slow
def test_without_a_limit_a_request_ends_where_the_cache_does(model):
    with patched(model):
        (short,) = serve(model, [prompt(230)], None, num_blocks=16)
        assert tokens([short]) == [alone(model, prompt(230), 256 - 230 + 1)]
        (exact, longer) = serve(model, [prompt(256), prompt(257)], None, num_blocks=16)
        assert tokens([exact]) == [alone(model, prompt(256), 1)]
        assert "needs 257 tokens of cache" in longer.error


@pytest.mark.slow
def test_both_without_a_limit_and_evicted(model):
    with patched(model):
        outputs = serve(model, [prompt(150), prompt(140, 1)], None, num_blocks=20)
        want = [alone(model, prompt(150), 320 - 150 + 1), alone(model, prompt(140, 1), 320 - 140 + 1)]
        assert tokens(outputs) == want
