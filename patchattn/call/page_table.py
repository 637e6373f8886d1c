"""Rows of one query each whose keys are in pages, told to a device once for all layers: which pages are whose."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.paged import PagedStore, without_keys
from patchattn.call.regions import Counts, Regions

Value = TypeVar("Value")


@dataclass(frozen=True)
class TableRow:
    """A row and its keys, as the host knows them.

    Args:
        row: Which of the rows of the step.
        first_key: Where its keys begin among those of all sequences.
        length: How many keys it has, its own included.
        is_asked: Whether its head gates decide; if not, it reads all of its keys.
    """

    row: int
    first_key: int
    length: int
    is_asked: bool


@dataclass(frozen=True)
class PageTable:
    """Rows of one query each, with all keys of each in whole pages of a store; the same for all layers.

    Args:
        rows: The rows; those that are asked have bulk keys.
        places: [keys] int64; where the keys of all sequences of the step are, one sequence after the other.
        page_size: Keys of a page, which lie side by side.
        stride: Places from the begin of one page to that of the next, `page_size` or more.
        sink_size: Number of first tokens that are always attended.
        window_size: Number of last tokens that are always attended.
        numbers: [4, rows] int64: row, first key, length, and 1 where it is asked. Filled up with rows that have no
            keys to a power of two, for each number of rows is a graph of its own.
    """

    rows: list[TableRow]
    places: Tensor
    page_size: int
    stride: int
    sink_size: int
    window_size: int
    numbers: Tensor
    _found: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, rows: list[TableRow], places: Tensor, page_size: int, stride: int, sink_size: int, window_size: int
    ) -> PageTable:
        """Build from what the host knows; nothing waits for the device of the places."""
        numbers = torch.zeros(4, 1 << (len(rows) - 1).bit_length(), dtype=torch.long)
        found = [[one.row, one.first_key, one.length, int(one.is_asked)] for one in rows]
        numbers[:, : len(rows)] = torch.tensor(found).T
        return cls(rows, places, page_size, stride, sink_size, window_size, on_device(numbers, places.device))

    def once(self, what: Hashable, compute: Callable[[], Value]) -> Value:
        """Return what `compute` gave when it was asked for first."""
        if what not in self._found:
            self._found[what] = compute()
        return self._found[what]  # pyright: ignore[reportReturnType]

    @property
    def of_step(self) -> Tensor:
        """Which rows of the step they are, [rows] int64."""
        return self.numbers[0, : len(self.rows)]

    @property
    def counts(self) -> Counts:
        """What a report needs to know of the rows that are asked."""
        asked = [one.length for one in self.rows if one.is_asked]
        return Counts(len(asked), 0, sum(asked))

    def asked(self, attended: Attended) -> Attended:
        """Return what attention gave, with the decisions of the rows that are asked only."""
        rows = [number for number, one in enumerate(self.rows) if one.is_asked]
        if len(rows) == len(self.rows):
            return attended
        picked = self.once("asked", lambda: on_device(torch.tensor(rows), self.places.device))
        return Attended(attended.output, attended.open.index_select(0, picked), attended.scored_keys)

    @property
    def regions(self) -> Regions:
        """The call of all sequences, as if they were padded on the left."""
        lengths, device = [one.length for one in self.rows], self.places.device
        return self.once("regions", lambda: Regions.right_aligned(lengths, self.sink_size, self.window_size, device))


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy numbers of the host without waiting for the device."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


@dataclass(frozen=True)
class TableInputs:
    """One attention call of one layer for the rows of a table.

    Args:
        query: [1, heads, rows of the step, dim].
        store: The keys of the layer.
        table: Which rows, and where their keys are.
        scale: See `AttentionInputs`.
        softcap: See `AttentionInputs`.
        sink_logits: See `AttentionInputs`.
        whole_groups: See `AttentionInputs`.
    """

    query: Tensor
    store: PagedStore
    table: PageTable
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    whole_groups: bool = False

    def without_keys(self) -> AttentionInputs:
        """Return the call for gates, see `patchattn.call.paged.without_keys`; without the rows that fill up."""
        query = self.query[0].index_select(1, self.table.of_step).transpose(0, 1)
        rest = self.scale, self.softcap, self.sink_logits
        return without_keys(query.unsqueeze(2), self.store, self.table.regions, *rest)
