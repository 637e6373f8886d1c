"""Keys of many sequences in one place, and where those of each are: what is not read need not be gathered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions


@dataclass(frozen=True)
class PagedStore:
    """Keys and values of a layer, of all sequences, in no order.

    Args:
        key: [places, kv_heads, dim], contiguous.
        value: [places, kv_heads, value_dim], contiguous.
    """

    key: Tensor
    value: Tensor

    def read(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Copy keys and values that are found there, as `PagedRows` says: [*found, dim], [*found, value_dim]."""
        key, value = (x.flatten(0, 1).index_select(0, found.flatten()) for x in (self.key, self.value))
        return key.view(*found.shape, -1), value.view(*found.shape, -1)


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

    @classmethod
    def of(cls, places: list[Tensor], kv_heads: int, sink_size: int, window_size: int, break_even: int) -> PagedRows:
        """Build from the places of each sequence."""
        lengths, device = [len(keys) for keys in places], places[0].device
        return cls(places, Regions.right_aligned(lengths, sink_size, window_size, device, break_even), kv_heads)

    @cached_property
    def local(self) -> Tensor:
        """Where the store has sink and window, [sequences, kv_heads, sink + window]; of more keys than both."""
        sink, window = self.regions.sink_size, self.regions.window_size
        return self._found(torch.stack([torch.cat([keys[:sink], keys[-window:]]) for keys in self.places]))

    @cached_property
    def all_keys(self) -> Tensor:
        """Where the store has all keys, [sequences, kv_heads, keys]; what `seen` leaves out is the first key again."""
        most = self.regions.key_length
        padded = [torch.cat([keys[:1].expand(most - len(keys)), keys]) for keys in self.places]
        return self._found(torch.stack(padded))

    @cached_property
    def seen(self) -> Tensor | None:
        """Which of `all_keys` are keys of a sequence, [sequences, 1, 1, keys] bool; None where all are."""
        return self.regions.valid[:, None, None] if self.regions.host.last_first else None

    @cached_property
    def bulk(self) -> list[Tensor]:
        """Where the store has the bulk keys of each sequence and after them its window, [kv_heads, keys] each."""
        return [self._found(keys[self.regions.sink_size :]) for keys in self.places]

    @property
    def n_bulk(self) -> list[int]:
        """Number of bulk keys of each sequence."""
        return self.regions.last_n_bulk

    def _found(self, places: Tensor) -> Tensor:
        heads = torch.arange(self.kv_heads, device=places.device)
        return places.unsqueeze(-2) * self.kv_heads + heads[:, None]

    def without_keys(
        self, query: Tensor, store: PagedStore, scale: float, softcap: float | None, sink_logits: Tensor | None
    ) -> AttentionInputs:
        """Return the call for gates, which weigh it by what they know and do not look at keys.

        Whoever looks reads NaN, which opens.

        Args:
            query: [sequences, heads, 1, dim].
            store: The keys that are not read.
            scale: See `AttentionInputs`.
            softcap: See `AttentionInputs`.
            sink_logits: See `AttentionInputs`.
        """
        shape = (len(self.places), self.kv_heads, self.regions.key_length)
        key, value = (x.new_full((), torch.nan).expand(*shape, x.shape[2]) for x in (store.key, store.value))
        return AttentionInputs(query, key, value, self.regions, scale, softcap, sink_logits)
