"""Moments merge exactly, and running moments equal those taken from the keys again, whatever happened in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.hf.cache import load_moments, store_moments
from patchattn.moments.gaussian import CHUNK, KeyMoments
from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt
from patchattn.testing.strategies import FINITE_KEYS, GROUP_SIZES, KeyKind, lengths, make_keys

SEEDS = st.integers(0, 2**16)
LOCALS = st.sampled_from([(0, 1), (0, 33), (5, 64), (16, 128)])
kinds = st.sampled_from(FINITE_KEYS)


def assert_moments_close(got: KeyMoments, want: KeyMoments, merges: int) -> None:
    """Compare, allowing each merge one rounding of what it adds up, in the accumulator of `got`."""
    assert torch.equal(got.count.double(), want.count.double())
    eps = torch.finfo(got.mean.dtype).eps * (merges + 8)
    mean, spread = want.mean.double().abs().max(), want.covariance.double().abs().max().sqrt()
    torch.testing.assert_close(got.mean.double(), want.mean.double(), rtol=0, atol=float(eps * (mean + spread)))
    allowed = eps * spread * (spread + mean) + (eps * mean).square()
    torch.testing.assert_close(got.covariance.double(), want.covariance.double(), rtol=0, atol=float(allowed))


def merged_in_some_order(parts: list[KeyMoments], data: st.DataObject) -> KeyMoments:
    """Merge two neighbours after the other, or any two in any order, until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        one = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(one.merge(other))
    return parts[0]


@given(kinds, st.lists(st.integers(0, 40), min_size=1, max_size=7), SEEDS, st.data())
def test_merging_in_any_order_equals_one_pass(kind: KeyKind, sizes: list[int], seed: int, data: st.DataObject) -> None:
    x = make_keys(kind, (2, max(1, sum(sizes)), 8), seed=seed)[:, : sum(sizes)]
    parts = [KeyMoments.of(part) for part in x.split(sizes, dim=1)]
    assert_moments_close(merged_in_some_order(parts, data), KeyMoments.of(x), len(sizes))


@given(kinds, SEEDS, st.data())
def test_merge_is_commutative_and_associative(kind: KeyKind, seed: int, data: st.DataObject) -> None:
    x = make_keys(kind, (90, 8), seed=seed)
    a, b, c = (KeyMoments.of(part) for part in x.split(data.draw(st.permutations([5, 25, 60]))))
    assert_moments_close(a.merge(b), b.merge(a), 1)
    assert_moments_close(a.merge(b).merge(c), a.merge(b.merge(c)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(kinds, st.integers(1, 600), st.integers(1, 40), SEEDS)
@settings(max_examples=settings().max_examples // 2)
def test_many_merges_of_low_precision_keys_equal_one_pass_in_float64(
    dtype: torch.dtype, kind: KeyKind, n: int, step: int, seed: int
) -> None:
    x = make_keys(kind, (n, 16), seed=seed, dtype=dtype)
    merged, *rest = (KeyMoments.of(part) for part in x.split(step))
    for part in rest:
        merged = merged.merge(part)
    assert merged.mean.dtype == torch.float32
    assert_moments_close(merged, KeyMoments.of(x.double()), len(rest))


class Conversation:
    """Keys of several sequences in a real cache, with moments that follow, and the whole text to check them by."""

    def __init__(self, kind: KeyKind, pads: list[int], local: tuple[int, int], group: int, seed: int) -> None:
        self.local, self.group, self.kind, self.seed = local, group, kind, seed
        self.cache = DynamicCache()
        self.key = torch.zeros(len(pads), 2, 0, 8, dtype=torch.float64)
        self.pads = torch.tensor(pads)

    def regions(self, queries: int) -> Regions:
        valid = torch.arange(self.key.shape[2]) >= self.pads[:, None]
        return Regions.of(valid, query_length=queries, sink_size=self.local[0], window_size=self.local[1])

    def append(self, n: int, *, bounded: bool) -> None:
        """Append keys, and compare what the running moments say with moments from scratch."""
        self.seed += 1
        batch = self.key.shape[0]
        new = make_keys(self.kind, (batch, 2, n, 8), seed=self.seed)
        self.key, _ = self.cache.update(new, new, 0)
        draw = torch.Generator().manual_seed(self.seed)
        query = torch.randn(batch, 2 * self.group, n, 8, generator=draw, dtype=torch.float64)
        regions = self.regions(n)
        kept = load_moments(self.cache, 0, self.key, self.local)
        bound = self.key.shape[2] // CHUNK + 1 if bounded else None
        inputs = AttentionInputs(query, self.key, self.key, regions, 0.1)
        got, moments = bulk_log_mass_from_prompt(inputs, kept, max_chunks=bound)
        store_moments(self.cache, 0, moments, self.local, int(self.cache.get_seq_length()))
        want, fresh = bulk_log_mass_from_prompt(inputs)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        covered = (regions.n_bulk[:, -1] // CHUNK).clamp(min=0)
        assert torch.equal(moments.chunks, covered)
        assert torch.equal(fresh.chunks, covered)
        event("running moments continued" if kept is not None and kept.chunks.any() else "from scratch")
        self.compare_with_definition(moments, covered)

    def compare_with_definition(self, moments: PromptMoments, covered: Tensor) -> None:
        for row, chunks in enumerate(covered.tolist()):
            if not chunks:
                continue
            begin = int(self.pads[row]) + self.local[0]
            want = KeyMoments.of(self.key[row, :, begin : begin + CHUNK * chunks])
            shift = moments.total[row] / (CHUNK * chunks)
            torch.testing.assert_close(moments.reference[row] + shift, want.mean, rtol=1e-9, atol=1e-9)
            second = moments.outer[row] / (CHUNK * chunks) - shift[:, :, None] * shift[:, None]
            size = float(moments.outer[row].abs().max() / (CHUNK * chunks))
            torch.testing.assert_close(second, want.covariance, rtol=0, atol=1e-12 * size + 1e-12)

    def change(self, data: st.DataObject) -> str:
        """Do to the cache what generation may do to it."""
        batch, n = self.key.shape[0], self.key.shape[2]
        crops = {
            "crop": st.integers(1, self.local[1] + 1),
            "crop far": st.integers(1, max(1, n - int(self.pads.max()))),
            # Just below a boundary of the grid of moments.
            "crop over the edge": st.just((n - int(self.pads[0]) - sum(self.local)) % CHUNK + 1),
        }
        others = ["reorder", "select", "repeat", "reset"]
        what = data.draw(st.sampled_from([*crops, *others]))
        rows = torch.arange(batch)
        if what in crops:
            cut = min(data.draw(crops[what]), n)
            if not cut:
                return "nothing left to crop"
            self.cache.crop(-cut)
            self.key = self.key[:, :, : n - cut]
            if data.draw(st.booleans()):
                # Other keys in the place of those cropped, from a call that attends densely: moments don't hear of it.
                new = make_keys(self.kind, (batch, 2, cut, 8), seed=self.seed + 1000)
                self.key, _ = self.cache.update(new, new, 0)
                what += ", replaced unseen"
        elif what == "reset":
            self.cache.reset()
            assert self.cache.get_seq_length() in (0, n)  # transformers 5.17 keeps the length, of zeros
            self.key = torch.zeros_like(self.key)[:, :, : self.cache.get_seq_length()]
        elif what == "reorder":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
            self.cache.reorder_cache(rows)
        elif what == "select":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
            self.cache.batch_select_indices(rows)
        elif batch < 4:
            self.cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2)
        self.key, self.pads = self.key[rows], self.pads[rows]
        return what


@given(st.data())
def test_running_moments_equal_recomputation_after_any_sequence_of_changes(data: st.DataObject) -> None:
    local = data.draw(LOCALS)
    pads = data.draw(st.lists(st.just(0) | st.integers(0, 150), min_size=1, max_size=2))
    talk = Conversation(data.draw(kinds), pads, local, data.draw(st.sampled_from(GROUP_SIZES)), data.draw(SEEDS))
    some = lengths(max_length=300, sink_size=local[0], window_size=local[1])
    talk.append(data.draw(st.integers(300, 650)), bounded=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 6))):
        for _ in range(data.draw(st.integers(0, 2))):
            event(talk.change(data))
        for step in data.draw(
            st.sampled_from([[1], [1, 1, 1], [2, 1], [127, 1, 1]]) | st.lists(some, min_size=1, max_size=2)
        ):
            talk.append(step, bounded=data.draw(st.booleans()))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), LOCALS, kinds, SEEDS, st.sampled_from([0, 10, 129]))
