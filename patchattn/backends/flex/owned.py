"""Which blocks of a store of pages each row reads, and what of them: page tables as FlexAttention takes them.

The keys and values of a layer are one sequence, in the order in which they lie, the same for all rows. What of them is
a row's own says its page table. A block is a page, or a part of one. Both passes have partial lists only, by which flex
decoding splits its work; the list of bulk blocks of a KV head that is closed is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from patchattn.backends.flex.call import Settings
from patchattn.backends.flex.masks import Lists, pinned

_LARGEST_BLOCK = 128  # keys


@dataclass(frozen=True)
class Layout:
    """How a store is laid out, which a graph is specialised on.

    Args:
        page_size: Keys of a page.
        stride: Places from one page to the next.
        places: Places of the store.
    """

    page_size: int
    stride: int
    places: int

    @property
    def block(self) -> int:
        """Keys of a block: the largest power of two, up to 128, of which a page is made."""
        return min(self.page_size & -self.page_size, _LARGEST_BLOCK)

    @property
    def n_pages(self) -> int:
        """Pages of the store."""
        return -(-self.places // self.stride)


class Owned(NamedTuple):
    """What is whose, the same for all layers. Rows that have no keys fill up.

    Args:
        rows: [rows] int64; which rows of the step.
        lengths: [rows + 1] int32; keys of each row. Inductor fails on captured tensors of one element.
        asked: [rows] bool.
        n_bulk: [rows] int32; bulk keys of each row.
        page_of: [rows, pages + 1] int32; which page of the row's own each page of the store is, -1 where it is of none.
        local: Blocks of sink and window, [rows, 1, 1, ...].
        bulk_counts: [rows, 1, 1] int32; blocks of bulk keys.
        bulk_indices: [rows, kv_heads, 1, blocks] int32; those blocks, in order.
    """

    rows: Tensor
    lengths: Tensor
    asked: Tensor
    n_bulk: Tensor
    page_of: Tensor
    local: Lists
    bulk_counts: Tensor
    bulk_indices: Tensor

    @classmethod
    def of(
        cls, settings: Settings, layout: Layout, numbers: Tensor, places: Tensor, steps: Tensor, kv_heads: int
    ) -> Owned:
        """Build from a page table.

        Args:
            settings: Sink and window.
            layout: That of the store.
            numbers: See `PageTable`.
            places: See `PageTable`.
            steps: 0, 1, ... up to the number of blocks of the longest row, int64.
            kv_heads: Number of KV heads.
        """
        block, sink, window = layout.block, settings.sink_size, settings.window_size
        rows, first_key, length, asked = numbers
        begins = steps * block
        at = places[(first_key[:, None] + begins).clamp(max=len(places) - 1)]
        exists, blocks = begins < length[:, None], at // block
        # Whatever has no place goes behind the last page.
        page = torch.where(exists, at // layout.stride, layout.n_pages)
        page_of = torch.full((len(rows), layout.n_pages + 1), -1, dtype=torch.int32, device=at.device)
        page_of = page_of.scatter(1, page, (begins // layout.page_size).int().expand_as(page))

        def listed(order: Tensor) -> Tensor:
            return blocks.gather(1, order.clamp(max=len(steps) - 1)).int()[:, None, None]

        n_blocks = -(-length // block)
        n_sink = n_blocks.clamp(max=-(-sink // block))
        window_begin = torch.maximum((length - window).clamp(min=0) // block, n_sink)
        slots = torch.arange(-(-sink // block) + -(-window // block) + 1, device=at.device)
        behind = window_begin[:, None] + slots - n_sink[:, None]
        local = listed(torch.where(slots < n_sink[:, None], slots, behind))
        n_local = n_sink + n_blocks - window_begin

        n_bulk = (length - sink - window).clamp(min=0)
        n_bulk_blocks = torch.where(n_bulk > 0, -(-(length - window) // block) - sink // block, 0)
        bulk = listed((sink // block + steps).expand_as(at)).expand(-1, kv_heads, -1, -1)
        return cls(
            rows,
            pinned(F.pad(length.int(), (0, 1))),
            asked > 0,
            n_bulk.int(),
            pinned(page_of),
            Lists(pinned(n_local.int()[:, None, None]), pinned(local)),
            n_bulk_blocks.int()[:, None, None],
            pinned(bulk),
        )

    def mark_dynamic(self) -> Owned:
        """Mark the number of blocks of the longest row as dynamic."""
        torch._dynamo.maybe_mark_dynamic(self.bulk_indices, 3)
        return self

    def block_mask(
        self, settings: Settings, layout: Layout, group: int, bulk_counts: Tensor | None = None
    ) -> BlockMask:
        """Mask for the local keys, or with counts of blocks, [rows, kv_heads, 1], for the bulk keys."""
        page_of, lengths, size, stride = self.page_of, self.lengths, layout.page_size, layout.stride
        sink, window = settings.sink_size, settings.window_size

        def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            page, within = page_of[b, key // stride], key % stride
            position, end = page * size + within, lengths[b]
            is_own = (page >= 0) & (within < size) & (position < end)
            is_local = (position < sink) | (position >= end - window)
            return is_own & (is_local if bulk_counts is None else ~is_local)

        lists = self.local if bulk_counts is None else Lists(bulk_counts, self.bulk_indices)
        return lists.block_mask(mask, layout.block, (group, layout.places))
