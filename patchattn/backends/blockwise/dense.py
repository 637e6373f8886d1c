"""Plain dense attention, straight to the fused kernel: what a call costs that does not go through the gate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patchattn.backends.blockwise.softmax import attend_to, is_fused, merge_visible
from patchattn.call.inputs import Attended, AttentionInputs

# Numbers in float32 keys from which reading them once for all heads of a group outweighs two reshapes. The kernel for
# one row of a narrower dtype is several times slower at any length.
_FEWEST_TO_GROUP = 1 << 18


def plain_dense(inputs: AttentionInputs) -> Tensor | None:
    """Attend densely where no key needs a mask beyond the causal one, as a model does that is not patched.

    Args:
        inputs: The attention call.

    Returns:
        [batch, heads, query, value_dim]; None where the call needs the general path: padding, sink logits, a softcap,
        another device.
    """
    host, query = inputs.regions.host, inputs.query
    if not host.is_plain or host.last_first or inputs.sink_logits is not None or not is_fused(inputs):
        return None
    key, value, filled = inputs.key, inputs.value, host.filled
    if filled < inputs.regions.key_length:
        key, value = key.narrow(2, 0, filled), value.narrow(2, 0, filled)
    output = attend_plainly(query, key, value, inputs.scale)
    if output is not None:
        return output
    before = host.query_slot
    own = attend_to(inputs, query, key[:, :, before:], value[:, :, before:], causal=True)
    return merge_visible(attend_to(inputs, query, key[:, :, :before], value[:, :, :before]), own).output


def leading_open_rows(inputs: AttentionInputs, bulk_log_mass: Tensor) -> int:
    """Count the leading query rows that attend densely whatever their local mass: below break-even, or without bulk.

    0 where `dense_rows` can't help.
    """
    regions, host = inputs.regions, inputs.regions.host
    if not host.is_plain or host.last_first or inputs.sink_logits is not None or not is_fused(inputs):
        return 0
    undecided = ((bulk_log_mass != torch.inf).any(1) & regions.known_asked).any(0)
    return int(undecided.int().argmax()) if undecided.any() else regions.query_length


def dense_rows(inputs: AttentionInputs, n_rows: int) -> Attended | None:
    """Attend the leading query rows densely, all of their gates open; None where that gives NaN."""
    regions, last = inputs.regions, inputs.regions.host.query_slot + n_rows
    query, key, value = inputs.query[:, :, :n_rows], inputs.key[:, :, :last], inputs.value[:, :, :last]
    seen = replace(regions, query_length=n_rows, valid=regions.valid[:, :last])
    output = plain_dense(replace(inputs, query=query, key=key, value=value, regions=seen))
    if output is None or output.isnan().any():
        return None
    opened = regions.known_asked[:, None, :n_rows].expand(query.shape[:3])
    return Attended(output, opened, query.shape[0] * query.shape[1] * causal_pairs(n_rows, last - n_rows))


def causal_pairs(n_queries: int, n_before: int) -> int:
    """Count the (query, key) pairs that the fused kernel scores for one head: a tile ends with its last query's key."""
    tile = 256 if n_queries >= 768 else 64 if n_queries >= 192 else 32
    return n_queries * n_before + n_queries * (n_queries + min(tile, n_queries)) // 2


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """Attend to every causal key where nothing is padding and the queries are the last slots, in one kernel call.

    Not for compiled code.

    Args:
        query: [batch, heads, query, dim].
        key: [batch, kv_heads, keys, dim].
        value: [batch, kv_heads, keys, value_dim].
        scale: Factor on the dot products.

    Returns:
        [batch, heads, query, value_dim]; None where one call can't do it: another device, a gradient is asked for, or
        several queries come after keys that are there already.
    """
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if not query.is_cpu or length not in (1, keys) or _wants_gradient(query, key, value):
        return None
    if length == 1 and (query.dtype != torch.float32 or key.numel() >= _FEWEST_TO_GROUP):
        # Heads of a group as rows: their keys are read once.
        rows = query.reshape(batch, kv_heads, -1, dim)
        return scaled_dot_product_attention(rows, key, value, scale=scale).reshape(batch, heads, 1, -1)
    return scaled_dot_product_attention(
        query, key, value, is_causal=length > 1, scale=scale, enable_gqa=heads > kv_heads
    )


def is_eager(*tensors: Tensor) -> bool:
    """Say whether the host may look at tensors and no backward pass is asked for."""
    return not torch.compiler.is_compiling() and not _wants_gradient(*tensors)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
