"""One query per sequence: views of the cache, read once, and nothing but sink and window where gates are closed.

A step is so short that the number of tensor operations decides its time: views are made with one `as_strided` each,
and what is known to be visible is merged without guards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends.blockwise_kernel import Part, attend_to, is_fused, merge_visible
from patchattn.inputs import AttentionInputs

_MOST_SPLITS = 8
_FEWEST_KEYS_TO_SPLIT = 512
# From this share of open KV heads on, one call over all of them is faster than one for each.
_TOGETHER_FROM = 0.75


def is_plain_decode(inputs: AttentionInputs) -> bool:
    """Say whether this is a call with one query per sequence, all of them asked, whose keys need no mask."""
    if inputs.regions.query_length != 1:
        return False
    regions, host = inputs.regions, inputs.regions.host
    return host.is_plain and host.filled - regions.window_size > host.last_first + regions.sink_size


def attend_local_decode(inputs: AttentionInputs) -> tuple[Part, int]:
    """Pass 1 of a plain decode call, without copying keys.

    Returns:
        Output [batch, heads, 1, value_dim] and local log mass [batch, heads, 1] without sink logits, and the number
        of (head, query, key) triples scored.
    """
    regions, host, key, value = inputs.regions, inputs.regions.host, inputs.key, inputs.value
    batch, heads = inputs.query.shape[:2]
    query = _grouped(inputs)
    begin = host.filled - regions.window_size
    part = attend_to(
        inputs, query, key.narrow(2, begin, regions.window_size), value.narrow(2, begin, regions.window_size)
    )
    if regions.sink_size:
        sinks = attend_to(
            inputs, query, _sinks(key, host.first, regions.sink_size), _sinks(value, host.first, regions.sink_size)
        )
        part = merge_visible(part, sinks)
    scored = batch * heads * (regions.sink_size + regions.window_size)
    return Part(part.output.reshape(batch, heads, 1, -1), part.log_mass.reshape(batch, heads, 1)), scored


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
    end, group = host.filled - regions.window_size, inputs.group_size
    flags = opened[:, :, 0].tolist()
    heads_of = {
        (row, kv_head): [head for head in range(kv_head * group, (kv_head + 1) * group) if row_flags[head]]
        for row, row_flags in enumerate(flags)
        for kv_head in range(inputs.key.shape[1])
    }
    wanted = [where for where, heads in heads_of.items() if heads]
    if len(wanted) >= _TOGETHER_FROM * len(heads_of) and len(wanted) > 1 and len(set(host.first)) == 1:
        return _all_heads(inputs, opened, local, host.first[0] + regions.sink_size, end)
    scored = 0
    for row, kv_head in wanted:
        heads = heads_of[row, kv_head]
        begin = host.first[row] + regions.sink_size
        # Open heads that lie side by side are taken as a view.
        where = slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else heads
        bulk = _one_kv_head(inputs, row, kv_head, where, begin, end)
        _merge_in_place(local, row, where, bulk)
        scored += len(heads) * (end - begin)
    return scored


def _all_heads(inputs: AttentionInputs, opened: Tensor, local: Part, begin: int, end: int) -> int:
    """Read the bulk keys of all heads in one call and keep the result where gates are open."""
    key, value = (x.narrow(2, begin, end - begin) for x in (inputs.key, inputs.value))
    part = attend_to(inputs, _grouped(inputs), key, value)
    bulk = Part(part.output.reshape(local.output.shape), part.log_mass.reshape(local.log_mass.shape))
    merged = merge_visible(local, bulk).output
    torch.where(opened[..., None], merged, local.output, out=local.output)
    return opened.numel() * (end - begin)


def _one_kv_head(
    inputs: AttentionInputs, row: int, kv_head: int, where: slice | list[int], begin: int, end: int
) -> Part:
    """Attend some heads of one group to a range of slots, cut into stretches so that every core has some.

    Returns:
        Output [1, 1, heads, value_dim] and log mass [1, 1, heads].
    """
    n_keys = end - begin
    splits = max(min(torch.get_num_threads(), _MOST_SPLITS, n_keys // _FEWEST_KEYS_TO_SPLIT), 1)
    if not is_fused(inputs):
        splits = 1
    size = n_keys // splits
    query = inputs.query[row, where].transpose(0, 1).unsqueeze(0)

    def stretches(x: Tensor, count: int, length: int, start: int) -> Tensor:
        stride = x.stride()
        offset = x.storage_offset() + row * stride[0] + kv_head * stride[1] + start * stride[2]
        return x.as_strided((count, 1, length, x.shape[3]), (length * stride[2], 0, stride[2], 1), offset)

    def attend(count: int, length: int, start: int) -> Part:
        keys, values = (stretches(x, count, length, start) for x in (inputs.key, inputs.value))
        return attend_to(inputs, query if count == 1 else query.expand(count, -1, -1, -1), keys, values)

    part = attend(splits, size, begin)
    if splits > 1:
        outputs, masses = part.output.split(1), part.log_mass.split(1)
        part = Part(outputs[0], masses[0])
        for output, mass in zip(outputs[1:], masses[1:], strict=True):
            part = merge_visible(part, Part(output, mass))
    if splits * size < n_keys:
        part = merge_visible(part, attend(1, n_keys - splits * size, begin + splits * size))
    return part


def _merge_in_place(local: Part, row: int, where: slice | list[int], bulk: Part) -> None:
    """Merge the bulk [1, 1, heads, ...] of some heads into the local output."""
    near = local.output[row, where].transpose(0, 1)
    share = torch.sigmoid(bulk.log_mass[0] - local.log_mass[row, where].T).unsqueeze(-1)
    if isinstance(where, slice) and near.dtype == share.dtype:
        near.lerp_(bulk.output[0], share)
        return
    merged = torch.lerp(near.to(share.dtype), bulk.output[0].to(share.dtype), share)
    local.output[row, where] = merged.transpose(0, 1).to(near.dtype)


def _grouped(inputs: AttentionInputs) -> Tensor:
    """Lay the heads of a group along the row axis, [batch, kv_heads, group, dim]: its keys are then read once."""
    batch, _, _, dim = inputs.query.shape
    return inputs.query.reshape(batch, inputs.key.shape[1], inputs.group_size, dim)


def _sinks(x: Tensor, first: list[int], sink_size: int) -> Tensor:
    """Take the sink of each sequence from [batch, kv_heads, keys, dim]; a view where all begin in the same slot."""
    if len(set(first)) == 1:
        return x.narrow(2, first[0], sink_size)
    return torch.stack([x[row, :, begin : begin + sink_size] for row, begin in enumerate(first)])
