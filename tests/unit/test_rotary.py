"""Tests of `patchattn.moments.text`: moments averaged over rotations, in closed form, against turning every key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.moments.gaussian import CHUNK, KeyMoments
from patchattn.moments.text import RotaryMoments, Rotation, bulk_log_mass_from_text

DIM = 8
FREQUENCIES = torch.tensor([1.0, 0.1, 1e-3, 0.0], dtype=torch.float64)


def turn(keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Turn keys [..., keys, dim] by their slots: what a rotary embedding does."""
    u, v = keys.chunk(2, dim=-1)
    angle = slots[:, None] * FREQUENCIES
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], dim=-1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(keys: torch.Tensor, **fields) -> RotaryMoments:
    found = KeyMoments.of(keys)
    return RotaryMoments(found.mean, found.covariance, FREQUENCIES, **fields)


@given(first=st.integers(0, 20), n=st.integers(1, 300), seed=st.integers(0, 1000))
def test_the_closed_form_is_the_mean_over_slots(first: int, n: int, seed: int) -> None:
    # The same keys at every slot: their moments after turning are what the closed form promises.
    keys = 2 * normal(2, 1, DIM, seed=seed) + normal(2, 12, DIM, seed=seed + 1)
    slots = torch.arange(first, first + n)
    everywhere = turn(keys.repeat_interleave(n, dim=1), slots.repeat(12))
    want = KeyMoments.of(everywhere)
    got = moments_of(keys).over_slots(first, torch.tensor(n))
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.covariance, want.covariance, rtol=1e-9, atol=1e-9)


def test_turning_back_undoes_turning_in_any_order() -> None:
    keys, slots = normal(2, 50, DIM), torch.arange(7, 57)
    torch.testing.assert_close(Rotation(FREQUENCIES).undone(turn(keys, slots), slots), keys)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved = torch.empty_like(keys)
    interleaved[..., order] = turn(keys, slots)
    torch.testing.assert_close(Rotation(FREQUENCIES, order).undone(interleaved, slots), keys)


@pytest.mark.parametrize("order", [None, torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])])
def test_padding_chunks_and_steps_of_decode_give_the_same_estimates(order) -> None:
    length, first = 500, 37
    valid = torch.ones(2, length)
    valid[1, :first] = 0
    moments = moments_of(normal(2, 100, DIM) + 1, order=order)
    query = normal(2, 4, length, DIM, seed=3)

    def estimate(begin: int, end: int) -> torch.Tensor:
        regions = Regions.of(valid[:, :end], query_length=end - begin, sink_size=4, window_size=32)
        keys = torch.zeros(2, 2, end, DIM, dtype=query.dtype)
        inputs = AttentionInputs(query[:, :, begin:end], keys, keys, regions, 0.4)
        return bulk_log_mass_from_text(inputs, moments, estimate="saturating")

    whole = estimate(0, length)
    pieces = [estimate(0, 150), estimate(150, 411), *(estimate(at, at + 1) for at in range(411, length))]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=1e-12, atol=1e-12)
    # Without padding the same query has as many bulk keys `first` slots earlier.
    n_bulk = length - first - 36
    turned = moments.over_slots(4, torch.tensor(CHUNK * (n_bulk // CHUNK) + CHUNK // 2))
    for head in range(4):
        row = query[1, head, -1:] if order is None else query[1, head, -1:, order]
        one = KeyMoments(turned.count[head // 2], turned.mean[head // 2], turned.covariance[head // 2])
        want = one.log_mass(row, torch.tensor(n_bulk), scale=0.4, estimate="saturating")
        torch.testing.assert_close(whole[1, head, -1], want[0])
    assert (whole[1, :, : first + 36] == -torch.inf).all()
