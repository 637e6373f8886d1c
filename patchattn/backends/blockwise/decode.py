"""One query per sequence: views of the cache, read once, and nothing but sink and window where gates are closed.

A step is so short that the number of tensor operations decides its time: views are made with one `as_strided` each,
and what is known to be visible is merged without guards.
"""

from __future__ import annotations

from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from patchattn.backends.blockwise.softmax import Softmax, attend_to, is_fused, with_sink_logits
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.gates.decision import is_open

_MOST_SPLITS = 8
_FEWEST_KEYS_TO_SPLIT = 512
# From this share of open KV heads on, one call over all of them is faster than one for each.
_TOGETHER_FROM = 0.75


def is_plain_decode(inputs: AttentionInputs) -> bool:
    """Say whether this is a call with one query per sequence, all of them asked, whose keys need no mask."""
    if inputs.regions.query_length != 1:
        return False
    regions, host = inputs.regions, inputs.regions.host
    return host.is_plain and min(regions.last_n_bulk, default=0) >= max(regions.break_even, 1)


def attend_decode(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float) -> Attended:
    """Attend a plain decode call to local keys, and to bulk keys where the head gate is open; see `reference.attend`.

    Decisions are taken on the host: it has to know anyway which keys to read.
    """
    batch, heads = inputs.query.shape[:2]
    local = _attend_local(inputs)
    if inputs.sink_logits is not None:
        local = with_sink_logits(local, inputs.sink_logits.view(inputs.key.shape[1], inputs.group_size))
    opened = [
        [is_open(mass, far, margin) for mass, (far,) in zip(chain.from_iterable(near), bulk, strict=True)]
        for near, bulk in zip(local.log_mass.tolist(), bulk_log_mass.tolist(), strict=True)
    ]
    scored = batch * heads * (inputs.regions.sink_size + inputs.regions.window_size)
    if any(map(any, opened)):
        scored += _add_bulk(inputs, opened, local)
        decisions = torch.tensor(opened, device=inputs.query.device).unsqueeze(2)
    else:
        decisions = torch.zeros(batch, heads, 1, dtype=torch.bool, device=inputs.query.device)
    return Attended(local.output.reshape(batch, heads, 1, -1), decisions, scored)


def _attend_local(inputs: AttentionInputs) -> Softmax:
    """Attend to sink and window: output [batch, kv_heads, group, value_dim], log mass [batch, kv_heads, group]."""
    regions, host = inputs.regions, inputs.regions.host
    query, begin = _grouped(inputs), host.filled - regions.window_size
    key, value = (x.narrow(2, begin, regions.window_size) for x in (inputs.key, inputs.value))
    window = attend_to(inputs, query, key, value)
    if not regions.sink_size:
        return window
    # Two calls on views: one on a copy of both takes as long at best, and half as long again where its memory is new.
    key, value = (_sinks(x, host.first, regions.sink_size) for x in (inputs.key, inputs.value))
    return window.merge(attend_to(inputs, query, key, value))


def _add_bulk(inputs: AttentionInputs, opened: list[list[bool]], local: Softmax) -> int:
    """Merge the bulk keys of open pairs into the local output in place; returns the triples scored."""
    regions, host, group = inputs.regions, inputs.regions.host, inputs.group_size
    end = host.filled - regions.window_size
    wanted: dict[tuple[int, int], list[int]] = {}
    for row, flags in enumerate(opened):
        for head, flag in enumerate(flags):
            if flag:
                wanted.setdefault((row, head // group), []).append(head % group)
    n_groups = len(opened) * inputs.key.shape[1]
    if len(wanted) > 1 and len(wanted) >= _TOGETHER_FROM * n_groups and len(set(host.first)) == 1:
        return _all_heads(inputs, opened, local, host.first[0] + regions.sink_size, end)
    scored = 0
    for (row, kv_head), heads in wanted.items():
        begin = host.first[row] + regions.sink_size
        # Heads between open ones are taken along: their keys are read anyway.
        n_heads = heads[-1] - heads[0] + 1
        bulk = _one_kv_head(inputs, row, kv_head, heads[0], n_heads, begin, end)
        near = Softmax(
            local.output[row, kv_head].narrow(0, heads[0], n_heads),
            local.log_mass[row, kv_head].narrow(0, heads[0], n_heads),
        )
        kept = None
        if n_heads > len(heads):
            at = kv_head * group + heads[0]
            kept = torch.tensor(opened[row][at : at + n_heads], device=inputs.query.device)
        near.take_in(Softmax(bulk.output[0], bulk.log_mass[0]), kept)
        scored += n_heads * (end - begin)
    return scored


def _all_heads(inputs: AttentionInputs, opened: list[list[bool]], local: Softmax, begin: int, end: int) -> int:
    """Read the bulk keys of all heads in one call and keep the result where gates are open."""
    key, value = (x.narrow(2, begin, end - begin) for x in (inputs.key, inputs.value))
    kept = None
    if not all(map(all, opened)):
        kept = torch.tensor(opened, device=key.device).view(local.log_mass.shape)
    local.take_in(attend_to(inputs, _grouped(inputs), key, value), kept)
    return local.log_mass.numel() * (end - begin)


def _one_kv_head(
    inputs: AttentionInputs, row: int, kv_head: int, head: int, n_heads: int, begin: int, end: int
) -> Softmax:
    """Attend `n_heads` heads of a group, from its `head` on, to slots cut into stretches so that every core has some.

    Returns:
        Output [1, heads, value_dim] and log mass [1, heads].
    """
    n_keys = end - begin
    splits = max(min(torch.get_num_threads(), _MOST_SPLITS, n_keys // _FEWEST_KEYS_TO_SPLIT), 1)
    if not is_fused(inputs):
        splits = 1
    size = n_keys // splits

    def stretches(x: Tensor, count: int, length: int, start: int) -> Tensor:
        stride = x.stride()
        offset = x.storage_offset() + row * stride[0] + kv_head * stride[1] + start * stride[2]
        return x.as_strided((count, 1, length, x.shape[3]), (length * stride[2], 0, stride[2], 1), offset)

    def attend(count: int, length: int, start: int) -> Softmax:
        query, stride = inputs.query, inputs.query.stride()
        first = kv_head * inputs.group_size + head
        offset = query.storage_offset() + row * stride[0] + first * stride[1]
        rows = query.as_strided((count, 1, n_heads, query.shape[3]), (0, 0, stride[1], 1), offset)
        return attend_to(
            inputs, rows, stretches(inputs.key, count, length, start), stretches(inputs.value, count, length, start)
        )

    together = attend(splits, size, begin)
    parts = [Softmax(*part) for part in zip(together.output.unbind(0), together.log_mass.unbind(0), strict=True)]
    if splits * size < n_keys:
        rest = attend(1, n_keys - splits * size, begin + splits * size)
        parts.append(Softmax(rest.output[0], rest.log_mass[0]))
    return reduce(Softmax.merge, parts)


def _grouped(inputs: AttentionInputs) -> Tensor:
    """Lay the heads of a group along the row axis, [batch, kv_heads, group, dim]: its keys are then read once."""
    batch, _, _, dim = inputs.query.shape
    return inputs.query.reshape(batch, inputs.key.shape[1], inputs.group_size, dim)


def _sinks(x: Tensor, first: list[int], sink_size: int) -> Tensor:
    """Take the sink of each sequence from [batch, kv_heads, keys, dim]; a view where all begin in the same slot."""
    if len(set(first)) == 1:
        return x.narrow(2, first[0], sink_size)
    return torch.stack([x[row, :, begin : begin + sink_size] for row, begin in enumerate(first)])
