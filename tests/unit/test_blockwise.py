"""The blockwise backend against the reference: same output, same decisions, linear memory."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchattn.backends import blockwise, reference
from patchattn.backends.blockwise import prefill as blockwise_prefill
from patchattn.backends.blockwise import softmax as blockwise_kernel
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores, exact_masses, masked_log_mass
from patchattn.call.regions import Regions
from patchattn.errors import UnsupportedCallError
from patchattn.gates.decision import forced


def make_call(
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 150,
    keys: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    sink: int = 4,
    window: int = 32,
    left: tuple[int, ...] = (),
    holes: tuple[slice, ...] = (),
    query_slot: int | None = None,
    softcap: float | None = None,
    sink_logits: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> AttentionInputs:
    """Draw a random call; `left` pads each row on the left, `holes` are padding slots of all rows."""
    draw = torch.Generator().manual_seed(seed)
    keys = keys or queries

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    valid = torch.ones(batch, keys, dtype=torch.bool)
    for row, padding in enumerate(left):
        valid[row, :padding] = False
    for hole in holes:
        valid[:, hole] = False
    return AttentionInputs(
        normal(batch, kv_heads * group, queries, dim),
        normal(batch, kv_heads, keys, dim),
        normal(batch, kv_heads, keys, value_dim or dim),
        Regions.of(valid, query_length=queries, sink_size=sink, window_size=window, query_slot=query_slot),
        scale=1.5 / math.sqrt(dim),
        softcap=softcap,
        sink_logits=normal(kv_heads * group) if sink_logits else None,
    )


def exact_gate(inputs: AttentionInputs) -> tuple[Tensor, float]:
    """Exact bulk log masses, and the threshold that opens about half of the pairs asked."""
    bulk = exact_masses(inputs)[0].bulk
    local = masked_log_mass(attention_scores(inputs), inputs.regions.local_mask()[:, None], inputs.sink_logits)
    margins = (local - bulk)[inputs.regions.asked[:, None].expand_as(bulk)]
    margins = margins[margins.isfinite()].sort().values
    # Between two margins, so that rounding flips no decision.
    middle = len(margins) // 2
    return bulk, float(margins[middle - 1 : middle + 1].mean()) if len(margins) > 1 else 0.0


def assert_mixed(opened: Tensor, inputs: AttentionInputs) -> None:
    """Assert that some of the pairs asked are open and some closed."""
    asked = inputs.regions.asked[:, None].expand_as(opened)
    assert opened[asked].any()
    assert not opened[asked].all()


def to_dtype(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """Cast the tensors of a call."""
    sinks = inputs.sink_logits
    return dataclasses.replace(
        inputs,
        query=inputs.query.to(dtype),
        key=inputs.key.to(dtype),
        value=inputs.value.to(dtype),
        sink_logits=None if sinks is None else sinks.to(dtype),
    )


MIXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "one chunk more": {"queries": 385, "window": 130, "batch": 1},
    "bulk chunks": {"queries": 400, "window": 16, "group": 4, "kv_heads": 1, "batch": 1},
    "left padding": {"left": (0, 37), "queries": 200},
    "padding everywhere": {"left": (5, 60), "holes": (slice(80, 85), slice(146, 150))},
    "bulk all padding at first": {"left": (0, 3), "holes": (slice(4, 60),)},
    "a row of padding": {"left": (0, 150)},
    "multi query": {"kv_heads": 1, "group": 3},
    "no groups": {"kv_heads": 3, "group": 1},
    "group of 4, 3 heads": {"kv_heads": 3, "group": 4},
    "dim 80": {"dim": 80},
    "dim 96, small values": {"dim": 96, "value_dim": 64},
    "large values": {"dim": 16, "value_dim": 40},
    "softcap": {"softcap": 3.0},
    "sink logits": {"sink_logits": True},
    "softcap and sink logits": {"softcap": 2.0, "sink_logits": True, "left": (0, 20)},
    "no sink": {"sink": 0},
    "window 1": {"window": 1},
    "window 1, no sink": {"window": 1, "sink": 0},
    "chunked prefill": {"queries": 70, "keys": 190, "left": (0, 33)},
    "decode": {"queries": 1, "keys": 300, "left": (0, 33), "group": 3},
    "static cache": {"queries": 60, "keys": 300, "query_slot": 90, "left": (0, 11)},
    "static cache decode": {"queries": 1, "keys": 300, "query_slot": 200, "left": (0, 11), "group": 4},
}
DENSE: dict[str, dict[str, Any]] = {
    "window beyond length": {"window": 500},
    "sink beyond length": {"sink": 500},
    "sink beyond filled cache": {"sink": 64, "queries": 8, "keys": 100, "query_slot": 20},
    "one token": {"queries": 1, "keys": 1},
}


@pytest.mark.parametrize("case", MIXED.values(), ids=MIXED.keys())
def test_equals_reference_in_float64(case: dict[str, Any]) -> None:
    inputs = make_call(**case)
    bulk, threshold = exact_gate(inputs)
    expected = reference.attend(inputs, bulk, threshold)
    actual = blockwise.attend(inputs, bulk, threshold)
    assert_mixed(expected.open, inputs)
    assert torch.equal(actual.open, expected.open)
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10)
    assert int(actual.scored_keys) >= expected.scored_keys


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE.keys())
def test_without_bulk_keys_nothing_opens(case: dict[str, Any]) -> None:
    inputs = make_call(**case)
    bulk = torch.full(inputs.query.shape[:3], torch.inf, dtype=torch.float64)
    expected, actual = (backend.attend(inputs, bulk, 0.0) for backend in (reference, blockwise))
    assert not actual.open.any()
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in MIXED if name != "one chunk more"])
def test_low_precision_errs_no_more_than_plain_attention(name: str, dtype: torch.dtype) -> None:
    low = to_dtype(make_call(**MIXED[name]), dtype)
    exact = to_dtype(low, torch.float64)
    opened = reference.attend(exact, *exact_gate(exact)).open
    assert_mixed(opened, exact)
    truth = reference.attend(exact, forced(opened, exact), 0.0).output
    plain, actual = (backend.attend(low, forced(opened, low), 0.0) for backend in (reference, blockwise))
    assert torch.equal(actual.open, opened)
    assert actual.output.dtype == dtype
    assert actual.output.isfinite().all()
    budget = (plain.output - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert (actual.output - truth).abs().max() <= 2 * budget


@pytest.mark.parametrize("case", [{}, {"queries": 1, "keys": 200, "left": (0, 9)}], ids=["prefill", "decode"])
@pytest.mark.parametrize("is_open", [True, False])
def test_all_open_is_dense_and_all_closed_is_local(case: dict[str, Any], is_open: bool) -> None:
    inputs = make_call(**case)
    regions = inputs.regions
    pairs = torch.full(inputs.query.shape[:3], is_open)
    actual = blockwise.attend(inputs, forced(pairs, inputs), 0.0)
    mask = (regions.causal_mask() if is_open else regions.local_mask())[:, None]
    assert torch.equal(actual.open, (pairs & regions.asked[:, None]))
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, attn_mask=mask, scale=inputs.scale, enable_gqa=True
    )
    visible = mask.any(-1)[..., None]
    torch.testing.assert_close(actual.output, dense.masked_fill(~visible, 0), rtol=0, atol=1e-10)


def test_decode_reads_only_local_keys_of_closed_groups() -> None:
    inputs = make_call(batch=1, queries=1, keys=1000, sink=4, window=32)
    opened = torch.zeros(1, 4, 1, dtype=torch.bool)
    closed = blockwise.attend(inputs, forced(opened, inputs), 0.0)
    assert closed.scored_keys == 4 * (4 + 32)
    opened[0, 2] = True
    one_open = blockwise.attend(inputs, forced(opened, inputs), 0.0)
    assert one_open.scored_keys == 4 * (4 + 32) + 1000 - 4 - 32


def test_rows_that_see_no_key_are_zero() -> None:
    inputs = make_call(left=(10, 150))
    bulk, threshold = exact_gate(inputs)
    output = blockwise.attend(inputs, bulk, threshold).output
    assert (output[0, :, :10] == 0).all()
    assert (output[1] == 0).all()
    assert (output[0, :, 10:] != 0).any(-1).all()


@pytest.mark.parametrize("slots", [slice(150, 300), slice(0, 7)], ids=["unfilled cache", "left padding"])
def test_garbage_in_unused_slots_changes_nothing(slots: slice) -> None:
    inputs = make_call(keys=300, query_slot=0, queries=150, left=(7, 7), sink=16)
    bulk, threshold = exact_gate(inputs)
    clean = blockwise.attend(inputs, bulk, threshold)
    assert_mixed(clean.open, inputs)
    garbage = 1e4 if slots.start == 0 else torch.nan
    inputs.key[:, :, slots] = garbage
    inputs.value[:, :, slots] = garbage
    dirty = blockwise.attend(inputs, bulk, threshold)
    assert torch.equal(dirty.open, clean.open)
    torch.testing.assert_close(dirty.output, clean.output, rtol=0, atol=1e-12)


def test_garbage_in_sink_slots_that_are_not_filled_changes_nothing() -> None:
    inputs = make_call(**DENSE["sink beyond filled cache"])
    bulk = forced(torch.ones(inputs.query.shape[:3], dtype=torch.bool), inputs)
    clean = blockwise.attend(inputs, bulk, 0.0).output
    inputs.key[:, :, 28:] = torch.nan
    inputs.value[:, :, 28:] = torch.nan
    torch.testing.assert_close(blockwise.attend(inputs, bulk, 0.0).output, clean, rtol=0, atol=1e-12)


def test_open_pairs_whose_bulk_is_all_padding_keep_their_local_output() -> None:
    inputs = make_call(**MIXED["bulk all padding at first"])
    everything, nothing = (torch.full(inputs.query.shape[:3], is_open) for is_open in (True, False))
    opened = blockwise.attend(inputs, forced(everything, inputs), 0.0)
    closed = blockwise.attend(inputs, forced(nothing, inputs), 0.0)
    # Row 0, slots 60 to 91: the bulk begins in slot 4 and ends before slot 60.
    assert opened.open[0, :, 60:92].all()
    torch.testing.assert_close(opened.output[0, :, 60:92], closed.output[0, :, 60:92], rtol=0, atol=1e-12)
    assert not torch.allclose(opened.output[0, :, 92:], closed.output[0, :, 92:])


@pytest.mark.parametrize("name", ["padding everywhere", "sink logits", "softcap and sink logits", "a row of padding"])
def test_local_log_mass_equals_reference(name: str) -> None:
    inputs = make_call(**MIXED[name])
    mask = inputs.regions.local_mask()[:, None]
    expected = masked_log_mass(attention_scores(inputs), mask, inputs.sink_logits)
    local, _ = blockwise_prefill.attend_local(inputs, slice(0, inputs.query.shape[2]))
    if inputs.sink_logits is not None:
        local = blockwise_kernel.with_sink_logits(local, inputs.sink_logits[:, None])
    actual = local.log_mass
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


PATHS: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 300},
    "left padding": {"queries": 300, "left": (0, 75)},
    "chunked prefill": {"queries": 200, "keys": 330, "left": (0, 20)},
    "holes": {"queries": 300, "holes": (slice(100, 120),)},
    "groups of 7": {"queries": 300, "group": 7, "kv_heads": 2},
    "groups of 3, value dim": {"queries": 300, "group": 3, "value_dim": 24},
    "no groups": {"queries": 300, "group": 1, "kv_heads": 4},
    "sink logits": {"queries": 300, "sink_logits": True},
    "softcap": {"queries": 200, "softcap": 2.0},
    "static cache": {"queries": 150, "keys": 400, "query_slot": 70},
}


@pytest.mark.parametrize("first_head_open", [True, False])
@pytest.mark.parametrize(
    ("slab", "chunks", "most_masked"), [(129, 2, 0), (129, 32, 1 << 20), (4096, 2, 1 << 14), (4096, 32, 1 << 20)]
)
@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS.keys())
def test_slabs_chunks_and_rectangles_equal_reference(
    case: dict[str, Any],
    slab: int,
    chunks: int,
    most_masked: int,
    first_head_open: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blockwise, "SLAB", slab)
    monkeypatch.setattr(blockwise_prefill, "_LOCAL_CHUNKS", chunks)
    monkeypatch.setattr(blockwise_prefill, "_MOST_MASKED", most_masked)
    inputs = make_call(**case)
    inputs.key[:, :, inputs.regions.host.filled :] = torch.nan
    inputs.value[:, :, inputs.regions.host.filled :] = torch.nan
    opened = torch.rand(inputs.query.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.3
    if first_head_open:
        # All but a few pairs of the first KV head, as where a head needs the far keys nearly always.
        opened[:, : inputs.group_size] = True
        opened[:, 0, ::11] = False
    bulk = forced(opened, inputs)
    filled = inputs.regions.host.filled
    clean = dataclasses.replace(
        inputs,
        key=inputs.key[:, :, :filled],
        value=inputs.value[:, :, :filled],
        regions=dataclasses.replace(inputs.regions, valid=inputs.regions.valid[:, :filled]),
    )
    expected, actual = reference.attend(clean, bulk, 0.0), blockwise.attend(inputs, bulk, 0.0)
    assert_mixed(expected.open, clean)
    assert torch.equal(actual.open, expected.open)
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["softcap", "softcap and holes", "infinite key"])
def test_products_of_few_rows_at_a_time_equal_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products, real = 0, blockwise_kernel._by_products

    def counted(call: AttentionInputs, query: Tensor, key: Tensor, *rest: Any) -> Any:
        nonlocal products
        products += 1
        return real(call, query, key, *rest)

    monkeypatch.setattr(blockwise_kernel, "_MOST_SCORES", 4000)
    monkeypatch.setattr(blockwise_kernel, "_by_products", counted)
    holes = (slice(60, 70),) if case == "softcap and holes" else ()
    softcap = None if case == "infinite key" else 2.0
    inputs = make_call(batch=2, queries=200, left=(0, 30), holes=holes, softcap=softcap)
    if case == "infinite key":
        # In the fused kernel a key that is not finite spoils rows that mask it, so products take its place.
        inputs.key[0, 0, 150] = torch.inf
    opened = torch.rand(inputs.query.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.3
    bulk = forced(opened, inputs)
    expected, actual = reference.attend(inputs, bulk, 0.0), blockwise.attend(inputs, bulk, 0.0)
    assert products > 10
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10, equal_nan=True)


@given(
    ends=st.lists(st.integers(3, 60), min_size=1, max_size=70).map(sorted),
    most_masked=st.integers(0, 500),
    threads=st.integers(1, 4),
)
def test_rectangles_cover_what_each_row_sees_once(ends: list[int], most_masked: int, threads: int) -> None:
    begin, times = 3, torch.zeros(len(ends), 60, dtype=torch.long)
    sees = torch.arange(60) < torch.tensor(ends)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        for rows, slots, is_seen_whole in blockwise_prefill._rectangles(ends, begin, most_masked):
            assert slots.stop > slots.start
            assert not is_seen_whole or sees[rows, slots].all()
            times[rows, slots] += sees[rows, slots]
            n_masked = (rows.stop - rows.start) * (slots.stop - slots.start)
            assert is_seen_whole or n_masked <= max(most_masked, slots.stop - slots.start)
    assert torch.equal(times[:, begin:], sees[:, begin:].long())
    assert not times[:, :begin].any()


DECODES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 3},
    "one sequence": {"batch": 1, "group": 3},
    "left padding": {"batch": 2, "left": (0, 500)},
    "holes": {"batch": 1, "holes": (slice(900, 910),)},
    "static cache": {"batch": 1, "query_slot": 1400},
    "value dim": {"batch": 1, "value_dim": 24},
    "sink logits": {"batch": 2, "sink_logits": True},
    "no sink": {"batch": 1, "sink": 0},
    "softcap": {"batch": 1, "softcap": 2.0},
    "groups of 7": {"batch": 1, "group": 7},
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("heads", ["one head", "one group", "first and last of a group", "all but one", "all"])
@pytest.mark.parametrize("case", DECODES.values(), ids=DECODES.keys())
def test_every_way_of_decoding_equals_reference(
    case: dict[str, Any], heads: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = make_call(**({"queries": 1, "keys": 1637, "group": 3} | case))
    group, opened = inputs.group_size, torch.zeros(inputs.query.shape[:3], dtype=torch.bool)
    match heads:
        case "one head":
            opened[0, 1] = True
        case "one group":
            opened[:, :group] = True
        case "first and last of a group":
            opened[:, 0] = opened[:, group - 1] = True
        case "all but one":
            opened[:, 1:] = True
        case _:
            opened[:] = True
    bulk = forced(opened, inputs)
    expected, actual = reference.attend(inputs, bulk, 0.0), blockwise.attend(inputs, bulk, 0.0)
    assert torch.equal(actual.open, expected.open)
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", {**PATHS, **MIXED, **DENSE}.values(), ids={**PATHS, **MIXED, **DENSE}.keys())
def test_dense_attention_equals_reference(case: dict[str, Any]) -> None:
    inputs = make_call(**case)
    everything = forced(torch.ones(inputs.query.shape[:3], dtype=torch.bool), inputs)
    expected = reference.attend(inputs, everything, 0.0).output
    torch.testing.assert_close(blockwise.dense(inputs), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [2, 5, 16, 17])
@pytest.mark.parametrize("query_slot", [None, 30])
def test_dense_attention_of_few_queries_equals_reference(queries: int, query_slot: int | None) -> None:
    inputs = make_call(queries=queries, keys=200, group=3, query_slot=query_slot)
    expected = reference.attend(inputs, forced(torch.ones(inputs.query.shape[:3], dtype=torch.bool), inputs), 0.0)
    torch.testing.assert_close(blockwise.dense(inputs), expected.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("slot", [2, 70])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_key_opens_gates_and_spoils_only_rows_that_attend_to_it(slot: int, bad: float) -> None:
    inputs = make_call(batch=1, queries=300)
    bulk, threshold = exact_gate(inputs)
    inputs.key[:, 0, slot, 3] = bad
    expected, actual = (backend.attend(inputs, bulk, threshold) for backend in (reference, blockwise))
    assert_mixed(expected.open, inputs)
    assert torch.equal(actual.open, expected.open)
    assert actual.output[:, :, :slot].isfinite().all()
    assert actual.output[:, 2:].isfinite().all()
    assert actual.output[:, :2].isnan().any()
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10, equal_nan=True)


def test_nan_bulk_log_mass_opens() -> None:
    inputs = make_call()
    bulk = torch.full(inputs.query.shape[:3], torch.nan, dtype=torch.float64)
    opened = blockwise.attend(inputs, bulk, 0.0).open
    assert torch.equal(opened, inputs.regions.asked[:, None].expand_as(opened))


@pytest.mark.parametrize("transposed", ["tokens before heads", "tokens last"])
def test_memory_layout_of_the_inputs_does_not_matter(transposed: str) -> None:
    inputs = make_call()
    axes = (1, 2) if transposed == "tokens before heads" else (2, 3)
    strided = dataclasses.replace(
        inputs,
        **{
            name: getattr(inputs, name).transpose(*axes).contiguous().transpose(*axes)
            for name in ("query", "key", "value")
        },
    )
    assert not strided.key.is_contiguous()
    bulk, threshold = exact_gate(inputs)
    expected, actual = (blockwise.attend(call, bulk, threshold) for call in (inputs, strided))
    assert_mixed(expected.open, inputs)
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_equals_reference_on_any_shape(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 300), label="keys")
    queries = data.draw(st.integers(1, keys), label="queries")
    holes = data.draw(st.lists(st.integers(0, keys - 1), max_size=8), label="holes")
    inputs = make_call(
        keys=keys,
        queries=queries,
        query_slot=data.draw(st.integers(0, keys - queries), label="query_slot"),
        kv_heads=data.draw(st.integers(1, 2), label="kv_heads"),
        group=data.draw(st.integers(1, 4), label="group"),
        dim=data.draw(st.sampled_from([1, 8, 20]), label="dim"),
        value_dim=data.draw(st.sampled_from([1, 8, 24]), label="value_dim"),
        sink=data.draw(st.integers(0, 40), label="sink"),
        window=data.draw(st.integers(1, 80), label="window"),
        left=tuple(data.draw(st.integers(0, keys), label="left") for _ in range(2)),
        holes=tuple(slice(hole, hole + 1) for hole in holes),
        softcap=data.draw(st.sampled_from([None, 2.0]), label="softcap"),
        sink_logits=data.draw(st.booleans(), label="sink_logits"),
        seed=data.draw(st.integers(0, 1000), label="seed"),
    )
    bulk, threshold = exact_gate(inputs)
    expected, actual = (backend.attend(inputs, bulk, threshold) for backend in (reference, blockwise))
    if inputs.regions.asked.sum() > 20 and not holes:
        assert_mixed(expected.open, inputs)
    assert torch.equal(actual.open, expected.open)
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["left padding", "sink logits", "softcap", "static cache decode"])
def test_compiles_as_one_graph(name: str) -> None:
    inputs = make_call(**MIXED[name])
    bulk, threshold = exact_gate(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor, bulk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        changed = dataclasses.replace(inputs, query=query * 1.0, key=key, value=value)
        attended = blockwise.attend(changed, bulk, threshold)
        return attended.output * 2, attended.open, torch.as_tensor(attended.scored_keys)

    tensors = (inputs.query, inputs.key, inputs.value, bulk)
    eager = call(*tensors)
    assert_mixed(eager[1], inputs)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors)
    for actual, expected in zip(compiled, eager, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["left padding", "softcap and sink logits", "dim 96, small values", "decode"])
def test_operator_is_well_formed(name: str) -> None:
    inputs = make_call(**MIXED[name])
    regions, (bulk, threshold) = inputs.regions, exact_gate(inputs)
    tensors = (inputs.query, inputs.key, inputs.value, regions.valid, regions.first, regions.query_slot, bulk)
    numbers = (inputs.scale, inputs.softcap, threshold, regions.sink_size, regions.window_size, regions.break_even)
    torch.library.opcheck(torch.ops.patchattn.blockwise.default, (*tensors, inputs.sink_logits, *numbers))


def test_forward_runs_under_grad_mode_and_backward_refuses() -> None:
    inputs = make_call()
    inputs.query.requires_grad_()
    bulk, threshold = exact_gate(dataclasses.replace(inputs, query=inputs.query.detach()))
    attended = blockwise.attend(inputs, bulk, threshold)
    assert_mixed(attended.open, inputs)
    with pytest.raises(UnsupportedCallError, match=r"torch\.no_grad\(\)"):
        attended.output.sum().backward()


_PEAK = """
import resource, sys, torch
sys.argv = ["", *sys.argv[1:]]
from patchattn.backends import blockwise
from patchattn.backends.blockwise import prefill as blockwise_prefill
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions

