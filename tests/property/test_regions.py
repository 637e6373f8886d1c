"""Sink, window and bulk partition the causal triangle, whatever the padding and the offset."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from patchattn.call.regions import Regions
from patchattn.testing.dense import token_masks
from patchattn.testing.strategies import paddings, shapes


@st.composite
def regions(draw: st.DrawFn, max_keys: int = 400) -> Regions:
    shape = draw(shapes(max_keys=max_keys))
    return Regions.of(
        draw(paddings(shape.batch, shape.keys)),
        query_length=shape.queries,
        sink_size=shape.sink_size,
        window_size=shape.window_size,
        query_slot=shape.query_slot,
    )


@given(regions())
def test_local_and_bulk_partition_the_causal_triangle(r: Regions) -> None:
    local, bulk, causal = r.local_mask(), r.bulk_mask(), r.causal_mask()
    triangle = torch.arange(r.key_length) <= r.query_slots[:, None]
    assert torch.equal(causal, triangle & r.valid[:, None])
    assert not (local & bulk).any()
    assert torch.equal(local | bulk, causal)


@given(regions(max_keys=60))
def test_masks_follow_their_definition_key_by_key(r: Regions) -> None:
    local, bulk = r.local_mask(), r.bulk_mask()
    for b in range(r.valid.shape[0]):
        real = [slot for slot in range(r.key_length) if r.valid[b, slot]]
        first = real[0] if real else r.key_length
        assert int(r.first[b]) == first
        for row in range(r.query_length):
            slot = int(r.query_slot) + row
            want_local = {k for k in real if k <= slot and (k - first < r.sink_size or slot - k < r.window_size)}
            assert set(local[b, row].nonzero()[:, 0].tolist()) == want_local
            assert set(bulk[b, row].nonzero()[:, 0].tolist()) == {k for k in real if k <= slot} - want_local
            n_bulk = max(0, slot - first + 1 - r.sink_size - r.window_size)
            assert int(r.n_bulk[b, row]) == n_bulk
            assert bool(r.asked[b, row]) == (n_bulk > 0 and bool(r.valid[b, slot]))
            if r.valid[b, slot]:
                assert int(r.n_causal[b, row]) == len([k for k in real if k <= slot])


@given(regions())
def test_the_masks_of_the_proof_are_the_same(r: Regions) -> None:
    sizes = {"sink_size": r.sink_size, "window_size": r.window_size}
    local, bulk, n_bulk = token_masks(r.valid, int(r.query_slot), range(r.query_length), **sizes)
    assert torch.equal(local, r.local_mask())
    assert torch.equal(bulk, r.bulk_mask())
    assert torch.equal(n_bulk, r.n_bulk)


@given(regions(), st.data())
def test_a_slice_of_rows_is_the_slice_of_the_mask(r: Regions, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, r.query_length))
    rows = slice(begin, data.draw(st.integers(begin, r.query_length)))
    assert torch.equal(r.local_mask(rows), r.local_mask()[:, rows])
    assert torch.equal(r.bulk_mask(rows), r.bulk_mask()[:, rows])


@given(shapes(max_keys=400), st.integers(0, 300))
def test_what_the_host_counts_is_what_the_tensors_hold(shape: Any, break_even: int) -> None:
    sizes = {"sink_size": shape.sink_size, "window_size": shape.window_size}
    slot = shape.keys - shape.queries
    known = Regions.plain(
        shape.sink_size,
        shape.window_size,
        shape.queries,
        shape.batch,
        shape.keys,
        torch.device("cpu"),
        break_even=break_even,
    )
    ones = torch.ones(shape.batch, shape.keys, dtype=torch.bool)
    read = Regions.of(ones, query_length=shape.queries, query_slot=slot, break_even=break_even, **sizes)
    assert known.host == read.host
    for name in ("valid", "first", "query_slot"):
        assert torch.equal(getattr(known, name), getattr(read, name))
    counts = known.counts
    assert counts.n_asked == read.asked.sum()
    assert counts.n_below == read.below.sum()
    assert counts.n_causal == read.n_causal.sum()
    assert not (read.asked & read.unasked).any()
    assert torch.equal(read.asked | read.unasked, read.n_bulk > 0)
