"""Attention that can be differentiated, in memory that is linear in the number of keys: for measuring, not for speed.

Every call is of all tokens of sequences of one length, without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import by_kv_head, masked_log_mass, scores_of

_ROWS = 512


def dense_with_graph(inputs: AttentionInputs) -> Tensor:
    """Attend to every causal key, [batch, heads, query, value_dim] in the query's dtype."""
    if _is_plain(inputs):
        return functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scale, enable_gqa=True
        )

    slots, parts = torch.arange(inputs.query.shape[2], device=inputs.query.device), []
    for begin in range(0, len(slots), _ROWS):
        rows, seen = slice(begin, begin + _ROWS), slice(0, begin + _ROWS)
        part = inputs.query[:, :, rows], inputs.key[:, :, seen], inputs.value[:, :, seen]
        # The scores are made again on the way back: those of all rows are queries x keys.
        parts.append(checkpoint(_masked, *part, slots[seen] <= slots[rows, None], inputs, use_reentrant=False))
    return torch.cat(parts, dim=2)


def local_with_graph(inputs: AttentionInputs) -> Tensor:
    """Attend to local keys only, [batch, heads, query, value_dim] in the query's dtype."""
    sink, window, length = inputs.regions.sink_size, inputs.regions.window_size, inputs.query.shape[2]
    slots, parts = torch.arange(length, device=inputs.query.device), []
    for begin in range(0, length, _ROWS):
        rows = slice(begin, min(begin + _ROWS, length))
        near = slice(max(begin - window + 1, 0), rows.stop)
        first = slice(0, min(sink, near.start))

        def seen(x: Tensor, first: slice = first, near: slice = near) -> Tensor:
            return torch.cat([x[:, :, first], x[:, :, near]], dim=2)

        at, queries = torch.cat([slots[first], slots[near]]), slots[rows, None]
        mask = (at <= queries) & ((at < sink) | (at > queries - window))
        parts.append(_masked(inputs.query[:, :, rows], seen(inputs.key), seen(inputs.value), mask, inputs))
    return torch.cat(parts, dim=2)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, inputs: AttentionInputs) -> Tensor:
    """Attend some queries to some keys of a call, under a mask, [query, keys]."""
    if _is_plain(inputs):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=inputs.scale, enable_gqa=True
        )
    dtype = inputs.compute_dtype
    scores = scores_of(query.to(dtype), key.to(dtype), inputs)
    log_mass = masked_log_mass(scores, mask, inputs.sink_logits)
    weights = (scores.masked_fill(~mask, -torch.inf) - log_mass[..., None]).exp()
    output = by_kv_head(weights, value.shape[1]) @ value.to(dtype)
    return output.view(*query.shape[:3], -1).to(query.dtype)


def _is_plain(inputs: AttentionInputs) -> bool:
    return inputs.softcap is None and inputs.sink_logits is None
