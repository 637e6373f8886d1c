"""Plain dense attention, straight to the fused kernel: what a call costs that does not go through the gate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patchattn.backends.blockwise.products import GRID, attend_by_products, is_flat, may_use_products
from patchattn.backends.blockwise.softmax import Softmax, attend_to, attend_where_finite, bias_of, has_nan, is_fused
from patchattn.call.inputs import Attended, AttentionInputs

# Numbers in float32 keys from which reading them once for all heads of a group outweighs two reshapes. The kernel for
# one row of a narrower dtype is several times slower at any length.
_FEWEST_TO_GROUP = 1 << 18
# Numbers in the keys from which products outweigh the small operations around them, where the kernel has several rows.
_FEWEST_FOR_PRODUCTS = 1 << 20
# Queries up to which heads of a group are rows of one call over the keys before them: drafts that are verified.
_MOST_TO_GROUP = 16
# Keys at both ends of a sequence that tell about the largest score of all.
_TELLING = 64


def is_plain(inputs: AttentionInputs) -> bool:
    """Say whether the fused kernel attends densely by itself: no padding, no sink logits, no softcap, on a CPU."""
    return inputs.regions.is_without_padding and inputs.sink_logits is None and is_fused(inputs)


def attend_densely(inputs: AttentionInputs) -> Tensor:
    """Attend to every causal key where `is_plain`, as a model does that is not patched.

    Args:
        inputs: The attention call.

    Returns:
        [batch, heads, query, value_dim].
    """
    query, key, value, filled = inputs.query, inputs.key, inputs.value, inputs.regions.host.filled
    if filled < key.shape[2]:
        key, value = key.narrow(2, 0, filled), value.narrow(2, 0, filled)
    batch, heads, length, dim = query.shape
    kv_heads, before = key.shape[1], filled - length
    # Heads of a group as rows: their keys are read once.
    groups = length <= _MOST_TO_GROUP
    rows = query.reshape(batch, kv_heads, -1, dim) if groups else query
    part = by_products(inputs, rows, key, value) if groups and before else None
    if part is not None:
        return part.output.to(query.dtype).reshape(batch, heads, length, -1)
    if length == 1 and (query.dtype != torch.float32 or key.numel() >= _FEWEST_TO_GROUP):
        return scaled_dot_product_attention(rows, key, value, scale=inputs.scale).reshape(batch, heads, 1, -1)
    if length == 1 or not before:
        return scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=inputs.scale, enable_gqa=heads > kv_heads
        )
    own = attend_to(inputs, query, key[:, :, before:], value[:, :, before:], causal=True)
    far = attend_to(inputs, rows, key[:, :, :before], value[:, :, :before])
    return Softmax(far.output.reshape(own.output.shape), far.log_mass.reshape(own.log_mass.shape)).merge(own).output


def by_products(inputs: AttentionInputs, rows: Tensor, key: Tensor, value: Tensor) -> Softmax | None:
    """Attend rows to every key before and of their query by two products; None where the kernel is better.

    Args:
        inputs: The call, for scale, softcap, dtype and the number of its queries.
        rows: [batch, kv_heads, group * query, dim].
        key: [batch, kv_heads, keys, dim]; the last ones are those of the queries.
        value: [batch, kv_heads, keys, value_dim].

    Returns:
        Output [batch, kv_heads, rows, value_dim] and log mass [batch, kv_heads, rows] in float32.
    """
    begin, length, n_rows = _TELLING, inputs.query.shape[2], rows.shape[2]
    end = begin + (key.shape[2] - 2 * _TELLING) // GRID * GRID
    is_long = n_rows == 1 or key.numel() >= _FEWEST_FOR_PRODUCTS
    if not is_long or inputs.softcap is not None or not (key.shape[0] == 1 or (is_flat(key) and is_flat(value))):
        return None
    queries, keys, values = (x.flatten(0, 1) for x in (rows, key, value))
    if not may_use_products(queries, keys, begin, end):
        return None
    # The largest scores are mostly of the first and the last keys.
    near_key, near_value = (torch.cat([x[:, :, :begin], x[:, :, end:]], 2) for x in (key, value))
    bias, n_near = None, begin + key.shape[2] - end
    if length > 1:
        bias = inputs.regions.once(("ends", n_rows, n_near, rows.dtype), _bias_of_ends, n_near, length, rows)
    near = attend_where_finite(inputs, rows, near_key, near_value, bias)
    if near is None:
        return None
    near = Softmax(near.output.flatten(0, 1), near.log_mass.flatten(0, 1))
    found = attend_by_products(queries, keys, values, begin, end, inputs.scale, near)
    if found is None:
        return None
    return Softmax(found.output.view(*rows.shape[:3], -1), found.log_mass.view(rows.shape[:3]))


def _bias_of_ends(n_keys: int, n_queries: int, rows: Tensor) -> Tensor:
    """Additive mask of keys whose last ones are those of the queries, [1, 1, group * query, keys]."""
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool).tril_(n_keys - n_queries)
    return bias_of(seen.repeat(rows.shape[2] // n_queries, 1)[None, None], rows.dtype)


def n_dense_rows(inputs: AttentionInputs, bulk_log_mass: Tensor) -> int:
    """Count the leading query rows in which every head attends densely, whatever its local mass."""
    if not is_plain(inputs):
        return 0
    undecided = ((bulk_log_mass != torch.inf).any(1) & inputs.regions.asked).any(0)
    return int(undecided.int().argmax()) if undecided.any() else inputs.regions.query_length


def dense_rows(inputs: AttentionInputs, n_rows: int) -> Attended | None:
    """Attend the leading query rows densely; None where that gives NaN."""
    last = inputs.regions.host.query_slot + n_rows
    query, key, value = inputs.query[:, :, :n_rows], inputs.key[:, :, :last], inputs.value[:, :, :last]
    seen = inputs.regions.cut(0, n_rows, last)
    output = attend_densely(replace(inputs, query=query, key=key, value=value, regions=seen))
    if has_nan(output):
        return None
    opened = seen.asked[:, None].expand(query.shape[:3])
    return Attended(output, opened, query.shape[0] * query.shape[1] * causal_pairs(n_rows, last - n_rows))


def causal_pairs(n_queries: int, n_before: int) -> int:
    """Count the (query, key) pairs that the fused kernel scores for one head: a tile ends with its last query's key."""
    tile = 256 if n_queries >= 768 else 64 if n_queries >= 192 else 32
    return n_queries * n_before + n_queries * (n_queries + min(tile, n_queries)) // 2


def is_eager(*tensors: Tensor) -> bool:
    """Say whether no graph is made of a call, neither by a compiler nor for a backward pass."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not torch.compiler.is_compiling() and not wants_gradient
