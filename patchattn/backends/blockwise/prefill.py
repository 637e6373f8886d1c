"""Many queries per sequence: the local pass, and the bulk pass over compacted rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from patchattn.backends.blockwise.softmax import Softmax, attend_to, without_rows
from patchattn.call.inputs import AttentionInputs

SLAB = 4096
"""Queries per slab: workspace beyond the output is bounded by this, whatever the length of the prompt."""

# Queries per chunk of the local pass: more score more keys beyond their windows, fewer make smaller tiles.
_LOCAL_ROWS = 64
# Chunks per call, so that what is made of them stays in the caches.
_LOCAL_CHUNKS = 16
# Scores of a masked call of the bulk pass, times the head dimension: more waste half of them, fewer cost more calls.
_MOST_MASKED = 6 << 20


def attend_local(inputs: AttentionInputs, rows: slice, output: Tensor | None = None) -> tuple[Softmax, int]:
    """Pass 1: queries against sink and window, in chunks of neighbours that share a short stretch of keys.

    Args:
        inputs: The call.
        rows: Query rows to compute.
        output: [batch, rows, heads, value_dim]; where the output goes. None makes a place for it.

    Returns:
        Output, a view, and local log mass without sink logits, [batch, heads, rows, ...], and the number of (head,
        query, key) triples scored.
    """
    regions, host, size = inputs.regions, inputs.regions.host, _LOCAL_ROWS
    length = rows.stop - rows.start
    if output is None:
        batch, heads = inputs.query.shape[:2]
        output = inputs.query.new_empty(batch, length, heads, inputs.value.shape[3])
    chunks, rest = divmod(length, size)
    # From here on a query's sink lies whole before its window, and nothing needs to be masked but the window's ends.
    plain_from = host.last_first + regions.sink_size + regions.window_size - 1 - host.query_slot - rows.start
    irregular = min(max(-(-plain_from // size), 0), chunks) if host.is_plain else chunks
    most = max(_LOCAL_CHUNKS // inputs.query.shape[0], 1)
    pieces = [
        *((begin * size, min(most, irregular - begin), size, False) for begin in range(0, irregular, most)),
        *((begin * size, min(most, chunks - begin), size, True) for begin in range(irregular, chunks, most)),
        (chunks * size, 1 if rest else 0, rest, host.is_plain and chunks * size >= plain_from),
    ]
    log_masses, scored = [], 0
    for begin, count, chunk, is_plain in pieces:
        if count:
            part, keys = _local_chunks(inputs, rows.start + begin, count, chunk, is_plain=is_plain)
            output[:, begin : begin + count * chunk] = part.output
            log_masses.append(part.log_mass)
            scored += inputs.query.shape[0] * inputs.query.shape[1] * count * chunk * keys
    return Softmax(output.transpose(1, 2), torch.cat(log_masses, dim=1).transpose(1, 2)), scored


def add_bulk(inputs: AttentionInputs, rows: slice, opened: Tensor, local: Softmax) -> int:
    """Pass 2: open pairs against their bulk keys, merged into the output of pass 1 in place.

    Args:
        inputs: The call.
        rows: The query rows of `opened` and `local`.
        opened: [batch, heads, rows] bool; pairs that read the bulk.
        local: Pass 1 of these rows, with sink logits; its output is overwritten where pairs are open.

    Returns:
        Number of (head, query, key) triples scored.
    """
    regions, host, group = inputs.regions, inputs.regions.host, inputs.group_size
    # Past the end of this range of slots, in key slots; a query of slot `s` has its bulk end at `s - window + 1`.
    bulk_ends = (regions.query_slots[rows] - regions.window_size + 1).clamp(0, regions.key_length)
    kv_heads = inputs.key.shape[1]
    is_wanted = opened.unflatten(1, (kv_heads, group)).any(3).any(2).tolist()
    scored = 0
    for row, first in enumerate(host.first):
        for kv_head in range(kv_heads):
            if is_wanted[row][kv_head]:
                scored += _compacted(inputs, rows, row, kv_head, first + regions.sink_size, bulk_ends, opened, local)
    return scored


def _local_chunks(inputs: AttentionInputs, begin: int, count: int, size: int, *, is_plain: bool) -> tuple[Softmax, int]:
    """Attend `count` chunks of `size` queries, from row `begin` on, in one call for the window and one for the sink.

    Returns:
        Output [batch, rows, heads, value_dim], log mass [batch, rows, heads], and the keys scored per query.
    """
    regions, host = inputs.regions, inputs.regions.host
    (batch, heads, _, _), kv_heads, window = inputs.query.shape, inputs.key.shape[1], regions.window_size
    slot = host.query_slot + begin
    reach = window - 1 + size
    # A sequence shorter than its window has empty slots before it. A cache may hold anything in the slots after the
    # last query: they are not read, not even to be masked.
    lowest = slot - window + 1
    span = slice(max(lowest, 0), slot + count * size)

    def chunked(x: Tensor) -> Tensor:
        """Overlapping stretches, [batch * chunks, kv_heads, reach, dim]; views of a single sequence."""
        near = pad(x[:, :, span], (0, 0, max(-lowest, 0), 0)) if lowest < 0 else x[:, :, span]
        return near.unfold(2, reach, size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def by_rows(x: Tensor) -> Tensor:
        """From [batch * chunks, kv_heads, group * size, ...] to [batch, rows, heads, ...]."""
        apart = x.unflatten(2, (-1, size)).movedim(3, 1)
        return apart.reshape(batch, count * size, heads, *x.shape[3:])

    # Heads of a group as rows: the kernel's tiles grow with the rows.
    query = inputs.query[:, :, begin : begin + count * size].unflatten(2, (count, size)).transpose(1, 2)
    query = query.reshape(batch * count, kv_heads, -1, query.shape[4])
    row, offset = torch.arange(size, device=query.device)[:, None], torch.arange(reach, device=query.device)
    seen, sink_seen = ((offset >= row) & (offset < row + window))[None], None
    sink_slots = regions.first[:, None] + torch.arange(regions.sink_size, device=query.device)
    sink_index = sink_slots.clamp(max=host.filled - 1)
    if not is_plain:
        window_slots = lowest + size * torch.arange(count, device=query.device)[:, None] + offset
        real = regions.valid[:, window_slots.clamp(0, host.filled - 1)] & (window_slots >= 0)
        slots = slot + torch.arange(count * size, device=query.device).view(count, size, 1)
        # A sink key that the window holds too must count once.
        sink_real = (sink_slots < host.filled) & regions.valid.gather(1, sink_index)
        sink_seen = ((sink_slots[:, None, None] <= slots - window) & sink_real[:, None, None]).flatten(0, 1)
        seen = (seen & real[:, :, None]).flatten(0, 1)
    near = attend_to(inputs, query, chunked(inputs.key), chunked(inputs.value), _of_groups(seen, inputs.group_size))
    if regions.sink_size:
        key, value = (
            _at_slots(x, sink_index)[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
            for x in (inputs.key, inputs.value)
        )
        sink_seen = None if sink_seen is None else _of_groups(sink_seen, inputs.group_size)
        near = near.merge(attend_to(inputs, query, key, value, sink_seen))
        if not is_plain:
            near = without_rows(near, near.log_mass == -torch.inf)
    return Softmax(by_rows(near.output), by_rows(near.log_mass)), regions.sink_size + reach


def _of_groups(seen: Tensor, group: int) -> Tensor:
    """Repeat a mask, [batch, size, keys], for the heads of a group, [batch, 1, group * size, keys]."""
    return seen[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]


def _compacted(
    inputs: AttentionInputs,
    rows: slice,
    row: int,
    kv_head: int,
    bulk_begin: int,
    bulk_ends: Tensor,
    opened: Tensor,
    local: Softmax,
) -> int:
    """Gather the open (position, head-in-group) rows of one KV head and attend them to the bulk."""
    regions, group = inputs.regions, inputs.group_size
    heads = slice(kv_head * group, (kv_head + 1) * group)
    position, head = opened[row, heads].T.nonzero(as_tuple=True)
    head = head + heads.start
    query = inputs.query[row, head, position + rows.start][None, None]
    key, value = (x[row : row + 1, kv_head : kv_head + 1] for x in (inputs.key, inputs.value))
    # Where padding lies between real tokens every call is masked.
    real = None if regions.host.is_plain else regions.valid[row]
    ends = bulk_ends[position]
    # Indexed by tensors, so copies: merging changes them in place.
    merged = Softmax(local.output[row, head, position].to(inputs.compute_dtype), local.log_mass[row, head, position])
    scored = 0
    for some, slots, is_seen_whole in _rectangles(ends.tolist(), bulk_begin, _MOST_MASKED // query.shape[3]):
        scored += (some.stop - some.start) * (slots.stop - slots.start)
        seen = None if is_seen_whole else torch.arange(slots.start, slots.stop, device=ends.device) < ends[some, None]
        if real is not None:
            seen = real[None, slots] if seen is None else seen & real[slots]
        far = attend_to(
            inputs,
            query[:, :, some],
            key[:, :, slots],
            value[:, :, slots],
            None if seen is None else seen[None, None],
        )
        merged.take_in_rows(some, Softmax(far.output[0, 0], far.log_mass[0, 0]))
    local.output[row, head, position] = merged.output.to(local.output.dtype)
    return scored


def _rectangles(ends: list[int], begin: int, most_masked: int) -> Iterator[tuple[slice, slice, bool]]:
    """Cover what rows see by rectangles of rows and slots, nearly all of them without a mask.

    All rows see the slots up to the end of the first: one rectangle. From there on, the first and the second half of
    the rows are covered in the same way, until a mask over what is left is cheaper than more calls.

    Args:
        ends: Past the last slot that each row sees, in ascending order.
        begin: First slot that they see.
        most_masked: Scores that a masked rectangle may have.

    Yields:
        Rows, slots, and whether every row sees every slot. A row may see none of the slots of a masked rectangle.
    """
    waiting = [(0, len(ends), begin)]
    while waiting:
        first, last, begin = waiting.pop()
        shared, longest = ends[first], ends[last - 1]
        if shared > begin:
            yield slice(first, last), slice(begin, shared), True
            begin = shared
        if longest <= begin:
            continue
        if last - first < 2 or (last - first) * (longest - begin) <= most_masked:
            yield slice(first, last), slice(begin, longest), False
            continue
        middle = last - _evenly_shared((last - first + 1) // 2)
        waiting += [(middle, last, begin), (first, middle, begin)]


def _evenly_shared(n_rows: int) -> int:
    """Return about so many rows, fewer if need be, that give each core the same number of the kernel's tiles."""
    tile = 256 if n_rows >= 768 else 64 if n_rows >= 192 else 32
    step = tile * torch.get_num_threads()
    return n_rows // step * step or n_rows


def _at_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Gather [batch, heads, slots, dim] at [batch, n] slots."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
