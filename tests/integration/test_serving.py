"""Continuous batching of a patched model: tokens and gates are those of `generate`, one prompt at a time."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))

from serving import (
    LENGTHS,
    MIXED,
    PROMPTS,
    alone,
    config,
    counts,
    greedy,
    policy,
    prompt,
    serve,
    tokens,
    with_calibration,
)

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, StaticGate
from patchattn.hf.architecture import with_cache
from patchattn.hf.pages import LayerPages
from patchattn.testing import tiny_model
from patchattn.testing.models import FAMILIES, HYBRID_FAMILIES, VISION_FAMILIES

GATES = {
    "moment": MIXED,
    "guarded": MomentGate(threshold=0.1, estimate="guarded"),
    "oracle": OracleGate(threshold=0.3),
    "static": StaticGate(open_heads=((0, 1), (2, 4))),
    "open": OpenGate(),
    "closed": ClosedGate(),
}
REFUSED = {
    "gemma4_text": "read the keys of others",
    "deepseek_v3": "differ in size",
    "minimax": "no pages for layers of linear_attention",
}
"""Families that can't be served, and why."""
EARLY = ("gemma2", "gemma3_text", "gpt_oss", "cohere2", "qwen3")
"""Families with something of their own: softcap, sliding layers, sink logits, layers without positions, norms."""
OTHERS = [name for name in (*FAMILIES, *VISION_FAMILIES, *HYBRID_FAMILIES) if name not in (*EARLY, *REFUSED, "llama")]


def assert_served_like_alone(model, prompts=PROMPTS, new=8, *, patched=None, **fields):
    """Compare with `generate`; returns the report of the served run."""
    given = {"backend": "blockwise", "policy": policy()} | (patched or {})
    with patchattn.patch(model, **given) as handle:
        want = [alone(model, each, new) for each in prompts]
        wanted = counts(handle)
        handle.reset_report()
        outputs = serve(model, prompts, new, **fields)
    assert tokens(outputs) == want
    assert counts(handle) == wanted
    for phase in ("prefill", "decode"):
        of_all = [found for (_, at), found in wanted.items() if at == phase]
        asked = sum(asked * len(opened) for asked, opened in of_all)
        assert sum(output.gates.asked[phase] for output in outputs) == asked
        assert sum(output.gates.open[phase] for output in outputs) == sum(sum(opened) for _, opened in of_all)
    return handle.report()


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("backend", ["blockwise", pytest.param("reference", marks=pytest.mark.slow)])
def test_tokens_and_gates_are_those_of_generate(gate, backend):
    report = assert_served_like_alone(
        tiny_model("llama"), patched={"policy": policy(gate), "backend": backend}, max_batch_tokens=96
    )
    for phase in ("prefill", "decode"):
        share = report.open_fraction(phase)
        if isinstance(gate, OpenGate | ClosedGate):
            assert share == isinstance(gate, OpenGate)
        else:
            assert 0.05 < share < 0.9
    assert not any(reason for reasons in report.rebuilt.values() for reason in reasons.values())


