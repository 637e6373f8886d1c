"""The sequences of one step of continuous batching: whose rows are whose, and where the keys of each are.

Prompt moments belong to a request, and live on the engine's own state of it: they are freed with it and copied when it
forks. A request whose state is made anew, or that begins behind a prefix of others, takes them from its keys once: they
stand on a fixed grid and depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchattn.call.page_table import PageTable, TableRow
from patchattn.call.paged import PagedRows, PagedStore
from patchattn.call.regions import Regions
from patchattn.moments.running import PromptMoments
from patchattn.policy import PHASES, Phase, Policy, phase_of


@dataclass(frozen=True)
class RequestGates:
    """What the gates did for one request.

    Args:
        asked: Pairs of head and query that were asked, over all layers, by phase.
        open: Pairs among them that read the far keys, by phase.
    """

    asked: Mapping[Phase, int]
    open: Mapping[Phase, int]

    def open_fraction(self, phase: Phase | None = None) -> float:
        """Return the share of open pairs, of one phase or of all; NaN where none was asked."""
        phases = PHASES if phase is None else (phase,)
        asked = sum(self.asked[each] for each in phases)
        return sum(self.open[each] for each in phases) / asked if asked else float("nan")


class KeptMoments:
    """Where `hf.cache` keeps the moments of one layer of a request."""

    tracks_moments = True


class RequestMemory:
    """What is kept of a request while the engine keeps its state: moments of each layer, and counts.

    Args:
        layers: Number of layers of the cache.
    """

    def __init__(self, layers: int) -> None:
        self.layers = [KeptMoments() for _ in range(layers)]
        self.asked: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self.open: dict[Phase, int] = dict.fromkeys(PHASES, 0)

    def count(self, phase: Phase, asked: int, opened: int) -> None:
        """Add pairs of one call."""
        self.asked[phase] += asked
        self.open[phase] += opened

    def gates(self) -> RequestGates:
        """Return what was counted so far."""
        return RequestGates(dict(self.asked), dict(self.open))


@dataclass
class Sequence:
    """The rows of one request in a step.

    Args:
        begin: Its first row.
        queries: Number of its rows.
        keys: Number of its keys, those of its rows included.
        first_key: How many keys of other requests come before its own where the engine lists them.
        memory: What is kept of the request.
    """

    begin: int
    queries: int
    keys: int
    first_key: int
    memory: RequestMemory
    _regions: Regions | None = None

    @property
    def rows(self) -> slice:
        """Its rows in the step."""
        return slice(self.begin, self.begin + self.queries)

    @cached_property
    def phase(self) -> Phase:
        """Prefill or decode."""
        return phase_of(self.queries)

    def regions(self, policy: Policy, device: torch.device) -> Regions:
        """Return sink, window and bulk of the sequence alone; made once, for all layers."""
        if self._regions is None:
            sizes = (policy.sink_size, policy.window_size, self.queries, 1, self.keys, device)
            self._regions = Regions.plain(*sizes, break_even=policy.break_even(self.phase))
        return self._regions


@dataclass
class Step:
    """The sequences of one step, for all layers.

    Args:
        sequences: In the order of their rows.
    """

    sequences: list[Sequence]
    _made: dict[Any, Any] = field(default_factory=dict)
    _opened: list[tuple[list[RequestMemory], Phase, Tensor]] = field(default_factory=list)

    def count(self, sequences: list[Sequence], phase: Phase, asked: int, opened: Tensor) -> None:
        """Count what went through the gate.

        Args:
            sequences: Some of the step's.
            phase: Their phase.
            asked: Pairs of each that were asked.
            opened: [sequences, ...] bool; those that opened. Kept until `settle`, for reading it waits for the device.
        """
        for one in sequences:
            one.memory.count(phase, asked, 0)
        self._opened.append(([one.memory for one in sequences], phase, opened.flatten(1).sum(1)))

    def settle(self) -> None:
        """Give each request what was counted of it; waits for the device."""
        if not self._opened:
            return
        device = self._opened[0][2].device
        opened = torch.cat([found.to(device) for *_, found in self._opened]).tolist()
        for memories, phase, _ in self._opened:
            for memory in memories:
                memory.count(phase, 0, opened.pop(0))
        self._opened.clear()

    def table(self, rows: list[TableRow], pages: LayerPages, policy: Policy) -> PageTable:
        """Return rows with where their keys are; made once, for all layers."""
        which = (policy.sink_size, policy.window_size, *rows)
        if which not in self._made:
            sizes = pages.page_size, pages.stride, policy.sink_size, policy.window_size
            self._made[which] = PageTable.of(rows, pages.places, *sizes)
        return self._made[which]

    def paged_rows(self, sequences: list[Sequence], places: Tensor, policy: Policy, kv_heads: int) -> PagedRows:
        """Return some sequences of one query each as rows; made once, for all layers of as many KV heads.

        Args:
            sequences: Which of them.
            places: Where the keys of all sequences are, [keys] int64.
            policy: The policy of the layer.
            kv_heads: Number of KV heads.
        """
        which = (kv_heads, *(one.begin for one in sequences))
        if which not in self._made:
            found = [places[one.first_key : one.first_key + one.keys] for one in sequences]
            sizes = (policy.sink_size, policy.window_size, policy.break_even("decode"))
            self._made[which] = PagedRows.of(found, kv_heads, *sizes)
        return self._made[which]


@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer in one step; given to a module in place of the cache of the engine.

    Args:
        step: The sequences.
        store: All keys of the layer.
        places: Where the keys of the sequences are, [keys] int64, one sequence after the other; empty where no
            sequence has any but those of its rows.
        write_to: Where the keys of the rows belong, [rows] int64.
        stacked: Moments of several requests side by side, by layer; kept from step to step.
        page_size: Keys of a page.
        stride: Places from one page of a request to the next that it may have.
    """

    step: Step
    store: PagedStore
    places: Tensor
    write_to: Tensor
    stacked: dict[int, tuple[list[PromptMoments | None], PromptMoments]]
    page_size: int
    stride: int

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys of the rows, [1, kv_heads, rows, dim], and read none."""
        for pages, new in ((self.store.key, key), (self.store.value, value)):
            pages.index_copy_(0, self.write_to, new[0].transpose(0, 1))
        return key, value

    def read(self, sequence: Sequence, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys of a sequence, [1, kv_heads, keys, dim].

        Args:
            sequence: Which one.
            key: What `update` returned.
            value: What `update` returned.
        """
        if not len(self.places):
            return key[:, :, sequence.rows], value[:, :, sequence.rows]
        return self._found(sequence, self.store.key), self._found(sequence, self.store.value)

    def read_keys(self, sequence: Sequence) -> Tensor:
        """Return all keys of a sequence, [1, kv_heads, keys, dim], without values."""
        return self._found(sequence, self.store.key)

    def _found(self, sequence: Sequence, of_all: Tensor) -> Tensor:
        places = self.places[sequence.first_key : sequence.first_key + sequence.keys]
        return of_all.index_select(0, places).transpose(0, 1)[None]

    def moments_of(self, layer: int, of_each: list[PromptMoments | None]) -> PromptMoments:
        """Return moments of several requests side by side, zeros for None; those of before where none has changed."""
        kept = self.stacked.get(layer)
        if kept is None or list(map(id, kept[0])) != list(map(id, of_each)):
            empty = PromptMoments.empty(self.store.key.transpose(0, 1)[None])
            parts = (torch.cat(part) for part in zip(*((one or empty).parts for one in of_each), strict=True))
            kept = self.stacked[layer] = (of_each, PromptMoments(*parts))
        return kept[1]
