"""What all layers of a forward pass share: everything about a slab of queries that no gate decides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from patchattn.backends.flex.call import Settings
from patchattn.backends.flex.masks import ROW_TILE, Lists, RowMasks, block_size, bulk_end, pinned


class Shared(NamedTuple):
    """The tensors of two passes over one slab that are the same for every layer; rows and lists as in `masks`.

    Args:
        slots: [tiles * ROW_TILE] int32; see `RowMasks`.
        sink_end: [batch + 1] int32; see `RowMasks`.
        real: [batch, keys in whole blocks] int32; 0 where the key is padding.
        asked, unasked: [batch, rows] bool; see `Regions`.
        has_local, has_bulk: [batch, rows] bool; whether there are such keys.
        local: Blocks of the local keys.
        local_scored: [] int64; (query head, query, key) triples that the local pass scores.
        rows_per_tile: [tiles] int64; rows that are not padding.
        is_solid: [batch] bool; whether no bulk key of any row is padding.
        bulk_count: [batch, 1, tiles] int32; bulk blocks that a tile with an open row visits. Of no use where rows are
            moved.
        bulk_index: [batch, kv_heads, tiles, blocks] int32; the blocks that may be full, in order; all that may be
            visited where there is no full list.
    """

    slots: Tensor
    sink_end: Tensor
    real: Tensor
    asked: Tensor
    unasked: Tensor
    has_local: Tensor
    has_bulk: Tensor
    local: Lists
    local_scored: Tensor
    rows_per_tile: Tensor
    is_solid: Tensor
    bulk_count: Tensor
    bulk_index: Tensor

    @classmethod
    def of(
        cls,
        settings: Settings,
        valid: Tensor,
        first: Tensor,
        slots: Tensor,
        asked: Tensor,
        unasked: Tensor,
        *,
        heads: int,
        kv_heads: int,
    ) -> Shared:
        """Compute what is shared.

        Args:
            settings: Sink and window.
            valid: [batch, keys] bool.
            first: [batch]; slot of the first real token.
            slots: [query]; slot of each query.
            asked: [batch, query] bool.
            unasked: [batch, query] bool.
            heads: Number of query heads.
            kv_heads: Number of KV heads.
        """
        (batch, keys), group = valid.shape, heads // kv_heads
        masks = RowMasks.of(
            valid, first, slots, group=group, sink_size=settings.sink_size, window_size=settings.window_size
        )
        with_full, block = has_full_list(masks.n_rows), block_size(batch, kv_heads, masks.n_rows, keys)
        of_local = block_size(batch, 1, masks.n_rows, keys)
        local, rows_per_tile = masks.local(block=of_local, with_full=with_full), masks.rows_per_tile()
        n_bulk, by_row = masks.n_bulk_keys(), [x[:, :, None].expand(-1, -1, group).flatten(1) for x in (asked, unasked)]
        begin = -(-masks.sink_end[:batch] // block) if with_full else masks.sink_end[:batch] // block
        longest = masks.slots.unflatten(0, (-1, ROW_TILE)).amax(1) - settings.window_size
        n_blocks = -(-keys // block)
        index = begin[:, None] + torch.arange(n_blocks, device=valid.device, dtype=torch.int32)
        index = index.clamp(max=n_blocks - 1)[:, None, None].expand(-1, kv_heads, len(rows_per_tile), -1)
        return cls(
            masks.slots,
            masks.sink_end,
            masks.real(block),
            by_row[0],
            by_row[1],
            masks.n_local_keys() > 0,
            n_bulk > 0,
            local,
            (local.n_visited() * rows_per_tile).sum() * (of_local * kv_heads),
            rows_per_tile,
            masks.bulk_is_solid(),
            _n_blocks(longest[None, None], masks.sink_end[:batch, None, None], block),
            pinned(index),
        )

    def mark_dynamic(self, *, queries: bool) -> Shared:
        """Mark the lengths as dynamic: those of keys, and of `queries` where there are many."""
        axes = [(self.real, 1), (self.local.indices, 3), (self.local.full_indices, 3), (self.bulk_index, 3)]
        if queries:
            axes += [(self.slots, 0), (self.rows_per_tile, 0), (self.bulk_count, 2), (self.bulk_index, 2)]
            axes += [(x, 1) for x in (self.asked, self.unasked, self.has_local, self.has_bulk)]
            axes += [(x, 2) for x in self.local]
        for x, axis in axes:
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, axis)
        return self

    def local_mask(self, window_size: int, keys: int) -> BlockMask:
        """Mask for the local keys of all rows.

        Args:
            window_size: Number of last tokens that are always attended.
            keys: Number of key slots.
        """
        slots, sink_end, real = self.slots, self.sink_end, self.real

        def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            near = (key < sink_end[b]) | (key > slots[row] - window_size)
            return (real[b, key] != 0) & (key <= slots[row]) & near

        batch, rows = self.asked.shape
        return self.local.block_mask(mask, block_size(batch, 1, rows, keys), (rows, keys))

    def bulk_mask(
        self, reads_bulk: Tensor, order: Tensor | None, window_size: int, keys: int
    ) -> tuple[BlockMask, Tensor]:
        """Mask for the bulk keys of the open rows: of each tile, from the end of the sink to the last that a row reads.

        Args:
            reads_bulk: [batch, kv_heads, rows] bool.
            order: [batch, kv_heads, rows] int64; the row at each place if they are moved, see `open_first`. None of a
                call without full lists.
            window_size: Number of last tokens that are always attended.
            keys: Number of key slots.

        Returns:
            The block mask; what closed rows read is undefined. And the number of scored (query head, query, key)
            triples, [] int64.
        """
        slots, sink_end, real = self.slots, self.sink_end, self.real
        batch, kv_heads, rows = reads_bulk.shape
        block = block_size(batch, kv_heads, rows, keys)
        if order is None:
            count = torch.where(reads_bulk.any(2, keepdim=True), self.bulk_count, 0)
            lists, ends = Lists(count, self.bulk_index), None
        else:
            ends = bulk_end(reads_bulk, slots, window_size, order)
            lists = self._bulk_lists(ends, block)

        def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            end = slots[row] - window_size if ends is None else ends[b, h, row]
            return (real[b, key] != 0) & (key >= sink_end[b]) & (key <= end)

        return lists.block_mask(mask, block, (rows, keys)), (lists.n_visited() * self.rows_per_tile).sum() * block

    def _bulk_lists(self, ends: Tensor, block: int) -> Lists:
        ends = ends.unflatten(-1, (-1, ROW_TILE))
        sink_end, longest = self.sink_end[: len(self.is_solid), None, None], ends.amax(-1)
        first, count = sink_end // block, _n_blocks(longest, sink_end, block)
        # Of the visited blocks the first may hold keys of the sink, and those behind the shortest row need the mask.
        across = (sink_end % block > 0).int()
        shortest = torch.where(ends >= 0, ends, torch.iinfo(torch.int32).max - 1).amin(-1)
        n_full = ((shortest + 1) // block - first - across).clamp(min=0)
        n_full = torch.where(self.is_solid[:, None, None] & (count > 0), n_full, 0)
        places = torch.arange(self.bulk_index.shape[3], device=ends.device, dtype=torch.int32)
        behind = (first + n_full)[..., None] + places
        index = torch.where(places < across[..., None], first[..., None], behind).clamp(max=len(places) - 1)
        return Lists(count - n_full, index.int(), n_full, self.bulk_index)


def _n_blocks(longest: Tensor, sink_end: Tensor, block: int) -> Tensor:
    """Count the blocks from the end of the sink to the longest row's last bulk slot."""
    return torch.where(longest >= sink_end, longest // block + 1 - sink_end // block, 0).int()


def has_full_list(rows: int) -> bool:
    """Say whether a call's full blocks have a list: flex decoding splits that by the length of all keys."""
    return rows >= ROW_TILE