def run(length):
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, length, 16), torch.randn(1, 1, length, 16)
    regions = Regions.of(torch.ones(1, length), query_length=length, sink_size=4, window_size=64)
    opened = torch.rand(1, 2, length) < 0.05
    blockwise.attend(
        AttentionInputs(query, key, key, regions, 0.25, float(sys.argv[2]) or None),
        torch.where(opened, torch.inf, -torch.inf),
        0.0,
    )

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

run(512)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("softcap", [0.0, 20.0], ids=["fused kernel", "matrix products"])
def test_peak_memory_is_far_below_queries_times_keys(softcap: float) -> None:
    length = 16384
    command = [sys.executable, "-c", _PEAK, str(length), str(softcap)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    # One byte for each query and key would be 256 MiB, their scores 1 GiB a head.
    assert grown < 192


@pytest.mark.parametrize("sizes", [{"window_size": 2**31 - 1}, {"sink_size": 2**31 - 1}], ids=str)
def test_sink_and_window_far_longer_than_the_text(sizes):
    """Chunks are as long as both, and must not be longer than the text."""
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[1, :20] = False
    regions = Regions.of(valid, query_length=90, **({"sink_size": 4, "window_size": 16} | sizes))
    query, key = torch.randn(2, 4, 90, 16), torch.randn(2, 2, 90, 16)
    inputs = AttentionInputs(query, key, key, regions, 0.25)
    closed = forced(torch.zeros(2, 4, 90, dtype=torch.bool), inputs)
    got, want = (backend.attend(inputs, closed, 0.0).output for backend in (blockwise, reference))
    torch.testing.assert_close(got, want)
