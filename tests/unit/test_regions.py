"""Sink, window and bulk partition the causal triangle, whatever the padding and the offset."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from patchattn.regions import Regions, first_real_slot


@st.composite
def regions(draw):
    keys = draw(st.integers(1, 60))
    query_length = draw(st.integers(1, keys))
    pads = draw(st.lists(st.integers(0, keys), min_size=1, max_size=3))
    valid = torch.stack([torch.arange(keys) >= pad for pad in pads])
    if draw(st.booleans()):
        valid[:, draw(st.integers(0, keys - 1))] = False
    slot = draw(st.integers(0, keys - query_length))
    return Regions.of(
        valid,
        query_length=query_length,
        sink_size=draw(st.integers(0, 10)),
        window_size=draw(st.integers(1, 20)),
        query_slot=slot,
    )


@given(regions())
def test_local_and_bulk_partition_the_causal_triangle(r):
    local, bulk, causal = r.local_mask(), r.bulk_mask(), r.causal_mask()
    assert not (local & bulk).any()
    assert torch.equal(local | bulk, causal)


@given(regions())
def test_masks_follow_their_definition_key_by_key(r):
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


@given(regions(), st.data())
def test_a_slice_of_rows_is_the_slice_of_the_mask(r, data):
    begin = data.draw(st.integers(0, r.query_length))
    rows = slice(begin, data.draw(st.integers(begin, r.query_length)))
    assert torch.equal(r.local_mask(rows), r.local_mask()[:, rows])
    assert torch.equal(r.bulk_mask(rows), r.bulk_mask()[:, rows])


def test_the_window_includes_the_query_and_the_sink_starts_at_the_first_real_token():
    valid = torch.tensor([[False, False, True, True, True, True, True, True]])
    r = Regions.of(valid, query_length=8, sink_size=1, window_size=2)
    assert r.local_mask()[0, 7].nonzero()[:, 0].tolist() == [2, 6, 7]
    assert r.bulk_mask()[0, 7].nonzero()[:, 0].tolist() == [3, 4, 5]
    assert r.n_bulk[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_a_row_without_tokens_starts_behind_the_last_slot():
    assert first_real_slot(torch.zeros(1, 5)).tolist() == [5]
