"""From how many bulk keys on a query is asked, and which calls are asked at all, where the policy says "auto"."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn import ClosedGate, MinBulk, Policy
from patchattn.backends import load
from patchattn.backends.backend import NOT_ASKED, CallShape
from patchattn.backends.blockwise import cost
from patchattn.backends.blockwise.cost import break_even
from patchattn.hf.architecture import with_cache
from patchattn.testing import tiny_model

REAL = CallShape(1, 8192, 8192, heads=9, dim=64, sink_size=16, window_size=1024)
SHIPPED = replace(REAL, heads=6, dim=32, window_size=256)

shapes = st.builds(
    CallShape,
    batch=st.integers(1, 8),
    queries=st.just(0),
    keys=st.integers(2, 40_000),
    heads=st.integers(1, 64),
    dim=st.sampled_from([16, 64, 96, 128]),
    sink_size=st.integers(0, 64),
    window_size=st.integers(1, 8192),
).map(lambda shape: replace(shape, queries=shape.keys))


def prefill(shape: CallShape, tokens: int) -> int:
    """Break-even of a prompt read at once."""
    return break_even(replace(shape, queries=tokens, keys=tokens), "prefill")


@pytest.mark.parametrize(
    ("shape", "dense", "asked", "least"), [(REAL, 2200, 2400, 384), (SHIPPED, 1950, 2050, 288)], ids=["real", "shipped"]
)
def test_prompts_are_asked_from_the_length_at_which_asking_was_seen_to_pay(
    shape: CallShape, dense: int, asked: int, least: int
) -> None:
    assert prefill(shape, dense) == NOT_ASKED
    assert prefill(shape, asked) == least


@given(shape=shapes, more=st.integers(1, 5000))
def test_what_pays_still_pays_with_more_of_anything(shape: CallShape, more: int) -> None:
    found = break_even(shape, "prefill")
    assert break_even(shape, "prefill") == found
    if found == NOT_ASKED:
        return
    assert found < shape.keys - shape.sink_size - shape.window_size
    assert prefill(shape, shape.keys + more) == found
    for larger in ({"heads": shape.heads + 1}, {"batch": shape.batch + 1}, {"dim": shape.dim + 16}):
        assert break_even(replace(shape, **larger), "prefill") == found


@given(shape=shapes, queries=st.integers(2, 4096))
def test_a_row_is_asked_by_its_position_whatever_the_call(shape: CallShape, queries: int) -> None:
    """Chunks of a prompt have the number of the prompt read at once, or are too short to pay."""
    least = load("blockwise").least_asked(shape.sink_size, shape.window_size).prefill
    chunk = replace(shape, queries=min(queries, shape.keys))
    assert break_even(chunk, "prefill") in (least, NOT_ASKED)
    if break_even(chunk, "prefill") == least:
        # What a chunk gains the prompt gains too, and queries at the front add to it or cost next to nothing.
        assert prefill(shape, shape.keys + 2048) == least


def test_chunks_far_into_a_prompt_are_asked_as_soon_as_they_are_long_enough() -> None:
    at = {size: break_even(replace(REAL, queries=size), "prefill") for size in (2, 16, 32, 512, 4096)}
    assert at == {2: NOT_ASKED, 16: NOT_ASKED, 32: NOT_ASKED, 512: 384, 4096: 384}


def test_other_backends_and_decode_have_one_number() -> None:
    assert break_even(replace(REAL, queries=1), "decode") == 8192
    assert load("flex").least_asked(16, 1024) == MinBulk(prefill=4096, decode=4096)
    assert load("reference").least_asked(16, 1024) == MinBulk(prefill=0, decode=0)
    assert load("blockwise").least_asked(16, 1024) == MinBulk(prefill=384, decode=8192)


def run(model: Any, tokens: int, cache: Any, policy: Policy) -> tuple[MinBulk | int | str, int, dict[str, int], int]:
    """Read a prompt; return `min_bulk` in force, gated and dense calls of layer 0, and queries below break-even."""
    ids = torch.arange(tokens)[None] % 50
    with torch.no_grad(), patchattn.patch(model, policy) as handle:
        model(ids, **with_cache(model, cache))
    report = handle.report()
    calls = report.layers[0]["prefill"].gated_calls
    return handle.policy.min_bulk, calls, report.dense_calls.get(0, {}), report.below_break_even("prefill")


def test_auto_leaves_short_prompts_dense_and_a_number_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    auto = Policy(sink_size=4, window_size=32, gate=ClosedGate())
    resolved = MinBulk(prefill=260, decode=8192)
    assert run(model, 400, DynamicCache(), auto) == (resolved, 0, {"short": 1}, 0)
    assert run(model, 400, DynamicCache(), auto.model_copy(update={"min_bulk": 0})) == (0, 1, {}, 0)
    n_layers = len(patchattn.check_support(model).layers)
    explicit = run(model, 400, DynamicCache(), auto.model_copy(update={"min_bulk": resolved}))
    assert explicit == (resolved, 1, {}, 259 * n_layers)
    monkeypatch.setattr(cost, "_CALL", 0)
    assert run(model, 400, DynamicCache(), auto) == explicit


def test_room_in_a_static_cache_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_CALL", 0)
    model = tiny_model("llama")
    auto = Policy(sink_size=4, window_size=32, gate=ClosedGate())
    for tokens, calls in ((280, 0), (500, 1)):
        cache = StaticCache(config=model.config, max_cache_len=1000)
        assert run(model, tokens, cache, auto)[1] == calls
