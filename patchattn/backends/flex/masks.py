"""Token masks and block lists of FlexAttention, built in the graph from the decisions of a call.

A *row* is a (query, head in group) pair: `[batch, heads, query, dim]` becomes `[batch, kv_heads, query * group, dim]`,
so that the heads of a group share their keys, and decode is a call with `group` rows. A *tile* is `ROW_TILE` rows, a
*block* a run of keys. A tile reads the blocks of its lists: those of the full list unmasked, those of the partial list
through the token mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

ROW_TILE = 128
_SMALLEST_BLOCK = 128
_LARGEST_LIST = 8 * 2**20  # bytes; a pass has two lists of blocks, so 16 MiB together
_BEYOND = 2**30  # larger than any slot


class Lists(NamedTuple):
    """The blocks that each tile reads: counts [batch, heads, tiles] and indices [batch, heads, tiles, blocks], int32.

    Args:
        counts, indices: Of the partial list.
        full_counts, full_indices: Of the full list; None where all blocks are in the partial one.
    """

    counts: Tensor
    indices: Tensor
    full_counts: Tensor | None = None
    full_indices: Tensor | None = None

    @classmethod
    def of(cls, partly: Tensor, fully: Tensor, *, with_full: bool) -> Lists:
        """List blocks in their order.

        Args:
            partly: [batch, heads, tiles, blocks] bool; the blocks that are visited.
            fully: The same shape; those that need no mask.
            with_full: Make a full list.
        """
        return cls(*_listed(partly & ~fully), *_listed(partly & fully)) if with_full else cls(*_listed(partly))

    def block_mask(self, mask: Callable[..., Tensor], block: int, lengths: tuple[int, int]) -> BlockMask:
        """Make the block mask for `lengths`, rows and keys."""
        return BlockMask.from_kv_blocks(
            *self, BLOCK_SIZE=(ROW_TILE, block), mask_mod=mask, seq_lengths=lengths, compute_q_blocks=False
        )

    def n_visited(self) -> Tensor:
        """Count the blocks of both lists, [batch, heads, tiles] int32."""
        return self.counts if self.full_counts is None else self.counts + self.full_counts


@dataclass(frozen=True)
class RowMasks:
    """What each row may read, in the form that kernels read it.

    Args:
        window_size: Number of last tokens that are always attended.
        n_rows: Number of rows, before they are padded to whole tiles.
        slots: [tiles * ROW_TILE] int32; slot of each row, -1 where there is no query.
        sink_end: [batch] int32, at least 2 entries; slot behind the sink.
        valid: [batch, keys] bool; False where the key is padding.
        n_before: [batch, keys + 1] int32; number of real keys before each slot.
    """

    window_size: int
    n_rows: int
    slots: Tensor
    sink_end: Tensor
    valid: Tensor
    n_before: Tensor

    @classmethod
    def of(
        cls, valid: Tensor, first: Tensor, slots: Tensor, *, group: int, sink_size: int, window_size: int
    ) -> RowMasks:
        """Build the masks of a call.

        Args:
            valid: [batch, keys] bool.
            first: [batch]; slot of the first real token.
            slots: [query]; slot of each query, -1 where there is none.
            group: Number of query heads that share a KV head.
            sink_size: Number of first tokens that are always attended.
            window_size: Number of last tokens that are always attended.
        """
        n_rows = slots.shape[0] * group
        rows = slots.int()[:, None].expand(-1, group).reshape(-1)
        rows = F.pad(rows, (0, _up_to_multiple(n_rows, ROW_TILE) - n_rows), value=-1)
        n_before = F.pad(valid.cumsum(1, dtype=torch.int32), (1, 0))
        # Inductor fails on captured tensors of one element.
        sink_end = F.pad((first + sink_size).clamp(max=_BEYOND).int(), (0, 1))
        return cls(window_size, n_rows, pinned(rows), pinned(sink_end), valid, n_before)

    def n_bulk_keys(self) -> Tensor:
        """Count the real bulk keys of each row, open or closed, [batch, rows] int32."""
        return (self._before(self.slots + 1 - self.window_size) - self._before_sink_end()).clamp(min=0)

    def n_local_keys(self) -> Tensor:
        """Count the real local keys of each row, [batch, rows] int32."""
        return self._before(self.slots + 1) - self.n_bulk_keys()

    def _before(self, slots: Tensor) -> Tensor:
        index = slots[: self.n_rows].clamp(0, self.valid.shape[1]).long()
        return self.n_before.index_select(1, index)

    def _before_sink_end(self) -> Tensor:
        index = self.sink_end[: self.valid.shape[0]].clamp(max=self.valid.shape[1]).long()
        return self.n_before.gather(1, index[:, None])

    def local(self, *, block: int, with_full: bool) -> Lists:
        """List the blocks of the local keys."""
        return Lists.of(*_Blocks.of(self, block).local(), with_full=with_full)

    def real(self, block: int) -> Tensor:
        """Return `valid` as kernels read it, [batch, keys in whole blocks] int32."""
        keys = self.valid.shape[1]
        return pinned(F.pad(self.valid.int(), (0, _up_to_multiple(keys, block) - keys)))

    def rows_per_tile(self) -> Tensor:
        """Count the rows of each tile that are not padding, [tiles] int64."""
        return (self.slots >= 0).unflatten(0, (-1, ROW_TILE)).sum(1)

    def bulk_is_solid(self) -> Tensor:
        """Say of which sequences no bulk key of any row is padding, [batch] bool."""
        last = (self.slots.amax() - self.window_size).clamp(-1, self.valid.shape[1] - 1).long()
        begin = self._before_sink_end()[:, 0]
        n_slots = last + 1 - self.sink_end[: self.valid.shape[0]]
        return self.n_before.index_select(1, last[None] + 1)[:, 0] - begin == n_slots.clamp(min=0)

    def both(self, bulk_end: Tensor, *, block: int, null_key: bool) -> tuple[BlockMask, Tensor]:
        """Mask for the local keys of all rows and the bulk keys of the open ones.

        Args:
            bulk_end: What `bulk_end` returned.
            block: Keys per block.
            null_key: Let every row read the last key, whatever it is: the one that stands for the sink logits.

        Returns:
            The block mask, and the number of scored (query head, query, key) triples per mask head, [batch, kv_heads]
            int64: whole blocks for each row that is not padding.
        """
        blocks = _Blocks.of(self, block)
        slots, sink_end, valid, window = self.slots, self.sink_end, self.real(block), self.window_size
        null = self.valid.shape[1] - 1

        def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            near = (key < sink_end[b]) | (key > slots[row] - window) | (key <= bulk_end[b, h, row])
            attended = (valid[b, key] != 0) & (key <= slots[row]) & near
            return attended | (key == null) if null_key else attended

        partly, fully = blocks.both(bulk_end)
        if null_key:
            last = torch.arange(partly.shape[-1], device=partly.device) == null // block
            partly = partly | last & (blocks.last >= 0)[:, None]
        lists = Lists.of(partly, fully, with_full=True)
        scored = (partly.sum(-1) * self.rows_per_tile()).sum(-1) * block
        return lists.block_mask(mask, block, (self.n_rows, self.valid.shape[1])), scored


@dataclass(frozen=True)
class _Blocks:
    """Tiles against blocks: what may be visited at all, and what is visible without a mask.

    Args:
        masks: The row masks.
        first, last: [tiles] int32; smallest and largest slot of each tile's rows; last is -1 in a tile without any.
        begin, end: [blocks] int32; first and last slot of each block.
        sink_end: [batch, 1, 1, 1] int32.
        some, whole: [batch, 1, 1, blocks] bool; the block has a real key, has no padding.
    """

    masks: RowMasks
    first: Tensor
    last: Tensor
    begin: Tensor
    end: Tensor
    sink_end: Tensor
    some: Tensor
    whole: Tensor

    @classmethod
    def of(cls, masks: RowMasks, block: int) -> _Blocks:
        keys = masks.valid.shape[1]
        slots = masks.slots.unflatten(0, (-1, ROW_TILE))
        begin = torch.arange(0, _up_to_multiple(keys, block), block, device=slots.device, dtype=torch.int32)
        end = begin + block
        count = masks.n_before.index_select(1, end.clamp(max=keys)) - masks.n_before.index_select(1, begin)
        count = count[:, None, None]
        sink_end = masks.sink_end[: masks.valid.shape[0], None, None, None]
        first = torch.where(slots < 0, _BEYOND, slots).amin(1)
        return cls(masks, first, slots.amax(1), begin, end - 1, sink_end, count > 0, count == block)

    def local(self) -> tuple[Tensor, Tensor]:
        """Visited and full blocks of the local keys, [batch, 1, tiles, blocks] bool."""
        first, last, window = self.first[:, None], self.last[:, None], self.masks.window_size
        near = (self.begin < self.sink_end) | (self.end > first - window)
        all_near = (self.end < self.sink_end) | (self.begin > last - window)
        return self.some & (self.begin <= last) & near, self.whole & (self.end <= first) & all_near

    def both(self, bulk_end: Tensor) -> tuple[Tensor, Tensor]:
        """Visited and full blocks of local and open bulk keys, [batch, kv_heads, tiles, blocks] bool."""
        local, all_local = self.local()
        ends = bulk_end.unflatten(-1, (-1, ROW_TILE))
        bulk = self.some & (self.end >= self.sink_end) & (self.begin <= ends.amax(-1, keepdim=True))
        # Closed rows must not read a block of the full list either; padded rows may.
        counted = (self.masks.slots >= 0).unflatten(-1, (-1, ROW_TILE))
        shortest = torch.where(counted, ends, _BEYOND).amin(-1, keepdim=True)
        all_bulk = self.whole & (self.begin >= self.sink_end) & (self.end <= shortest)
        # A block may be visible as a whole although it lies across the borders of sink, bulk and window.
        opened = (shortest >= 0) & (shortest == (self.first - self.masks.window_size)[:, None])
        fully = all_local | all_bulk | (self.whole & opened & (self.end <= self.first[:, None]))
        return local | bulk, fully


def bulk_end(opened: Tensor, slots: Tensor, window_size: int, order: Tensor | None = None) -> Tensor:
    """Find the last bulk slot that each row reads, [batch, kv_heads, tiles * ROW_TILE] int32; -1 where closed.

    Args:
        opened: [batch, kv_heads, rows] bool.
        slots: [tiles * ROW_TILE] int32; see `RowMasks`.
        window_size: Number of last tokens that are always attended.
        order: [batch, kv_heads, rows] int64; the row at each place if they are moved, see `open_first`.
    """
    n_rows = opened.shape[2]
    ends = torch.where(opened, slots[:n_rows] - window_size, -1)
    ends = ends if order is None else ends.gather(2, order)
    return pinned(F.pad(ends, (0, slots.shape[0] - n_rows), value=-1))


def open_first(opened: Tensor) -> tuple[Tensor, Tensor]:
    """Order rows so that the open ones of each KV head come first; both parts keep their order.

    With the open rows together, a pass reads the bulk keys of as many tiles as open rows fill, wherever they came from,
    and each tile's keys stay one contiguous range.

    Args:
        opened: [batch, kv_heads, rows] bool.

    Returns:
        The row at each place and the place of each row, both [batch, kv_heads, rows] int64.
    """
    count = opened.cumsum(2)
    rows = torch.arange(opened.shape[2], device=opened.device).expand(opened.shape)
    place = torch.where(opened, count - 1, count[:, :, -1:] + rows - count)
    return torch.zeros_like(place).scatter(2, place, rows), place


def block_size(batch: int, heads: int, rows: int, keys: int) -> int:
    """Choose the keys per block: 128, doubled until a pass's lists of blocks fit in 16 MiB."""
    tiles, block = -(-rows // ROW_TILE), _SMALLEST_BLOCK
    while batch * heads * tiles * (keys // block) * 4 > _LARGEST_LIST:
        block *= 2
    return block


@torch.library.custom_op("patchattn::flex_pinned", mutates_args=())
def pinned(x: Tensor) -> Tensor:
    """Copy a tensor that a kernel reads into a contiguous layout that the compiler can't change.

    Kernels assume the strides that they were traced with, but Inductor may choose others, even behind `contiguous()`
    and `as_strided()`: on CPU that gives wrong numbers in silence (torch 2.13). It leaves the result of an opaque
    operator alone.
    """
    return x.clone(memory_format=torch.contiguous_format)


@pinned.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _listed(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Count and list the True blocks of each tile, in order: [..., tiles] and [..., tiles, blocks] int32."""
    blocks = listed.shape[-1]
    place = torch.where(listed, listed.cumsum(-1, dtype=torch.int32) - 1, blocks).long()
    index = torch.arange(blocks, device=listed.device, dtype=torch.int32).expand(listed.shape)
    room = torch.zeros(*listed.shape[:-1], blocks + 1, device=listed.device, dtype=torch.int32)
    return pinned(listed.sum(-1, dtype=torch.int32)), pinned(room.scatter(-1, place, index)[..., :blocks])


def _up_to_multiple(n: int, step: int) -> int:
    return -(-n // step) * step
