"""Many queries per sequence: the local pass, the bulk pass over compacted rows, and whole KV heads done densely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from patchattn.backends.blockwise_dense import causal_pairs
from patchattn.backends.blockwise_kernel import Part, attend_to, is_fused, merge, with_sink_logits
from patchattn.inputs import AttentionInputs

SLAB = 4096
"""Queries per slab: workspace beyond the output is bounded by this, whatever the length of the prompt."""

# Queries per chunk of the local pass: more score more keys beyond their windows, fewer copy more keys per query.
_LOCAL_ROWS = 64
_MOST_LOCAL_ROWS = 128
# Open rows per chunk of the bulk pass. More read the keys less often, for the kernel's tiles grow with them (from 192
# and from 768 rows on; the last is a multiple of that tile, so that two cores get the same). Fewer score fewer keys
# beyond their bulk: a chunk should not span more than this many positions, or this share of the keys.
_BULK_ROWS = (32, 128, 256, 1024)
_SPAN = 640
_SPAN_SHARE = 1 / 8
# From this share of open pairs on, one dense causal call is faster than gathering rows and merging.
_DENSE_FROM = 0.8


def attend_local(inputs: AttentionInputs, rows: slice) -> tuple[Part, int]:
    """Pass 1: queries against sink and window, in chunks of neighbours that share a short stretch of keys.

    Args:
        inputs: The call.
        rows: Query rows to compute.

    Returns:
        Output and local log mass without sink logits, [batch, heads, rows, ...], and the number of (head, query, key)
        triples scored.
    """
    regions, host = inputs.regions, inputs.regions.host
    size = min(max(regions.window_size // 8, _LOCAL_ROWS), _MOST_LOCAL_ROWS)
    if inputs.group_size == 1:
        size = _MOST_LOCAL_ROWS
    length = rows.stop - rows.start
    chunks, rest = divmod(length, size)
    # From here on a query's sink lies whole before its window, and nothing needs to be masked but the window's ends.
    plain_from = host.last_first + regions.sink_size + regions.window_size - 1 - host.query_slot - rows.start
    irregular = min(max(-(-plain_from // size), 0), chunks) if host.is_plain else chunks
    pieces = [(0, irregular, size, False), (irregular * size, chunks - irregular, size, True)]
    pieces.append((chunks * size, 1 if rest else 0, rest, host.is_plain and chunks * size >= plain_from))
    parts, scored = [], 0
    for begin, count, chunk, is_plain in pieces:
        if count:
            part, keys = _local_chunks(inputs, rows.start + begin, count, chunk, is_plain=is_plain)
            parts.append(part)
            scored += inputs.query.shape[0] * inputs.query.shape[1] * count * chunk * keys
    if len(parts) == 1:
        return parts[0], scored
    output = torch.cat([part.output.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)
    return Part(output, torch.cat([part.log_mass for part in parts], dim=2)), scored


def add_bulk(inputs: AttentionInputs, rows: slice, opened: Tensor, local: Part) -> int:
    """Pass 2: open pairs against their bulk keys, merged into the output of pass 1 in place.

    Args:
        inputs: The call.
        rows: The query rows of `opened` and `local`.
        opened: [batch, heads, rows] bool.
        local: Pass 1 of these rows, with sink logits; its output is overwritten where pairs are open.

    Returns:
        Number of (head, query, key) triples scored.
    """
    regions, host, group = inputs.regions, inputs.regions.host, inputs.group_size
    # Past the end of this range of slots, in key slots; a query of slot `s` has its bulk end at `s - window + 1`.
    bulk_ends = (regions.query_slots[rows] - regions.window_size + 1).clamp(0, regions.key_length)
    kv_heads = inputs.key.shape[1]
    share = opened.unflatten(1, (kv_heads, group)).float().mean((2, 3)).tolist()
    scored = 0
    for row, first in enumerate(host.first):
        dense = [head for head in range(kv_heads) if share[row][head] >= _DENSE_FROM]
        if dense and is_fused(inputs) and host.is_plain:
            done, triples = _densely(inputs, rows, row, dense, opened, local)
            scored += triples
            dense = dense if done else []
        else:
            dense = []
        for kv_head in range(kv_heads):
            if kv_head not in dense and share[row][kv_head]:
                scored += _compacted(inputs, rows, row, kv_head, first + regions.sink_size, bulk_ends, opened, local)
    return scored


def _local_chunks(inputs: AttentionInputs, begin: int, count: int, size: int, *, is_plain: bool) -> tuple[Part, int]:
    """Attend `count` chunks of `size` queries, from row `begin` on, in one call; also returns the keys per query."""
    regions, host = inputs.regions, inputs.regions.host
    batch, window = inputs.query.shape[0], regions.window_size
    slot = host.query_slot + begin
    reach = window - 1 + size
    # A sequence shorter than its window has empty slots before it. A cache may hold anything in the slots after the
    # last query: they are not read, not even to be masked.
    lowest = slot - window + 1
    span = slice(max(lowest, 0), slot + count * size)

    def chunked(x: Tensor, sink: Tensor) -> Tensor:
        near = pad(x[:, :, span], (0, 0, max(-lowest, 0), 0)) if lowest < 0 else x[:, :, span]
        near = near.unfold(2, reach, size).permute(0, 2, 1, 4, 3)
        both = torch.cat([sink[:, None].expand(-1, count, -1, -1, -1), near], dim=3)
        return both.flatten(0, 1)

    sink_slots = regions.first[:, None] + torch.arange(regions.sink_size, device=regions.first.device)
    sink_index = sink_slots.clamp(max=host.filled - 1)
    key, value = (chunked(x, _at_slots(x, sink_index)) for x in (inputs.key, inputs.value))
    row, offset = torch.arange(size, device=key.device)[:, None], torch.arange(reach, device=key.device)
    in_window = (offset >= row) & (offset < row + window)
    if is_plain:
        seen = pad(in_window, (regions.sink_size, 0), value=True)[None, None]
    else:
        window_slots = lowest + size * torch.arange(count, device=key.device)[:, None] + offset
        real = regions.valid[:, window_slots.clamp(0, host.filled - 1)] & (window_slots >= 0)
        slots = slot + torch.arange(count * size, device=key.device).view(count, size, 1)
        # A sink key that the window holds too must count once.
        sink_real = (sink_slots < host.filled) & regions.valid.gather(1, sink_index)
        in_sink = (sink_slots[:, None, None] <= slots - window) & sink_real[:, None, None]
        seen = torch.cat([in_sink, in_window & real[:, :, None]], dim=3).flatten(0, 1)[:, None]
    query = inputs.query[:, :, begin : begin + count * size].unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    part = attend_to(inputs, query, key, value, seen)
    output = part.output.transpose(1, 2).reshape(batch, count * size, -1, inputs.value.shape[3]).transpose(1, 2)
    log_mass = part.log_mass.unflatten(0, (batch, count)).transpose(1, 2).flatten(2)
    return Part(output, log_mass), key.shape[2]


def _compacted(
    inputs: AttentionInputs,
    rows: slice,
    row: int,
    kv_head: int,
    bulk_begin: int,
    bulk_ends: Tensor,
    opened: Tensor,
    local: Part,
) -> int:
    """Gather the open (position, head-in-group) rows of one KV head and attend them to the bulk, chunk by chunk."""
    regions, group = inputs.regions, inputs.group_size
    heads = slice(kv_head * group, (kv_head + 1) * group)
    position, head = opened[row, heads].T.nonzero(as_tuple=True)
    head = head + heads.start
    query = inputs.query[row, head, position + rows.start][None, None]
    key, value = (x[row : row + 1, kv_head : kv_head + 1] for x in (inputs.key, inputs.value))
    # Where padding lies between real tokens every chunk is masked.
    real = None if regions.host.is_plain else regions.valid[row]
    ends = bulk_ends[position]
    size = _bulk_rows(len(position), rows.stop - rows.start, int(ends[-1]) - bulk_begin)
    full, ragged, scored = [], [], 0
    for begin in range(0, len(position), size):
        chunk = slice(begin, begin + size)
        chunk_query, chunk_ends = query[:, :, chunk], ends[chunk]
        shortest, longest = int(chunk_ends[0]), int(chunk_ends[-1])
        n_rows = chunk_query.shape[2]
        # Keys that every row of the chunk sees need no mask, which would cost as much as reading them.
        split = shortest if real is None else bulk_begin
        full.append(_rows_against(inputs, chunk_query, key, value, slice(bulk_begin, split)))
        slots = torch.arange(split, longest, device=ends.device)
        seen = slots < chunk_ends[:, None]
        if real is not None:
            seen = seen & real[split:longest]
        ragged.append(_rows_against(inputs, chunk_query, key, value, slice(split, longest), seen[None, None]))
        scored += n_rows * (longest - bulk_begin)
    pieces = [_joined(pieces) for pieces in (full, ragged)]
    near = Part(local.output[row, head, position], local.log_mass[row, head, position])
    local.output[row, head, position] = merge([near, *pieces]).output
    return scored


def _bulk_rows(n_open: int, n_positions: int, n_keys: int) -> int:
    """Choose the open rows per chunk, for `n_open` rows spread over a number of positions and their longest bulk."""
    span = max(_SPAN, n_keys * _SPAN_SHARE)
    fitting = [size for size in _BULK_ROWS if size * n_positions <= span * n_open]
    return max(fitting, default=_BULK_ROWS[0])


def _rows_against(
    inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, slots: slice, seen: Tensor | None = None
) -> Part:
    """Attend rows [1, 1, rows, dim] to a range of slots, which may be empty."""
    if slots.stop <= slots.start:
        shape = query.shape[2]
        return Part(
            query.new_zeros(1, 1, shape, value.shape[3]),
            query.new_full((1, 1, shape), -torch.inf, dtype=inputs.compute_dtype),
        )
    return attend_to(inputs, query, key[:, :, slots], value[:, :, slots], seen)


def _joined(parts: list[Part]) -> Part:
    """Put parts [1, 1, rows, ...] of different rows behind each other, [rows, ...]."""
    return Part(
        torch.cat([part.output for part in parts], dim=2)[0, 0],
        torch.cat([part.log_mass for part in parts], dim=2)[0, 0],
    )


def _densely(
    inputs: AttentionInputs, rows: slice, row: int, kv_heads: list[int], opened: Tensor, local: Part
) -> tuple[bool, int]:
    """Attend whole groups causally, as a dense model does, and keep it where their gates are open.

    Returns:
        Whether it was done, and the number of (head, query, key) triples scored. Not done where a value that is not
        finite spoils rows that do not see it.
    """
    host, group = inputs.regions.host, inputs.group_size
    first = host.first[row]
    # Queries before the first real token have no bulk keys.
    begin = max(rows.start, first - host.query_slot)
    if begin >= rows.stop:
        return True, 0
    slot, last = host.query_slot + begin, host.query_slot + rows.stop
    listed = torch.tensor(kv_heads, device=inputs.query.device)
    heads = (listed[:, None] * group + torch.arange(group, device=listed.device)).flatten()
    every = len(kv_heads) == inputs.key.shape[1]
    key, value = (x[row : row + 1] if every else x[row : row + 1, listed] for x in (inputs.key, inputs.value))
    query = inputs.query[row : row + 1, slice(None) if every else heads, begin : rows.stop]
    part = attend_to(inputs, query, key[:, :, slot:last], value[:, :, slot:last], causal=True)
    if slot > first:
        part = merge([attend_to(inputs, query, key[:, :, first:slot], value[:, :, first:slot]), part])
    if part.output.isnan().any() or part.log_mass.isnan().any():
        return False, 0
    if inputs.sink_logits is not None:
        part = with_sink_logits(part, inputs.sink_logits[heads, None])
    where = (row, slice(None) if every else heads, slice(begin - rows.start, None))
    local.output[where] = torch.where(opened[where][..., None], part.output[0], local.output[where])
    return True, len(heads) * causal_pairs(rows.stop - begin, slot - first)


def _at_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Gather [batch, heads, slots, dim] at [batch, n] slots."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
