"""Attention that can be differentiated, in memory that is linear in the number of keys: for measuring, not for speed.

Every call is of all tokens of sequences of one length, without padding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores, masked_log_mass

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
        part = replace(
            inputs, query=inputs.query[:, :, rows], key=inputs.key[:, :, seen], value=inputs.value[:, :, seen]
        )
        # The scores are made again on the way back: those of all rows are queries x keys.
        parts.append(checkpoint(_masked, part, slots[seen] <= slots[rows, None], use_reentrant=False))
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
        part = replace(inputs, query=inputs.query[:, :, rows], key=seen(inputs.key), value=seen(inputs.value))
        parts.append(_masked(part, mask))
    return torch.cat(parts, dim=2)


def _masked(inputs: AttentionInputs, mask: Tensor) -> Tensor:
    """Attend under a mask, [query, keys]."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if _is_plain(inputs):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=inputs.scale, enable_gqa=True
        )
    scores = attention_scores(inputs)
    log_mass = masked_log_mass(scores, mask, inputs.sink_logits)
    weights = (scores.masked_fill(~mask, -torch.inf) - log_mass[..., None]).exp()
    values = value.to(weights.dtype)[:, :, None]
    return (weights.unflatten(1, (value.shape[1], -1)) @ values).flatten(1, 2).to(query.dtype)


def _is_plain(inputs: AttentionInputs) -> bool:
    return inputs.softcap is None and inputs.sink_logits is None
