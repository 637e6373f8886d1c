"""Any sequence of things that users do with a patched model and its caches, found by hypothesis.

Three conversations at a time share one model, each with a cache, and the machine remembers only the tokens that every
cache should hold. After each step the model's answer is compared with what a fresh run over those tokens gives: on the
stock model when gates are open, on the `reference` backend with the recorded gates replayed when they are mixed.
"""

from __future__ import annotations

import copy
import pickle
import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, cache_utils

import patchattn
from patchattn import MomentGate, OpenGate, Policy
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.hf import cache as tracking
from patchattn.hf.architecture import with_cache
from patchattn.moments.gaussian import CHUNK
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.testing import gates_of_chunks, recorded_gates, replay_gates, tiny_model

SINK, WINDOW, LONGEST = 4, 16, 700
PAIRS_AT_ODDS = 1e-9
"""How far logits of float64 models may lie apart; a decision that differs shows far more."""

SLOTS = st.integers(0, 2)
SEEDS = st.integers(0, 2**16)
LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 60, 128, 148, 149, 200])


def policy(gate):
    return Policy(sink_size=SINK, window_size=WINDOW, min_bulk=0, gate=gate)


class Conversation:
    """A cache and the tokens that it should hold, [batch, length]."""

    def __init__(self, cache, tokens):
        self.cache, self.tokens = cache, tokens

    @property
    def length(self):
        return self.tokens.shape[1]

    @property
    def is_dynamic(self):
        return isinstance(self.cache, DynamicCache)


