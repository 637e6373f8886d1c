"""Keys of many sequences in one place, and where those of each are: what is not read need not be gathered."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions


class Scratch:
    """Memory that is used again and again: new memory costs several times what is copied into it."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def take(self, like: Tensor, number: int, rows: int) -> Tensor:
        """Return [rows, like.shape[-1]], of whatever content; each `number` is a place of its own."""
        size, held = rows * like.shape[-1], self._held.get(number)
        if held is None or len(held) < size or held.dtype != like.dtype or held.device != like.device:
            held = self._held[number] = like.new_empty(size)
        return held[:size].view(rows, -1)


@dataclass(frozen=True)
class PagedStore:
    """Keys and values of a layer, of all sequences, in no order.

    Args:
        key: [places, kv_heads, dim], contiguous.
        value: [places, kv_heads, value_dim], contiguous.
        scratch: Where copies are made.
    """

    key: Tensor
    value: Tensor
    scratch: Scratch = field(default_factory=Scratch)

    def read(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Copy keys and values that are found there, as `PagedRows` says; good until the next time.

        Args:
            found: [..., keys] int64.

        Returns:
            [..., keys, dim] and [..., keys, value_dim].
        """
        index, copies = found.flatten(), []
        for number, x in enumerate((self.key, self.value)):
            copy = self.scratch.take(x, number, len(index))
            torch.index_select(x.flatten(0, 1), 0, index, out=copy)
            copies.append(copy.view(*found.shape, -1))
        return copies[0], copies[1]


@dataclass(frozen=True)
class PagedRows:
    """Sequences that ask one query each, with all keys of each in a `PagedStore`; the same for all layers.

    Args:
        places: Of each sequence, [keys] int64; where its keys are, oldest first.
        regions: The call of all sequences, as if they were padded on the left.
        kv_heads: Number of KV heads of the store.
    """

    places: list[Tensor]
    regions: Regions
    kv_heads: int
    _found: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, places: list[Tensor], kv_heads: int, sink_size: int, window_size: int, break_even: int) -> PagedRows:
        """Build from the places of each sequence."""
        lengths, device = [len(keys) for keys in places], places[0].device
        return cls(places, Regions.right_aligned(lengths, sink_size, window_size, device, break_even), kv_heads)

    # Where the store has keys, [..., kv_heads, keys]: a number for each place and KV head.

    def local(self) -> Tensor:
        """Find sink and window, [sequences, kv_heads, keys]; of sequences that have more keys than both."""
        sink, window = self.regions.sink_size, self.regions.window_size
        return self._once("local", lambda: [torch.cat([keys[:sink], keys[-window:]]) for keys in self.places])

    def all_keys(self) -> Tensor:
        """Find all keys, [sequences, kv_heads, keys], those of shorter ones filled up behind; see `seen`."""
        return self._once("all", lambda: self.places)

    def seen(self) -> Tensor | None:
        """Which of `all_keys` are keys of a sequence, [sequences, 1, 1, keys] bool; None where all are."""
        # Filled up on the left there, on the right here.
        return self.regions.valid.flip(1)[:, None, None] if self.regions.host.last_first else None

    def all_of(self, row: int) -> Tensor:
        """Find all keys of one sequence, [kv_heads, keys]."""
        return self._once(("all", row), lambda: [self.places[row]])[0]

    def bulk(self, row: int, multiple: int) -> Tensor:
        """Find the bulk keys of one sequence, [kv_heads, keys], filled up behind to a multiple of so many."""
        sink, n_bulk = self.regions.sink_size, self.regions.last_n_bulk[row]
        return self._once(("bulk", row), lambda: [self.places[row][sink : sink + n_bulk]], multiple)[0]

    def _once(self, what: Hashable, places: Callable[[], list[Tensor]], multiple: int = 1) -> Tensor:
        """Find places of some sequences; what is filled up is the first of each again, which the reader leaves out."""
        if what not in self._found:
            of_each = places()
            most = -(-max(map(len, of_each)) // multiple) * multiple
            filled = torch.stack([torch.cat([keys, keys[:1].expand(most - len(keys))]) for keys in of_each])
            heads = torch.arange(self.kv_heads, device=filled.device)
            self._found[what] = filled.unsqueeze(-2) * self.kv_heads + heads[:, None]
        return self._found[what]

    def without_keys(self, query: Tensor, store: PagedStore, *rest: Any) -> AttentionInputs:
        """Return the call for gates; see the function of this name."""
        return without_keys(query, store, self.regions, *rest)


def without_keys(
    query: Tensor,
    store: PagedStore,
    regions: Regions,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    whole_groups: bool = False,  # noqa: FBT001, FBT002
) -> AttentionInputs:
    """Return the call of sequences in pages for gates, which weigh it by what they know and do not look at keys.

    Whoever looks reads NaN, which opens.

    Args:
        query: [sequences, heads, 1, dim].
        store: The keys that are not read.
        regions: The call of all sequences, as if they were padded on the left.
        scale: See `AttentionInputs`.
        softcap: See `AttentionInputs`.
        sink_logits: See `AttentionInputs`.
        whole_groups: See `AttentionInputs`.
    """
    shape = (len(query), store.key.shape[1], regions.key_length)
    key, value = (x.new_full((), torch.nan).expand(*shape, x.shape[2]) for x in (store.key, store.value))
    return AttentionInputs(query, key, value, regions, scale, softcap, sink_logits, whole_groups)
