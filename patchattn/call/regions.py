"""Which keys are sink, window and bulk for which query: the algebra every other module builds on.

Words used here and everywhere else:

- A *slot* is an index into the key axis, padding included. A *position* is counted from the sequence's first real
  token, so `position = slot - first`.
- For a query in slot `s` of a sequence that starts in slot `first`, with sink size `S` and window size `W`:
  the *sink* is the slots `first .. first + S - 1`, the *window* the slots `s - W + 1 .. s`, *local* their union, and
  the *bulk* the slots `first + S .. s - W`; all within the causal triangle and without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


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
    """What a report needs to know of a call, whatever its gates decide; tensors [] int64, or ints on the host.

    Args:
        n_asked: Queries that are asked.
        n_below: Queries that have bulk keys but fewer than break-even.
        n_causal: (query, key) pairs with a real key that a dense model scores, for one head.
    """

    n_asked: Tensor | int
    n_below: Tensor | int
    n_causal: Tensor | int


def _once(compute: Callable[[Regions], Value]) -> Value:
    """Make a property of `Regions.once`."""

    def read(self: Regions) -> Value:
        return self.once(compute.__name__, compute, self)

    return property(read, doc=compute.__doc__)  # pyright: ignore[reportReturnType]


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
        break_even: Queries with fewer bulk slots than this read them without being asked.
        given: What the host knows already; None where it has to read it.
    """

    sink_size: int
    window_size: int
    query_length: int
    valid: Tensor
    first: Tensor
    query_slot: Tensor
    break_even: int = 0
    given: HostRegions | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _in_graph: bool = field(default_factory=torch.compiler.is_compiling, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        valid: Tensor,
        *,
        query_length: int,
        sink_size: int,
        window_size: int,
        query_slot: Tensor | int | None = None,
        break_even: int = 0,
    ) -> Regions:
        """Build the regions of a call from its padding mask.

        Args:
            valid: [batch, keys]; nonzero where the key is real.
            query_length: Number of query rows.
            sink_size: Number of first tokens that are always attended.
            window_size: Number of last tokens that are always attended.
            query_slot: Slot of the first query row; None means that the queries are the last `query_length` slots.
            break_even: Queries with fewer bulk slots than this are not asked.
        """
        valid = valid.bool()
        if query_slot is None:
            query_slot = valid.shape[1] - query_length
        slot = torch.as_tensor(query_slot, device=valid.device).long()
        return cls(sink_size, window_size, query_length, valid, first_real_slot(valid), slot, break_even)

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
        break_even: int = 0,
    ) -> Regions:
        """Build the regions of a call without padding whose first query is in `slot`; the host knows them all.

        Without `slot` the queries are the last slots.
        """
        slot = keys - query_length if slot is None else slot
        valid = torch.ones(batch, keys, dtype=torch.bool, device=device)
        first = torch.zeros(batch, dtype=torch.long, device=device)
        query_slot = torch.full((), slot, dtype=torch.long, device=device)
        given = HostRegions([0] * batch, slot, min(slot + query_length, keys), 0, is_plain=True)
        return cls(sink_size, window_size, query_length, valid, first, query_slot, break_even, given)

    @classmethod
    def right_aligned(
        cls, lengths: list[int], sink_size: int, window_size: int, device: torch.device, break_even: int = 0
    ) -> Regions:
        """Build the regions of a call with one query for each sequence, of so many keys, padded on the left."""
        most = max(lengths)
        begins = [most - length for length in lengths]
        first = torch.tensor(begins, device=device)
        valid = torch.arange(most, device=device) >= first[:, None]
        query_slot = torch.full((), most - 1, dtype=torch.long, device=device)
        given = HostRegions(begins, most - 1, most, max(begins), is_plain=True)
        return cls(sink_size, window_size, 1, valid, first, query_slot, break_even, given)

    def cut(self, begin: int, end: int, keys: int) -> Regions:
        """Return the regions of the query rows from `begin` to `end`, among the first so many key slots."""
        given = None
        if host_may_read(self.valid) and self.host.is_plain and keys >= self.host.query_slot + end:
            slot = self.host.query_slot + begin
            given = replace(self.host, query_slot=slot, filled=min(slot + end - begin, keys))
        return replace(
            self,
            query_length=end - begin,
            valid=self.valid[:, :keys],
            query_slot=self.query_slot + begin,
            given=given,
        )

    def once(self, what: Hashable, compute: Callable[..., Value], *given: Any) -> Value:
        """Return `compute(*given)` of the first time that it is asked for: for a call, whose layers share it.

        A graph that was given the regions computes it at each use: what it finds in them would be a part of the graph.
        """
        if torch.compiler.is_compiling() and not self._in_graph:
            return compute(*given)
        if what not in self._found:
            self._found[what] = compute(*given)
        return self._found[what]

    @property
    def key_length(self) -> int:
        """Number of key slots, those of a static cache that are not filled yet included."""
        return self.valid.shape[1]

    @cached_property
    def host(self) -> HostRegions:
        """The regions on the host, read once; not for compiled code."""
        if self.given is not None:
            return self.given
        query_slot = int(self.query_slot)
        filled = min(query_slot + self.query_length, self.key_length)
        first = self.first.tolist()
        n_real = sum(max(filled - begin, 0) for begin in first)
        is_plain = int(self.valid[:, :filled].sum()) == n_real
        return HostRegions(first, query_slot, filled, max(first, default=0), is_plain)

    @property
    def is_without_padding(self) -> bool:
        """Whether no slot up to the last query's is padding; read on the host, not for compiled code."""
        return self.host.is_plain and not self.host.last_first

    @_once
    def query_slots(self) -> Tensor:
        """Slots of the query rows, [query] int64."""
        return self.query_slot + torch.arange(self.query_length, device=self.valid.device)

    @_once
    def positions(self) -> Tensor:
        """Positions of the query rows, [batch, query] int64; negative where the row is padding before the text."""
        return self.query_slots - self.first[:, None]

    @_once
    def n_bulk(self) -> Tensor:
        """Number of bulk slots of each query row, [batch, query] int64."""
        return (self.positions + 1 - self.sink_size - self.window_size).clamp(min=0)

    @cached_property
    def last_n_bulk(self) -> list[int]:
        """Number of bulk slots of each sequence's last query row; read on the host, not for compiled code."""
        beyond = self.host.query_slot + self.query_length - self.sink_size - self.window_size
        return [max(beyond - first, 0) for first in self.host.first]

    @cached_property
    def last_log_n_bulk(self) -> Tensor | float:
        """Natural log of `last_n_bulk`, where no sequence has 0: a number where all agree, else [batch, 1, 1] float64.

        Not for compiled code.
        """
        if len(set(self.last_n_bulk)) == 1:
            return math.log(self.last_n_bulk[0])
        return torch.tensor(self.last_n_bulk, dtype=torch.float64, device=self.valid.device).log()[:, None, None]

    @_once
    def real(self) -> Tensor:
        """True where a query row is no padding, [batch, query] bool."""
        return self.valid.index_select(1, self.query_slots.clamp(max=self.key_length - 1))

    @_once
    def asked(self) -> Tensor:
        """True where the head gate decides: real queries with bulk keys, break-even or more, [batch, query] bool."""
        return (self.n_bulk >= max(self.break_even, 1)) & self.real

    @_once
    def below(self) -> Tensor:
        """True where a real query has bulk keys, but fewer than break-even, [batch, query] bool."""
        return (self.n_bulk > 0) & (self.n_bulk < self.break_even) & self.real

    @_once
    def unasked(self) -> Tensor:
        """True where a query reads its bulk keys unasked, [batch, query] bool: below break-even, or padding.

        Padding does so in the stock model, and what it computes may be looked at: a mask that was not extended to a new
        token calls that token padding.
        """
        return (self.n_bulk > 0) & ~self.asked

    @_once
    def n_causal(self) -> Tensor:
        """Number of real keys that each query row sees in a dense model, [batch, query] int64."""
        return self.valid.cumsum(1).index_select(1, self.query_slots.clamp(max=self.key_length - 1))

    @_once
    def counts(self) -> Counts:
        """What a report needs to know: on the host where nothing is padding, else in tensors."""
        if not host_may_read(self.valid) or not self.is_without_padding:
            return Counts(self.asked.sum(), self.below.sum(), self.n_causal.sum())
        return self.host_counts

    @cached_property
    def host_counts(self) -> Counts:
        """What a report needs to know of a call without padding; read on the host, not for compiled code."""
        batch, begin = len(self.host.first), self.host.query_slot
        end = begin + self.query_length

        def with_bulk(least: int) -> int:
            return batch * max(end - max(begin, least + self.sink_size + self.window_size - 1), 0)

        n_asked = with_bulk(max(self.break_even, 1))
        return Counts(n_asked, with_bulk(1) - n_asked, batch * (end * (end + 1) - begin * (begin + 1)) // 2)

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

    @property
    def _slots(self) -> Tensor:
        return torch.arange(self.key_length, device=self.valid.device)


def first_real_slot(valid: Tensor) -> Tensor:
    """Slot of the first real token of each row, [batch] int64; the number of slots where a row has none."""
    slots = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid.bool(), slots, valid.shape[1]).amin(dim=1)


def host_may_read(where: Tensor | torch.device) -> bool:
    """Say whether reading a tensor on the host is free: neither in a compiled graph, nor by waiting for a device."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cpu" and not torch.compiler.is_compiling()
