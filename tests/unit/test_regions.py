"""Sink, window and bulk by example; the properties are in tests/property/test_regions.py."""

import torch

from patchattn.call.regions import Regions, first_real_slot


def test_the_window_includes_the_query_and_the_sink_starts_at_the_first_real_token():
    valid = torch.tensor([[False, False, True, True, True, True, True, True]])
    r = Regions.of(valid, query_length=8, sink_size=1, window_size=2)
    assert r.local_mask()[0, 7].nonzero()[:, 0].tolist() == [2, 6, 7]
    assert r.bulk_mask()[0, 7].nonzero()[:, 0].tolist() == [3, 4, 5]
    assert r.n_bulk[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_a_row_without_tokens_starts_behind_the_last_slot():
    assert first_real_slot(torch.zeros(1, 5)).tolist() == [5]