def test_cutting_a_prompt_into_calls_changes_nothing(
    cuts: list[int], local: tuple[int, int], kind: KeyKind, seed: int, pad: int
) -> None:
    length = min(sum(cuts), 900)
    key = make_keys(kind, (2, 2, length, 8), seed=seed)
    query = make_keys("gaussian", (2, 6, length, 8), seed=seed + 1)
    valid = torch.stack([torch.arange(length) >= skip for skip in (0, pad)])

    def regions(begin: int, end: int) -> Regions:
        return Regions.of(valid[:, :end], query_length=end - begin, sink_size=local[0], window_size=local[1])

    whole, final = bulk_log_mass_from_prompt(AttentionInputs(query, key, key, regions(0, length), 0.25))
    state, begin, parts = None, 0, []
    for cut in cuts:
        end = min(begin + cut, length)
        if end == begin:
            break
        keys = key[:, :, :end]
        inputs = AttentionInputs(query[:, :, begin:end], keys, keys, regions(begin, end), 0.25)
        part, state = bulk_log_mass_from_prompt(inputs, state)
        parts.append(part)
        begin = end
    assert state is not None
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.outer, final.outer, rtol=1e-9, atol=1e-9)
    assert torch.equal(state.chunks, final.chunks)


@given(kinds, LOCALS, st.integers(1, 300) | st.sampled_from([127, 128, 129]), SEEDS)
@settings(max_examples=settings().max_examples // 2)
def test_left_padding_of_any_amount_changes_nothing(kind: KeyKind, local: tuple[int, int], pad: int, seed: int) -> None:
    key, query = make_keys(kind, (1, 2, 500, 8), seed=seed), make_keys("gaussian", (1, 4, 500, 8), seed=seed + 1)

    def mass(skip: int) -> Tensor:
        # What lies in the padding is neither zero nor small.
        queries, keys = (torch.cat([100 + x[:, :, :skip].flip(2), x], dim=2) for x in (query, key))
        valid = torch.arange(500 + skip)[None] >= skip
        sizes: dict[str, Any] = {"sink_size": local[0], "window_size": local[1]}
        regions = Regions.of(valid, query_length=500 + skip, **sizes)
        return bulk_log_mass_from_prompt(AttentionInputs(queries, keys, keys, regions, 0.25))[0]

    torch.testing.assert_close(mass(pad)[:, :, pad:], mass(0), rtol=1e-9, atol=1e-9)