@pytest.mark.parametrize("family", [*EARLY, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_families(family):
    report = assert_served_like_alone(tiny_model(family))
    assert 0.05 < report.open_fraction() < 0.95


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_before_anything_starts(family):
    model = tiny_model(family)
    with patchattn.patch(model, policy(), backend="blockwise"):
        with pytest.raises(patchattn.UnsupportedCallError, match=REFUSED[family]):
            model.init_continuous_batching()
        with pytest.raises(patchattn.UnsupportedCallError, match=REFUSED[family]):
            serve(model, PROMPTS)


@pytest.mark.slow
def test_a_sliding_layer_with_eager_attention():
    assert_served_like_alone(tiny_model("gemma3_text", attn_implementation="eager"), max_batch_tokens=50)


POLICIES = {
    "decode only": {"phases": {"decode"}},
    "prefill only": {"phases": {"prefill"}},
    "one layer": {"layers": (1,)},
    "break-even": {"min_bulk": 40},
    "break-even of each phase": {"min_bulk": {"prefill": 100, "decode": 150}},
    "no sink": {"sink_size": 0},
    "window 1": {"window_size": 1},
    "window longer than a prompt": {"window_size": 100},
    "window longer than all": {"window_size": 1000},
}


@pytest.mark.parametrize(
    "name", [*list(POLICIES)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(POLICIES)[2:])]
)
def test_policies(name):
    report = assert_served_like_alone(tiny_model("llama"), patched={"policy": policy(**POLICIES[name])})
    fractions = {phase: report.open_fraction(phase) for phase in ("prefill", "decode")}
    left_out = {"decode only": ["prefill"], "prefill only": ["decode"], "window longer than all": list(fractions)}
    for phase, fraction in fractions.items():
        assert math.isnan(fraction) if phase in left_out.get(name, ()) else 0 < fraction < 1


@pytest.mark.slow
def test_nothing_is_recorded_where_nothing_is_asked_for():
    model = tiny_model("llama")
    with patchattn.patch(model, policy(), record=None) as handle:
        want = [alone(model, each) for each in PROMPTS]
        outputs = serve(model, PROMPTS)
    assert tokens(outputs) == want
    assert handle.report().layers == {} or not any(asked for asked, _ in counts(handle).values())
    assert all(math.isnan(output.gates.open_fraction()) for output in outputs)


@pytest.mark.parametrize("fields", [{"prices": True, "key_moments": False}, {"prices": False, "key_moments": True}])
def test_calibrations(fields):
    model = tiny_model("llama")
    report = assert_served_like_alone(model, patched=with_calibration(model, fields))
    assert 0.02 < report.open_fraction("decode") < 0.98


@pytest.mark.parametrize("gate", ["closed", "moment"])
def test_a_step_gathers_keys_only_where_moments_go_on(gate):
    # 164 keys are sink, window and the first chunk, 292 the next: with 200 of prompt and 100 more it is met once.
    model, gathered = tiny_model("llama"), []

    def noting(read):
        def noted(pages, sequence, *given):
            gathered.append((read.__name__, sequence.queries))
            return read(pages, sequence, *given)

        return mock.patch.object(LayerPages, read.__name__, noted)

    with (
        patchattn.patch(model, policy(GATES[gate]), backend="blockwise"),
        noting(LayerPages.read),
        noting(LayerPages.read_keys),
    ):
        serve(model, [prompt(200)], 100)
    layers, pieces = 3, [("read", 128), ("read", 72)]
    assert sorted(gathered) == sorted(layers * (pieces + ([("read_keys", 1)] if gate == "moment" else [])))


def test_what_the_engine_measures_of_a_request_is_there_too():
    model = tiny_model("llama")
    with patchattn.patch(model, policy(), backend="blockwise"):
        served = model.generate_batch(
            PROMPTS[:2],
            generation_config=greedy(),
            continuous_batching_config=config(return_logprobs=True),
            record_timestamps=True,
        )
        for output, each in zip(served.values(), PROMPTS, strict=False):
            ids = torch.tensor([[*each, *output.generated_tokens[:-1]]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(each) - 1 :]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
            assert output.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)
            assert output.created_time < output.timestamps[0]
            assert sorted(output.timestamps) == output.timestamps
            assert len(output.timestamps) == 8


def test_requests_with_one_query_go_together():
    model, together = tiny_model("llama"), {"attend": [], "dense": []}
    handle = patchattn.patch(model, policy(min_bulk=30), backend="blockwise")
    for state in handle.states.values():

        def noted(name, inputs, *given, paged=state.paged):
            together[name].append(len(inputs.query))
            return getattr(paged, name)(inputs, *given)

        state.paged = SimpleNamespace(attend=partial(noted, "attend"), dense=partial(noted, "dense"))
    serve(model, PROMPTS, max_batch_tokens=1024)
    steps, layers = 7, 3
    # Of four prompts one is too short to be asked.
    assert together == {"attend": [3] * steps * layers, "dense": [1] * steps * layers}
    handle.unpatch()


class TestSharedPrefix:
    """A request that begins behind the keys of another: 192 of 200 tokens, in 12 pages of 16."""

    FIRST = prompt(320)
    SHARED = 192

    def served(self, model, second):
        """Serve one prompt and then another, whose counts are returned too."""
        handle = patchattn.patch(model, policy(), backend="blockwise")
        (kept,) = serve(model, [self.FIRST], persistent_manager=True, allow_block_sharing=True)
        assert kept.gates.asked["prefill"] == (320 - 36) * 3 * 6
        handle.reset_report()
        (output,) = serve(model, [second], persistent_manager=True, allow_block_sharing=True)
        served = counts(handle)
        handle.unpatch()
        return output, served, handle

    def test_its_moments_are_taken_once_and_its_gates_are_those_of_the_whole(self):
        model, second = tiny_model("llama"), self.FIRST[:200] + prompt(30, seed=9)
        output, served, handle = self.served(model, second)
        assert output.gates.asked["prefill"] == (230 - self.SHARED) * 3 * 6
        assert not any(handle.report().rebuilt.values())
        with patchattn.patch(model, policy(), backend="blockwise") as handle, torch.no_grad():
            assert output.generated_tokens == alone(model, second)
            decode = {at: found for at, found in counts(handle).items() if at[1] == "decode"}
            cache, ids = DynamicCache(), torch.tensor([second])
            model(ids[:, : self.SHARED], **with_cache(model, cache))
            handle.reset_report()
            model(ids[:, self.SHARED :], **with_cache(model, cache))
            prefill = {at: found for at, found in counts(handle).items() if at[1] == "prefill"}
        assert served == prefill | decode

    @pytest.mark.slow
    def test_a_single_token_behind_it_rebuilds_them_once(self):
        model, second = tiny_model("llama"), [*self.FIRST[: self.SHARED], 5]
        output, _, handle = self.served(model, second)
        assert handle.report().rebuilt == {layer: {"never kept": 1} for layer in range(3)}
        with patchattn.patch(model, policy(), backend="blockwise"):
            assert output.generated_tokens == alone(model, second)
        assert output.gates.asked == {"prefill": 0, "decode": 8 * 3 * 6}


def test_copies_of_a_request_go_on_from_its_moments():
    model = tiny_model("llama")
    with patchattn.patch(model, policy(), backend="blockwise") as handle:
        want = [alone(model, each) for each in PROMPTS]
        handle.reset_report()
        outputs = serve(model, PROMPTS, copies=3)
        assert tokens(outputs) == [each for each in want for _ in range(3)]
        assert not any(handle.report().rebuilt.values())
    # Each copy holds the counts of the prompt that it was made from; its last token may come by itself, as in decode.
    totals = [(sum(each.gates.asked.values()), sum(each.gates.open.values())) for each in outputs]
    assert totals == [total for total in totals[::3] for _ in range(3)]
    assert [asked for asked, _ in totals[::3]] == [(length + 7 - 36) * 3 * 6 for length in LENGTHS]
