"""Keys of many sequences in one place, and where those of each are: what is not read need not be gathered."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.key.shape[1]

    def rows_of(self, places: Tensor) -> Tensor:
        """Return where `read` finds some places of every KV head: [..., kv_heads, n] int64, of [..., n]."""
        return places.unsqueeze(-2) * self.kv_heads + torch.arange(self.kv_heads, device=places.device)[:, None]

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copy keys and values at rows, of any shape, as `rows_of` returns them: [*rows, dim], [*rows, value_dim]."""
        key, value = (x.flatten(0, 1).index_select(0, rows.flatten()) for x in (self.key, self.value))
        return key.view(*rows.shape, -1), value.view(*rows.shape, -1)


@dataclass(frozen=True)
class PagedRows:
    """Sequences that ask one query each, with all keys of each in a `PagedStore`; the same for all layers.

    Args:
        places: Of each sequence, [keys] int64; where its keys are, oldest first. More than sink and window.
        regions: The call of all sequences, as if they were padded on the left.
        local: [sequences, kv_heads, sink + window] int64; `PagedStore.rows_of` the local keys.
    """

    places: list[Tensor]
    regions: Regions
    local: Tensor

    @classmethod
    def of(cls, places: list[Tensor], kv_heads: int, sink_size: int, window_size: int, break_even: int) -> PagedRows:
        """Build from the places of each sequence."""
        device = places[0].device
        regions = Regions.right_aligned([len(keys) for keys in places], sink_size, window_size, device, break_even)
        near = torch.stack([torch.cat([keys[:sink_size], keys[-window_size:]]) for keys in places])
        local = near[:, None] * kv_heads + torch.arange(kv_heads, device=device)[:, None]
        return cls(places, regions, local)

    @property
    def bulk(self) -> list[Tensor]:
        """Where the bulk keys of each sequence are, and after them those of its window."""
        return [keys[self.regions.sink_size :] for keys in self.places]

    @property
    def n_bulk(self) -> list[int]:
        """Number of bulk keys of each sequence."""
        return self.regions.last_n_bulk

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
        shape = (len(self.places), store.kv_heads, self.regions.key_length)
        key, value = (x.new_full((), torch.nan).expand(*shape, x.shape[2]) for x in (store.key, store.value))
        return AttentionInputs(query, key, value, self.regions, scale, softcap, sink_logits)
