"""What goes into one attention call and what comes out: the contract between the method and the backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.call.regions import Regions
from patchattn.errors import ShapeError


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call of one layer. Keys and values are not repeated for grouped queries.

    Args:
        query: [batch, heads, query, dim], after rotary embedding.
        key: [batch, kv_heads, keys, dim], after rotary embedding; query head `h` reads KV head
            `h // (heads // kv_heads)`.
        value: [batch, kv_heads, keys, value_dim].
        regions: Sink, window, bulk and padding of the call.
        scale: Factor on the dot products.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None for none.
        sink_logits: [heads]; a learned logit per head that joins the softmax but has no value; None for none.
        whole_groups: Whether, in a call with one query per sequence, all query heads of a KV group open where one does.

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    regions: Regions
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    whole_groups: bool = False

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together before anything is computed."""
        query, key, value = tuple(self.query.shape), tuple(self.key.shape), tuple(self.value.shape)
        if not len(query) == len(key) == len(value) == 4:
            raise ShapeError(
                f"Expected query, key and value of shape [batch, heads, tokens, dim]; got {query}, {key}, {value}."
            )
        if query[1] % key[1] or query[3] != key[3]:
            raise ShapeError(
                f"Query {query} does not fit key {key}: the query heads must be a multiple of the KV heads and the "
                "last dimensions equal."
            )
        if key[:3] != value[:3] or query[0] != key[0]:
            raise ShapeError(
                f"Key {key} and value {value} must share batch, KV heads and tokens, "
                f"and the batch of the query {query}."
            )
        dtypes = self.query.dtype, self.key.dtype, self.value.dtype
        if not dtypes[0] == dtypes[1] == dtypes[2]:
            raise ShapeError(f"Query, key and value differ in dtype: {dtypes[0]}, {dtypes[1]}, {dtypes[2]}.")
        rows, slots = self.regions.query_length, tuple(self.regions.valid.shape)
        if rows != query[2] or slots != (key[0], key[2]):
            raise ShapeError(
                f"Regions for {rows} queries over {slots} key slots do not fit query {query} and key {key}."
            )

    @property
    def group_size(self) -> int:
        """Number of query heads that share a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def opens_groups(self) -> int | None:
        """Number of KV heads, where their groups open as a whole in this call; None where they don't."""
        return self.key.shape[1] if self.whole_groups and self.query.shape[2] == 1 else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of log masses: float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Attended:
    """What one attention call gives back.

    Args:
        output: [batch, heads, query, value_dim] in the query's dtype; zeros for rows that see no key.
        open: [batch, heads, query] bool; pairs that were asked and read the bulk. Pairs that were not asked are False.
        scored_keys: (query head, query, key) triples whose score was really computed, whole tiles or chunks where the
            backend works in those; [] int64, or an int where the host knows it. Divided by the causal triples it is
            the realised density.
    """

    output: Tensor
    open: Tensor
    scored_keys: Tensor | int
