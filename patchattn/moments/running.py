"""Running moments of a sequence's own bulk keys, kept up as it grows.

They stand on a fixed grid of chunks, so that the answer does not depend on how a sequence was cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchattn.call.regions import Regions, host_may_read
from patchattn.moments.gaussian import CHUNK, KeyMoments, accumulator

# Chunks at a time: on a CPU what is made of them stays in the caches, elsewhere few calls count for more. 4,096 queries
# have 32 chunks, and a part of one more at either end.
_CHUNKS_PER_SLAB_ON_HOST, _CHUNKS_PER_SLAB = 4, 34
_CHUNK_AXES = (1, 1, 2, 2, 2)  # of the parts of `PromptMoments.prefixes`


@dataclass(frozen=True)
class PromptMoments:
    """Running moments of each sequence's own bulk keys, on a fixed grid of chunks.

    At a query with `n_bulk` bulk keys they cover the first `CHUNK * floor(n_bulk / CHUNK)` of them, so the answer does
    not depend on how the sequence was cut into calls. Sums are taken of `key - reference`, which keeps keys with a
    large mean exact. Appending keys never makes them wrong; cropping below the covered keys does, and is seen because
    the grid then asks for fewer chunks than there are.

    Args:
        chunks: [batch] int64; complete chunks of bulk keys that the sums cover.
        count: [batch]; real keys among them.
        reference: [batch, kv_heads, dim]; the first bulk key.
        total: [batch, kv_heads, dim]; sum of `key - reference`.
        outer: [batch, kv_heads, dim, dim]; sum of `(key - reference) (key - reference)^T`.
    """

    chunks: Tensor
    count: Tensor
    reference: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, key: Tensor) -> PromptMoments:
        """Return moments that cover nothing, for keys of shape [batch, kv_heads, keys, dim]."""
        batch, kv_heads, _, dim = key.shape
        zeros = key.new_zeros(batch, kv_heads, dim, dtype=accumulator(key))
        nothing = torch.zeros(batch, dtype=torch.long, device=key.device)
        # In plain strides, which are a part of what a graph is compiled for.
        outer = zeros.new_zeros(batch, kv_heads, dim, dim)
        return cls(nothing, zeros.new_zeros(batch), zeros, zeros.clone(), outer)

    def select(self, rows: Tensor) -> PromptMoments:
        """Return the moments of the given batch rows, in that order."""
        return PromptMoments(*(part.index_select(0, rows.to(part.device)) for part in self.parts))

    def to(self, device: torch.device) -> PromptMoments:
        """Return the moments on a device."""
        return PromptMoments(*(part.to(device) for part in self.parts))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors, in the order in which they are given."""
        return self.chunks, self.count, self.reference, self.total, self.outer

    @cached_property
    def key_moments(self) -> KeyMoments:
        """What `as_key_moments` returns, computed once; not for compiled code."""
        return self.as_key_moments()

    def as_key_moments(self) -> KeyMoments:
        """Return count, mean and covariance of the covered keys."""
        divisor = self.count.clamp(min=1)[:, None, None]
        shift = self.total / divisor
        covariance = self.outer / divisor[..., None] - shift[..., :, None] * shift[..., None, :]
        return KeyMoments(self.count[:, None].expand(self.total.shape[:2]), self.reference + shift, covariance)

    def of_scores(self, scale: float) -> Tensor:
        """Covariance and mean of keys, times `scale**2` and `scale`, [batch * kv_heads, dim, dim + 1].

        One product with a query gives the mean of its scores, and with the query again their variance. Kept for the
        next call with the same scale; not for compiled code.
        """
        if self.__dict__.get("_scale") != scale:
            moments = self.key_moments
            both = torch.cat([moments.covariance * scale**2, moments.mean[..., None] * scale], dim=-1)
            self.__dict__.update(_scale=scale, _of_scores=both.flatten(0, 1))
        return self.__dict__["_of_scores"]

    @cached_property
    def _chunks_on_host(self) -> list[int]:
        return self.chunks.tolist()

    def is_complete(self, regions: Regions) -> bool:
        """Say whether the sums cover exactly what the last query asks for, in every row; reads the device."""
        needed = [n // CHUNK for n in regions.last_n_bulk]
        return self._chunks_on_host == needed and min(needed, default=0) > 0

    def rewound(self, chunks: Tensor) -> PromptMoments:
        """Start afresh in the rows that cover more than `chunks` [batch] chunks: their keys may have been replaced."""
        keep = self.chunks <= chunks
        return PromptMoments(*(torch.where(keep.view(-1, *[1] * (p.dim() - 1)), p, 0) for p in self.parts))

    def prefixes(self, key: Tensor, regions: Regions, upto: Tensor, n_chunks: int) -> PromptMoments:
        """Continue the sums chunk by chunk.

        Args:
            key: [batch, kv_heads, keys, dim]; all keys so far.
            regions: Sink, window and padding of the call.
            upto: [batch]; no row goes beyond this number of chunks.
            n_chunks: Number of chunks to go on by; rows that reach `upto` earlier stand still.

        Returns:
            Moments whose parts have a further axis of length `n_chunks + 1` at the end of the leading ones
            (after batch, or after batch and KV heads): entry `g` covers `min(chunks + g, upto)` chunks.
        """
        reference, real, x = self._next_keys(key, regions, upto, n_chunks)

        def running(start: Tensor, steps: Tensor, axis: int) -> Tensor:
            return torch.cat([start.unsqueeze(axis), steps], dim=axis).cumsum(axis)

        steps = torch.arange(n_chunks + 1, device=key.device)
        return PromptMoments(
            chunks=torch.minimum(self.chunks[:, None] + steps, torch.maximum(upto, self.chunks)[:, None]),
            count=running(self.count, real.sum(-1).to(self.count.dtype), 1),
            reference=reference[:, :, None].expand(-1, -1, n_chunks + 1, -1),
            total=running(self.total, x.sum(3), 2),
            outer=running(self.outer, x.mT @ x, 2),
        )

    def _next_keys(self, key: Tensor, regions: Regions, upto: Tensor, n_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take the keys of the next chunks.

        Returns:
            The reference [batch, kv_heads, dim]; which keys count [batch, chunks, CHUNK] bool; the keys relative to the
            reference [batch, kv_heads, chunks, CHUNK, dim], zero where they do not count.
        """
        first_bulk = regions.first + regions.sink_size
        first_bulk_key = take(key, first_bulk[:, None])[:, :, 0].to(self.total.dtype)
        fresh = (self.chunks == 0)[:, None, None]
        reference = torch.where(fresh, first_bulk_key, self.reference)

        begin = first_bulk + CHUNK * self.chunks
        slots = begin[:, None] + torch.arange(n_chunks * CHUNK, device=key.device)
        inside = slots < (first_bulk + CHUNK * upto)[:, None]
        real = inside & regions.valid.gather(1, slots.clamp(max=regions.key_length - 1))
        x = span(key, begin, n_chunks * CHUNK) - reference[:, :, None]
        if not (host_may_read(key) and bool(real.all())):
            x = torch.where(real[:, None, :, None], x, 0)
        return reference, real.unflatten(1, (n_chunks, CHUNK)), x.unflatten(2, (n_chunks, CHUNK))

    def with_chunk_axis(self) -> PromptMoments:
        """Add the axis that `prefixes` adds, with one entry."""
        return self._along_chunks(lambda part, axis: part.unsqueeze(axis))

    def but_last(self) -> PromptMoments:
        """Drop the last entry of the axis that `prefixes` adds."""
        return self._along_chunks(lambda part, axis: part.narrow(axis, 0, part.shape[axis] - 1))

    def last(self) -> PromptMoments:
        """Take the last entry of the axis that `prefixes` adds."""
        # Clones in plain strides: those of a view depend on the number of chunks, for which a compiled step would be
        # compiled again.
        plain = torch.contiguous_format
        return self._along_chunks(lambda part, axis: part.select(axis, -1).clone(memory_format=plain))

    def _along_chunks(self, change: Callable[[Tensor, int], Tensor]) -> PromptMoments:
        return PromptMoments(*(change(part, axis) for part, axis in zip(self.parts, _CHUNK_AXES, strict=True)))

    def advanced(self, key: Tensor, regions: Regions, upto: Tensor, n_chunks: int) -> PromptMoments:
        """Continue the sums by at most `n_chunks` chunks, to `upto` [batch]; see `prefixes`."""
        moments = self
        for _, step in slabs(n_chunks, key):
            if step == 1:
                moments = moments._by_one(key, regions, upto)
            else:
                moments = moments.prefixes(key, regions, upto, step).last()
        return moments

    def _by_one(self, key: Tensor, regions: Regions, upto: Tensor) -> PromptMoments:
        """Do what `prefixes` does for one chunk, in fewer operations."""
        reference, real, x = self._next_keys(key, regions, upto, 1)
        x = x[:, :, 0]
        products = (x[..., :, None] * x[..., None, :]).sum(2) if fuses_products(x) else x.mT @ x
        return PromptMoments(
            chunks=torch.minimum(self.chunks + 1, torch.maximum(upto, self.chunks)),
            count=self.count + real[:, 0].sum(-1).to(self.count.dtype),
            reference=reference,
            total=self.total + x.sum(2),
            outer=self.outer + products,
        )


def slabs(n_chunks: int, where: Tensor) -> Iterator[tuple[int, int]]:
    """Cut chunks into slabs: the first chunk of each, and how many."""
    most = _CHUNKS_PER_SLAB_ON_HOST if host_may_read(where) else _CHUNKS_PER_SLAB
    return ((begin, min(most, n_chunks - begin)) for begin in range(0, n_chunks, most))


def span(x: Tensor, begin: Tensor, n: int) -> Tensor:
    """Take `n` tokens from `begin` [batch] on, of [batch, heads, tokens, dim]; a view where that is free to see."""
    if host_may_read(x):
        begins = begin.tolist()
        if len(set(begins)) == 1 and 0 <= begins[0] <= x.shape[2] - n:
            return x.narrow(2, begins[0], n)
    return take(x, begin[:, None] + torch.arange(n, device=x.device))


def take(x: Tensor, slots: Tensor) -> Tensor:
    """Gather [batch, heads, tokens, dim] at [batch, n] slots, clamped to the ends."""
    slots = slots.clamp(0, x.shape[2] - 1)
    if x.shape[0] == 1:
        # Copies whole rows, twice as fast as `gather`, which reads an index for each number.
        return x.index_select(2, slots[0])
    index = slots[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def fuses_products(x: Tensor) -> bool:
    """Say whether a product that is written as a sum becomes one kernel with what is around it."""
    return torch.compiler.is_compiling() and x.device.type != "cpu"
