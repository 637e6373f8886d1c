"""Which keys are sink, window and bulk for which query: the algebra every other module builds on.

Words used here and everywhere else:

- A *slot* is an index into the key axis, padding included. A *position* is counted from the sequence's first real
  token, so `position = slot - first`.
- For a query in slot `s` of a sequence that starts in slot `first`, with sink size `S` and window size `W`:
  the *sink* is the slots `first .. first + S - 1`, the *window* the slots `s - W + 1 .. s`, *local* their union, and
  the *bulk* the slots `first + S .. s - W`; all within the causal triangle and without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostRegions:
    """What of the regions the host knows: reading it waits for the device.

    Args:
        first: Slot of each sequence's first real token; the number of slots where it has none.
        query_slot: Slot of the first query row.
        filled: Number of slots up to the last query row; a static cache may hold anything after them.
        last_first: The largest of `first`.
        is_plain: True where no padding lies between the first real token and the last query row of any sequence.
    """

    first: list[int]
    query_slot: int
    filled: int
    last_first: int
    is_plain: bool


@dataclass(frozen=True)
class Counts:
    """What a report needs to know of a call, whatever its gates decide.

    Args:
        above: [batch, query] bool; queries that are asked, those below break-even left out; None where none is below.
        n_above: [] int64; number of them.
        n_below: [] int64; number of queries that have bulk keys but fewer than break-even.
        n_causal: [] int64; (query, key) pairs with a real key that a dense model scores, for one head.
    """

    above: Tensor | None
    n_above: Tensor | int
    n_below: Tensor | int
    n_causal: Tensor | int


@dataclass(frozen=True)
class Regions:
    """Sink, window and bulk of one attention call.

    Args:
        sink_size: Number of first tokens that are always attended.
        window_size: Number of last tokens that are always attended, the query's own included.
        query_length: Number of query rows in the call.
        valid: [batch, keys] bool; False where the key is padding. Padding before the first real token shifts the
            sink; padding after it is never attended and carries no moments, but its slots still count in `n_bulk`,
            which can only open a gate, not close it.
        first: [batch] int64; slot of each sequence's first real token. A row that is all padding has `first = keys`.
        query_slot: [] int64; slot of the first query row. Row `i` sits in slot `query_slot + i`.
    """

    sink_size: int
    window_size: int
    query_length: int
    valid: Tensor
    first: Tensor
    query_slot: Tensor

    @classmethod
    def of(
        cls,
        valid: Tensor,
        *,
        query_length: int,
        sink_size: int,
        window_size: int,
        query_slot: Tensor | int | None = None,
    ) -> Regions:
        """Build the regions of a call from its padding mask.

        Args:
            valid: [batch, keys]; nonzero where the key is real.
            query_length: Number of query rows.
            sink_size: Number of first tokens that are always attended.
            window_size: Number of last tokens that are always attended.
            query_slot: Slot of the first query row; None means that the queries are the last `query_length` slots.
        """
        valid = valid.bool()
        if query_slot is None:
            query_slot = valid.shape[1] - query_length
        slot = torch.as_tensor(query_slot, device=valid.device).long()
        return cls(sink_size, window_size, query_length, valid, first_real_slot(valid), slot)

    @classmethod
    def plain(
        cls,
        sink_size: int,
        window_size: int,
        query_length: int,
        batch: int,
        keys: int,
        device: torch.device,
        slot: int | None = None,
    ) -> Regions:
        """Build the regions of a call without padding whose first query is in `slot`; the host knows them all.

        Without `slot` the queries are the last slots.
        """
        slot = keys - query_length if slot is None else slot
        valid = torch.ones(batch, keys, dtype=torch.bool, device=device)
        first = torch.zeros(batch, dtype=torch.long, device=device)
        query_slot = torch.full((), slot, dtype=torch.long, device=device)
        regions = cls(sink_size, window_size, query_length, valid, first, query_slot)
        regions.__dict__["host"] = HostRegions([0] * batch, slot, min(slot + query_length, keys), 0, is_plain=True)
        return regions

    @property
    def key_length(self) -> int:
        """Number of key slots, those of a static cache that are not filled yet included."""
        return self.valid.shape[1]

    @cached_property
    def host(self) -> HostRegions:
        """The regions on the host, read once; not for compiled code."""
        query_slot = int(self.query_slot)
        filled = min(query_slot + self.query_length, self.key_length)
        first = self.first.tolist()
        n_real = sum(max(filled - begin, 0) for begin in first)
        is_plain = int(self.valid[:, :filled].sum()) == n_real
        return HostRegions(first, query_slot, filled, max(first, default=0), is_plain)

    @cached_property
    def known_asked(self) -> Tensor:
        """Return `asked`, computed once; not for compiled code."""
        return self.asked

    @cached_property
    def last_n_bulk(self) -> list[int]:
        """Number of bulk slots of each sequence's last query row; read on the host, not for compiled code."""
        beyond = self.host.query_slot + self.query_length - self.sink_size - self.window_size
        return [max(beyond - first, 0) for first in self.host.first]

    @cached_property
    def last_log_n_bulk(self) -> Tensor:
        """Natural log of `last_n_bulk`, [batch, 1, 1] float64; not for compiled code."""
        n_bulk = torch.tensor(self.last_n_bulk, dtype=torch.float64, device=self.valid.device)
        return n_bulk.log()[:, None, None]

    @property
    def _slots(self) -> Tensor:
        return torch.arange(self.key_length, device=self.valid.device)

    @property
    def query_slots(self) -> Tensor:
        """Slots of the query rows, [query] int64."""
        return self.query_slot + torch.arange(self.query_length, device=self.valid.device)

    @property
    def positions(self) -> Tensor:
        """Positions of the query rows, [batch, query] int64; negative where the row is padding before the text."""
        return self.query_slots - self.first[:, None]

    @property
    def n_bulk(self) -> Tensor:
        """Number of bulk slots of each query row, [batch, query] int64."""
        return (self.positions + 1 - self.sink_size - self.window_size).clamp(min=0)

    def surely_reach(self, n_bulk: int) -> bool:
        """Say whether every query has at least so many bulk slots; no where the host would have to wait to know."""
        if self.valid.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return self.host.query_slot - self.host.last_first + 1 - self.sink_size - self.window_size >= n_bulk

    @property
    def real(self) -> Tensor:
        """True where a query row is no padding, [batch, query] bool."""
        return self.valid.index_select(1, self.query_slots.clamp(max=self.key_length - 1))

    @property
    def asked(self) -> Tensor:
        """True where the head gate has something to decide: real queries with bulk keys, [batch, query] bool."""
        return (self.n_bulk > 0) & self.real

    @property
    def unasked(self) -> Tensor:
        """True where a query in a padding slot has bulk keys, [batch, query] bool: it reads them without being asked.

        So it does in the stock model, and what it computes may be looked at: a mask that was not extended to a new
        token calls that token padding.
        """
        return (self.n_bulk > 0) & ~self.real

    @cached_property
    def known_unasked(self) -> Tensor | None:
        """Return `unasked`, computed once; None where the host knows of no such query. Not for compiled code."""
        return None if self.host.is_plain else self.unasked

    @property
    def n_causal(self) -> Tensor:
        """Number of real keys that each query row sees in a dense model, [batch, query] int64."""
        return self.valid.cumsum(1).index_select(1, self.query_slots.clamp(max=self.key_length - 1))

    def count(self, break_even: int) -> Counts:
        """Count the queries above and below break-even, and the causal pairs."""
        asked = self.asked
        above = asked & (self.n_bulk >= break_even)
        return Counts(above, above.sum(), (asked & ~above).sum(), self.n_causal.sum())

    def counted(self, break_even: int) -> Counts:
        """Return `count(break_even)`, computed once for each number; not for compiled code."""
        known: dict[int, Counts] = self.__dict__.setdefault("_counted", {})
        if break_even not in known:
            on_host = self.valid.device.type == "cpu" and self.host.is_plain and not any(self.host.first)
            known[break_even] = self._count_plain(break_even) if on_host else self.count(break_even)
        return known[break_even]

    def _count_plain(self, break_even: int) -> Counts:
        """Count on the host, where nothing is padding."""
        batch, begin, end = len(self.host.first), self.host.query_slot, self.host.query_slot + self.query_length

        def with_bulk(least: int) -> int:
            return batch * max(end - max(begin, least + self.sink_size + self.window_size - 1), 0)

        n_above, n_asked = with_bulk(max(break_even, 1)), with_bulk(1)
        n_causal = batch * (end * (end + 1) - begin * (begin + 1)) // 2
        above = None if n_above == n_asked else self.known_asked & (self.n_bulk >= break_even)
        return Counts(above, n_above, n_asked - n_above, n_causal)

    def causal_mask(self, rows: slice = slice(None)) -> Tensor:
        """Keys a dense model attends to, [batch, rows, keys] bool."""
        return self.valid[:, None, :] & (self._slots <= self.query_slots[rows, None])

    def local_mask(self, rows: slice = slice(None)) -> Tensor:
        """Keys in sink or window, [batch, rows, keys] bool."""
        return self.causal_mask(rows) & ~self.beyond_local(self._slots, rows)

    def bulk_mask(self, rows: slice = slice(None)) -> Tensor:
        """Causal keys outside sink and window, [batch, rows, keys] bool."""
        return self.causal_mask(rows) & self.beyond_local(self._slots, rows)

    def beyond_local(self, slots: Tensor, rows: slice = slice(None)) -> Tensor:
        """Slots after the sink and before the window, [batch, rows, slots] bool, whether they are padding or not."""
        past_sink = slots - self.first[:, None] >= self.sink_size
        past_window = self.query_slots[rows, None] - slots >= self.window_size
        return past_sink[:, None, :] & past_window

    def cut(self, begin: int, end: int, keys: int) -> Regions:
        """Return the regions of the query rows from `begin` to `end`, among the first so many key slots."""
        return Regions(
            self.sink_size, self.window_size, end - begin, self.valid[:, :keys], self.first, self.query_slot + begin
        )


def first_real_slot(valid: Tensor) -> Tensor:
    """Slot of the first real token of each row, [batch] int64; the number of slots where a row has none."""
    slots = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid.bool(), slots, valid.shape[1]).amin(dim=1)


def host_may_read(tensor: Tensor) -> bool:
    """Say whether reading a tensor on the host is free: neither in a compiled graph, nor by waiting for a device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