class PatchedModel(RuleBasedStateMachine):
    """A patched float64 model; the subclasses say which gate it has and how many layers."""

    gate = None
    layers = 1

    @initialize(family=st.sampled_from(["llama", "qwen3"]))
    def start(self, family):
        self.model = tiny_model(family, num_hidden_layers=self.layers, num_attention_heads=4, hidden_size=64).double()
        self.stock = copy.deepcopy(self.model)
        self.handle = patchattn.patch(self.model, policy(self.gate), record="timeline")
        self.talks: list[Conversation | None] = [None, None, None]

    def teardown(self):
        if hasattr(self, "handle") and patchattn.is_patched(self.model):
            patchattn.unpatch(self.model)

    def talk(self, slot):
        return self.talks[slot] or next((talk for talk in self.talks if talk), None)

    def run(self, model, tokens, cache=None):
        with torch.no_grad():
            return model(tokens, **with_cache(model, cache), use_cache=cache is not None).logits

    def check(self, talk, new, got):
        """Compare the logits of a call with those of one call over everything, and its decisions too."""
        whole = torch.cat([talk.tokens, new], 1)
        calls = recorded_gates(self.handle)
        if isinstance(self.gate, OpenGate):
            want = self.run(self.stock, whole)
        else:
            with patchattn.patch(self.stock, policy(self.gate), backend="reference", record="timeline") as fresh:
                want = self.run(self.stock, whole)
                gates = recorded_gates(fresh)
                for layer, (opened,) in calls.items():
                    _, now = gates_of_chunks(gates[layer], [talk.length, new.shape[1]])
                    assert torch.equal(opened, now), "a decision depends on how the tokens came into the cache"
                replay_gates(fresh, gates)
                want = self.run(self.stock, whole)
        error = (got - want[:, talk.length :]).abs().max().item()
        assert error < PAIRS_AT_ODDS, error
        talk.tokens = whole
        self.handle.reset_report()

    # What is asked of the model.

    @rule(slot=SLOTS, kind=st.sampled_from(["dynamic", "lazy", "static"]), rows=st.integers(1, 3), seed=SEEDS)
    def switch_cache(self, slot, kind, rows, seed):
        """Begin a conversation, with a prompt that reaches beyond the first chunk of bulk keys."""
        caches = {
            "dynamic": lambda: DynamicCache(config=self.model.config),
            "lazy": DynamicCache,
            "static": lambda: StaticCache(config=self.model.config, max_cache_len=LONGEST),
        }
        talk = self.talks[slot] = Conversation(caches[kind](), torch.zeros(rows, 0, dtype=torch.long))
        self.say(talk, 160 + seed % 150, seed)

    def say(self, talk, length, seed):
        new = torch.randint(2, 128, (talk.tokens.shape[0], length), generator=torch.Generator().manual_seed(seed))
        self.check(talk, new, self.run(self.model, new, talk.cache))

    @rule(slot=SLOTS, length=LENGTHS, seed=SEEDS)
    def carry_on(self, slot, length, seed):
        """Continue a conversation; those in other slots interleave."""
        talk = self.talk(slot)
        if talk and talk.length + length <= LONGEST:
            self.say(talk, length, seed)

    @rule(slot=SLOTS, new=st.integers(1, 4))
    def generate(self, slot, new):
        """Generate greedily from the cache; the answer is what a fresh run over prompt and answer would choose."""
        talk = self.talk(slot)
        if not talk or talk.length + new + 2 > LONGEST:
            return
        prompt = torch.cat([talk.tokens, torch.full((talk.tokens.shape[0], 2), 7)], 1)
        given = {"attention_mask": torch.ones_like(prompt), **with_cache(self.model, talk.cache)}
        got = self.model.generate(prompt, max_new_tokens=new, do_sample=False, disable_compile=True, **given)
        self.handle.reset_report()
        model = self.stock if isinstance(self.gate, OpenGate) else self.model
        want = self.run(model, got[:, :-1])[:, prompt.shape[1] - 1 :].argmax(-1)
        assert torch.equal(got[:, prompt.shape[1] :], want)
        self.handle.reset_report()
        talk.tokens = got[:, :-1]  # the last token has not been read yet

    # What is done to a cache.

    @rule(slot=SLOTS, count=st.sampled_from([1, 5, 15, 16, 17, 40, 130, 200]))
    def crop(self, slot, count):
        talk = self.talk(slot)
        if talk and talk.is_dynamic and count < talk.length:
            talk.cache.crop(-count)
            talk.tokens = talk.tokens[:, :-count]

    @rule(slot=SLOTS, length=LENGTHS, seed=SEEDS)
    def read_without_the_patch(self, slot, length, seed):
        """Unpatch, use the cache, patch again: the moments miss those tokens and must not mind."""
        talk = self.talk(slot)
        if not talk or talk.length + length > LONGEST:
            return
        patchattn.unpatch(self.model)
        new = torch.randint(2, 128, (talk.tokens.shape[0], length), generator=torch.Generator().manual_seed(seed))
        # Keys of the first layer do not depend on what was attended to: a dense call leaves those of a gated one.
        self.run(self.model, new, talk.cache)
        talk.tokens = torch.cat([talk.tokens, new], 1)
        self.handle = patchattn.patch(self.model, policy(self.gate), record="timeline")

    @rule(source=SLOTS, into=SLOTS)
    def branch(self, source, into):
        talk = self.talk(source)
        if talk:
            self.talks[into] = Conversation(copy.deepcopy(talk.cache), talk.tokens)

    @rule(slot=SLOTS)
    def pickle_cache(self, slot):
        if talk := self.talk(slot):
            talk.cache = pickle.loads(pickle.dumps(talk.cache))

    @rule(slot=SLOTS, seed=SEEDS)
    def reset(self, slot, seed):
        if talk := self.talk(slot):
            talk.cache.reset()
            talk.tokens = talk.tokens[:, :0]
            self.say(talk, 150 + seed % 100, seed)

    @rule(slot=SLOTS, operation=st.sampled_from(["reorder", "select", "repeat"]), seed=SEEDS)
    def batch_operation(self, slot, operation, seed):
        talk = self.talk(slot)
        if not talk:
            return
        batch = talk.tokens.shape[0]
        rows = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(seed))
        if operation == "reorder":
            talk.cache.reorder_cache(rows)
        elif not talk.is_dynamic:
            return
        elif operation == "select":
            rows = rows[: 1 + seed % batch]
            talk.cache.batch_select_indices(rows)
        elif batch < 3:
            rows = torch.arange(batch).repeat_interleave(2)
            talk.cache.batch_repeat_interleave(2)
        else:
            return
        talk.tokens = talk.tokens[rows]

    # What is done to the model.

    @rule()
    def unpatch_and_patch_again(self):
        patchattn.unpatch(self.model)
        tokens = torch.arange(2, 102)[None]
        assert torch.equal(self.run(self.model, tokens), self.run(self.stock, tokens))
        self.handle = patchattn.patch(self.model, policy(self.gate), record="timeline")

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_model(self, how):
        """Go on with a copy; a patched model's copy is patched."""
        twin = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        assert patchattn.is_patched(twin)
        assert patchattn.is_patched(self.model)
        patchattn.unpatch(self.model)
        patchattn.unpatch(twin)
        self.model = twin
        self.handle = patchattn.patch(self.model, policy(self.gate), record="timeline")

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def change_dtype(self, dtype):
        """Visit another dtype and come back: what is counted and kept survives."""
        # The frequencies of rotary embeddings are not in the state dict, and bfloat16 would round them.
        kept = dict(self.stock.named_parameters()) | dict(self.stock.named_buffers())
        counted = self.handle.report().to_dict()
        self.model.to(dtype)
        logits = self.run(self.model, torch.arange(2, 102)[None])
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        self.handle.reset_report()
        self.model.double()
        with torch.no_grad():
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                if name in kept:
                    tensor.copy_(kept[name])
        assert set(counted) == set(self.handle.report().to_dict())

    @rule()
    def save_and_load(self):
        """A patched model saves plain; what is loaded is not patched."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        assert patchattn.is_patched(self.model)
        assert not patchattn.is_patched(loaded)
        assert loaded.config._attn_implementation == self.stock.config._attn_implementation
        tokens = torch.arange(2, 102)[None]
        assert torch.equal(self.run(loaded, tokens), self.run(self.stock, tokens))

    @precondition(lambda self: hasattr(self, "talks") and isinstance(self.gate, MomentGate))
    @invariant()
    def moments_equal_recomputation(self):
        for talk in filter(None, self.talks):
            for entry in talk.cache.layers:
                kept = getattr(entry, "_patchattn_moments", None)
                if kept is None or not talk.length:
                    continue
                # Tokens read without the patch are not in yet; chunks that a crop took back still may be.
                chunks = int(kept.chunks.max())
                if SINK + CHUNK * chunks > talk.length or chunks == 0:
                    continue
                keys = entry.keys[:, :, : talk.length]
                query = keys.repeat_interleave(2, 1)[:, :, -1:]
                valid = torch.ones(keys.shape[0], talk.length)
                regions = Regions.of(valid, query_length=1, sink_size=SINK, window_size=1)
                _, want = bulk_log_mass_from_prompt(AttentionInputs(query, keys, keys, regions, 1.0), max_chunks=chunks)
                assert torch.equal(want.chunks, kept.chunks)
                for part in ("count", "reference", "total", "outer"):
                    assert torch.allclose(getattr(want, part), getattr(kept, part), rtol=1e-9, atol=1e-9)


class OpenModel(PatchedModel):
    gate = OpenGate()
    layers = 2


class MixedModel(PatchedModel):
    gate = MomentGate(threshold=0.3, estimate="saturating")


@pytest.mark.slow
@pytest.mark.parametrize("machine", [OpenModel, MixedModel])
def test_whatever_users_do(machine):
    from hypothesis.stateful import run_state_machine_as_test

    default = settings.get_profile(settings.get_current_profile_name())
    # One example is a story of many calls.
    run_state_machine_as_test(
        machine,
        settings=settings(default, max_examples=max(6, default.max_examples // 10), stateful_step_count=16),
    )


has_tables = pytest.mark.skipif(
    not hasattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING"), reason="this version of transformers has no such table"
)


def test_crops_add_up_over_calls_that_the_gate_does_not_see():
    """Two crops, each within the window, reach below it together, and dense calls grow other keys there."""
    story = MixedModel()
    story.start("llama")
    story.switch_cache(slot=0, kind="dynamic", rows=2, seed=0)
    talk = story.talks[0]
    # The last token is the first that has two chunks of bulk keys.
    story.say(talk, SINK + WINDOW + 2 * CHUNK - talk.length, seed=1)
    assert (talk.cache.layers[0]._patchattn_moments.chunks == 2).all()
    story.crop(slot=0, count=WINDOW - 1)
    story.crop(slot=0, count=WINDOW - 1)
    story.read_without_the_patch(slot=0, length=60, seed=2)
    story.moments_equal_recomputation()
    story.carry_on(slot=0, length=17, seed=3)
    story.moments_equal_recomputation()
    story.teardown()


@has_tables
def test_tracking_a_cache_changes_nothing_for_other_models():
    """Entries look like those of transformers, have no methods that those lack, and are not registered with it."""
    registered = (dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING), dict(cache_utils.STATIC_LAYER_TYPE_MAPPING))
    model = tiny_model("llama")
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=300)):
        stock = type(cache.layers[0])
        with patchattn.patch(model, policy(MixedModel.gate)), torch.no_grad():
            model(torch.arange(2, 102)[None].repeat(1, 2), **with_cache(model, cache))
        tracked = type(cache.layers[0])
        assert tracked is not stock
        assert issubclass(tracked, stock)
        assert repr(cache.layers[0]) == stock.__name__
        assert {name for name in dir(stock) if not name.startswith("_")} >= {
            name for name in dir(tracked) if not name.startswith("_") and name != "tracks_moments"
        }
    assert registered == (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING)


@has_tables
def test_a_cache_entry_with_a_layer_type_of_its_own_stays_the_one_for_it():
    class Own(cache_utils.DynamicLayer):
        _layer_type = "own_attention_of_this_test"

    try:
        tracked = tracking._tracking(Own)
        assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[Own._layer_type] is Own
        assert tracked._layer_type == Own._layer_type
    finally:
        del cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[Own._layer_type]
        tracking._TRACKING.pop(Own, None)
