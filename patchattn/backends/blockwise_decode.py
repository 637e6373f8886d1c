"""One query per sequence: views of the cache, read once, and nothing but sink and window where gates are closed."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends.blockwise_kernel import Part, attend_to, is_fused, merge
from patchattn.inputs import AttentionInputs

_MOST_SPLITS = 8
_FEWEST_KEYS_TO_SPLIT = 512


def is_plain_decode(inputs: AttentionInputs) -> bool:
    """Say whether this is a call with one query per sequence whose local keys need no mask."""
    regions, host = inputs.regions, inputs.regions.host
    window_begin = host.query_slot - regions.window_size + 1
    return regions.query_length == 1 and host.is_plain and window_begin >= max(host.first) + regions.sink_size


def attend_local_decode(inputs: AttentionInputs) -> tuple[Part, int]:
    """Pass 1 of a plain decode call, without copying keys.

    Returns:
        Output [batch, heads, 1, value_dim] and local log mass [batch, heads, 1] without sink logits, and the number
        of (head, query, key) triples scored.
    """
    regions, host = inputs.regions, inputs.regions.host
    batch, heads = inputs.query.shape[:2]
    query = inputs.query.view(batch, inputs.key.shape[1], inputs.group_size, -1)
    window = slice(host.query_slot - regions.window_size + 1, host.filled)
    parts = [attend_to(inputs, query, inputs.key[:, :, window], inputs.value[:, :, window])]
    if regions.sink_size:
        key, value = (_sinks(x, host.first, regions.sink_size) for x in (inputs.key, inputs.value))
        parts.append(attend_to(inputs, query, key, value))
    part = merge(parts)
    output = part.output.reshape(batch, heads, 1, -1)
    scored = batch * heads * (regions.sink_size + regions.window_size)
    return Part(output, part.log_mass.reshape(batch, heads, 1)), scored


def add_bulk_decode(inputs: AttentionInputs, opened: Tensor, local: Part) -> int:
    """Pass 2 of a plain decode call: open pairs against their bulk keys, merged into the local output in place.

    Args:
        inputs: The call.
        opened: [batch, heads, 1] bool.
        local: Pass 1, with sink logits; its output is overwritten where pairs are open.

    Returns:
        Number of (head, query, key) triples scored.
    """
    regions, host = inputs.regions, inputs.regions.host
    kv_heads, group = inputs.key.shape[1], inputs.group_size
    end = host.query_slot - regions.window_size + 1
    if len(set(host.first)) == 1 and bool(opened.all()):
        span = slice(host.first[0] + regions.sink_size, end)
        query = inputs.query.view(inputs.query.shape[0], kv_heads, group, -1)
        bulk = _by_splits(inputs, query, inputs.key[:, :, span], inputs.value[:, :, span])
        shape = local.log_mass.shape
        bulk = Part(bulk.output.reshape(local.output.shape), bulk.log_mass.reshape(shape))
        local.output.copy_(merge([local, bulk]).output)
        return opened.numel() * (end - span.start)
    scored = 0
    for row, flags in enumerate(opened[:, :, 0].tolist()):
        begin = host.first[row] + regions.sink_size
        for kv_head in range(kv_heads):
            heads = [head for head in range(kv_head * group, (kv_head + 1) * group) if flags[head]]
            if not heads or end <= begin:
                continue
            where = heads[0] if len(heads) == 1 else heads
            # The open heads of a group often lie side by side: a view then, no copy.
            if heads[-1] - heads[0] + 1 == len(heads):
                where = slice(heads[0], heads[-1] + 1)
            query = inputs.query[row, where, 0][None, None]
            key, value = (x[row : row + 1, kv_head : kv_head + 1, begin:end] for x in (inputs.key, inputs.value))
            bulk = _by_splits(inputs, query, key, value)
            near = Part(local.output[row, where, 0], local.log_mass[row, where, 0])
            local.output[row, where, 0] = merge([near, Part(bulk.output[0, 0], bulk.log_mass[0, 0])]).output
            scored += len(heads) * (end - begin)
    return scored


def _by_splits(inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor) -> Part:
    """Attend rows [batch, kv_heads, rows, dim] to keys, cut into stretches so that every core has some."""
    batch, kv_heads, n_keys, _ = key.shape
    splits = min(_MOST_SPLITS, -(-torch.get_num_threads() // (batch * kv_heads)), n_keys // _FEWEST_KEYS_TO_SPLIT)
    # A copy of the query for each stretch; one batch axis of the kernel is left for that, unless there is one row.
    if splits < 2 or batch > 1 or not is_fused(inputs):
        return attend_to(inputs, query, key, value)
    size = n_keys // splits

    def stretched(x: Tensor) -> Tensor:
        return x[0, :, : splits * size].unflatten(1, (splits, size)).transpose(0, 1)

    part = attend_to(inputs, query.expand(splits, -1, -1, -1), stretched(key), stretched(value))
    parts = [Part(part.output[i : i + 1], part.log_mass[i : i + 1]) for i in range(splits)]
    if splits * size < n_keys:
        rest = slice(splits * size, n_keys)
        parts.append(attend_to(inputs, query, key[:, :, rest], value[:, :, rest]))
    return merge(parts)


def _sinks(x: Tensor, first: list[int], sink_size: int) -> Tensor:
    """Take the sink of each sequence from [batch, kv_heads, keys, dim]; a view where all begin in the same slot."""
    if len(set(first)) == 1:
        return x[:, :, first[0] : first[0] + sink_size]
    return torch.stack([x[row, :, begin : begin + sink_size] for row, begin in enumerate(first)])
