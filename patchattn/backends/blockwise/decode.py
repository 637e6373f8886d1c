"""One query per sequence: views of the cache, read once, and nothing but sink and window where gates are closed.

A step is so short that the number of tensor operations decides its time: views are made with one `as_strided` each,
and what is known to be visible is merged without guards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from patchattn.backends.blockwise.dense import dense_rows, is_plain
from patchattn.backends.blockwise.products import attend_by_products, is_flat, may_use_products
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
    far = bulk_log_mass.flatten().tolist()
    # Heads that open whatever their local mass need none.
    if is_plain(inputs) and min(far) == math.inf and (attended := dense_rows(inputs, 1)) is not None:
        return attended
    local = _attend_local(inputs)
    if inputs.sink_logits is not None:
        local = with_sink_logits(local, inputs.sink_logits.view(inputs.key.shape[1], inputs.group_size))
    opened = opened_pairs(inputs, local.log_mass.flatten().tolist(), far, margin)
    scored = batch * heads * (inputs.regions.sink_size + inputs.regions.window_size)
    if any(opened):
        decisions = torch.tensor(opened, device=inputs.query.device).view(batch, heads, 1)
        scored += _add_bulk(inputs, opened, decisions.view(local.log_mass.shape), local)
    else:
        decisions = torch.zeros(batch, heads, 1, dtype=torch.bool, device=inputs.query.device)
    return Attended(local.output.to(inputs.query.dtype).view(batch, heads, 1, -1), decisions, scored)


def opened_pairs(inputs: AttentionInputs, near: list[float], far: list[float], margin: float) -> list[bool]:
    """Decide on the host which pairs of a call open, from their local and bulk log masses, in the order of these."""
    opened, group = list(map(is_open, near, far, [margin] * len(near))), inputs.group_size
    for begin in range(0, len(opened), group) if inputs.opens_groups else ():
        of_group = slice(begin, begin + group)
        if any(opened[of_group]):
            opened[of_group] = [mass != -math.inf for mass in far[of_group]]
    return opened


def _attend_local(inputs: AttentionInputs) -> Softmax:
    """Attend to sink and window: output [batch, kv_heads, group, value_dim], contiguous and in the compute dtype."""
    regions, host = inputs.regions, inputs.regions.host
    query, begin = grouped(inputs), host.filled - regions.window_size
    key, value = (x.narrow(2, begin, regions.window_size) for x in (inputs.key, inputs.value))
    local = attend_to(inputs, query, key, value)
    output = local.output.to(inputs.compute_dtype, memory_format=torch.contiguous_format)
    local = Softmax(output.contiguous(), local.log_mass)
    if not regions.sink_size:
        return local
    # Two calls on views: one on a copy of both takes as long at best, and half as long again where its memory is new.
    key, value = (_sinks(x, host.first, regions.sink_size) for x in (inputs.key, inputs.value))
    sink = attend_to(inputs, query, key, value)
    local.take_in(sink)
    return Softmax(local.output, torch.logaddexp(local.log_mass, sink.log_mass))


def _add_bulk(inputs: AttentionInputs, opened: list[bool], decisions: Tensor, local: Softmax) -> int:
    """Merge the bulk keys of open pairs into the local output in place; returns the triples scored.

    Args:
        inputs: The call.
        opened: The decisions, [batch * heads].
        decisions: The same, [batch, kv_heads, group] bool.
        local: Output and log mass of the local keys, [batch, kv_heads, group, ...].
    """
    host, group, batch, kv_heads = inputs.regions.host, inputs.group_size, *inputs.key.shape[:2]
    output, log_mass, decisions = (x.flatten(0, 1) for x in (local.output, local.log_mass, decisions))
    scored, end = 0, host.filled - inputs.regions.window_size
    is_one = batch == 1 or (len(set(host.first)) == 1 and all(map(is_flat, (inputs.key, inputs.value))))
    for row, rows in [(0, batch)] if is_one else [(row, 1) for row in range(batch)]:
        query = grouped(inputs).narrow(0, row, rows).flatten(0, 1)
        key, value = (x[row : row + rows, :, : host.filled].flatten(0, 1) for x in (inputs.key, inputs.value))
        begin, units = host.first[row] + inputs.regions.sink_size, slice(row * kv_heads, (row + rows) * kv_heads)
        scored += take_in_open(
            inputs,
            query,
            opened[units.start * group : units.stop * group],
            lambda start, stop, key=key, value=value: (key[start:stop], value[start:stop]),
            (begin, end),
            Softmax(output[units], log_mass[units]),
            decisions[units],
        )
    return scored


def take_in_open(
    inputs: AttentionInputs,
    query: Tensor,
    opened: list[bool],
    read: Callable[[int, int], tuple[Tensor, Tensor]],
    bulk: tuple[int, int],
    local: Softmax,
    decisions: Tensor,
) -> int:
    """Merge the bulk keys of the open pairs of some KV heads into the local output in place; returns triples scored.

    Args:
        inputs: The call, for scale, softcap and dtype.
        query: [kv_heads, group, dim].
        opened: The decisions, [kv_heads * group].
        read: Gives the keys and values of the KV heads from one to before another, [kv_heads, keys, dim].
        bulk: First slot of the bulk in those keys, and past its last.
        local: Output and log mass of the local keys, [kv_heads, group, ...].
        decisions: The decisions, [kv_heads, group] bool.
    """
    scored, group, (begin, end) = 0, query.shape[1], bulk
    flags = [opened[at : at + group] for at in range(0, len(opened), group)]
    for start, stop in _runs(flags):
        # Heads between open ones are taken along: their keys are read anyway.
        wanted = [head for of_group in flags[start:stop] for head, flag in enumerate(of_group) if flag]
        units, heads = slice(start, stop), slice(min(wanted), max(wanted) + 1)
        near = Softmax(local.output[units, heads], local.log_mass[units, heads])
        found = _with_bulk(inputs, query[units, heads], *read(start, stop), begin, end, near).output
        n_rows = near.log_mass.numel()
        if len(wanted) < n_rows:
            found = torch.where(decisions[units, heads].unsqueeze(-1), found, near.output)
        near.output.copy_(found)
        scored += n_rows * (end - begin)
    return scored


def _runs(flags: list[list[bool]]) -> list[tuple[int, int]]:
    """Cut the KV heads with an open head into runs without gaps; all are one where most are open.

    Args:
        flags: For each KV head, whether its heads are open.

    Returns:
        First KV head of each run, and past its last.
    """
    wanted = [unit for unit, of_group in enumerate(flags) if any(of_group)]
    if len(wanted) >= _TOGETHER_FROM * len(flags):
        return [(0, len(flags))]
    begins = [unit for unit in wanted if unit - 1 not in wanted]
    ends = [unit + 1 for unit in wanted if unit + 1 not in wanted]
    return list(zip(begins, ends, strict=True))


def _with_bulk(
    inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, begin: int, end: int, near: Softmax
) -> Softmax:
    """Attend some KV heads to slots too: by two products, or by the kernel, cut so that every core has some.

    Args:
        inputs: The call.
        query: [kv_heads, rows, dim].
        key: [kv_heads, keys, dim].
        value: [kv_heads, keys, value_dim].
        begin: First slot.
        end: Past the last slot.
        near: Of their local keys: output [kv_heads, rows, value_dim] in the dtype of the log mass, [kv_heads, rows].

    Returns:
        Output and log mass of all keys, shapes and dtypes of `near`.
    """
    if inputs.softcap is None and may_use_products(query, key, begin, end):
        found = attend_by_products(query, key, value, begin, end, inputs.scale, near)
        if found is not None:
            return found
    n_keys, splits = end - begin, 1
    if len(key) == 1 and is_fused(inputs):
        splits = max(min(torch.get_num_threads(), _MOST_SPLITS, n_keys // _FEWEST_KEYS_TO_SPLIT), 1)
    size, rest = divmod(n_keys, splits)
    for count, length, start in ((splits, size, begin), (1, rest, end - rest)):
        if length:
            stretches = (
                x.narrow(1, start, count * length).unflatten(1, (count, length)).transpose(0, 1) for x in (key, value)
            )
            part = attend_to(inputs, query.expand(count, -1, -1, -1), *stretches)
            output = part.output.to(near.output.dtype)
            near = reduce(Softmax.merge, map(Softmax, output.unbind(0), part.log_mass.unbind(0)), near)
    return near


def grouped(inputs: AttentionInputs) -> Tensor:
    """Lay the heads of a group along the row axis, [batch, kv_heads, group, dim]: its keys are then read once."""
    batch, _, _, dim = inputs.query.shape
    return inputs.query.reshape(batch, inputs.key.shape[1], inputs.group_size, dim)


def _sinks(x: Tensor, first: list[int], sink_size: int) -> Tensor:
    """Take the sink of each sequence from [batch, kv_heads, keys, dim]; a view where all begin in the same slot."""
    if len(set(first)) == 1:
        return x.narrow(2, first[0], sink_size)
    return torch.stack([x[row, :, begin : begin + sink_size] for row, begin in enumerate(first)])
