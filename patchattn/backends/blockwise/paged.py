"""One query for each of many sequences whose keys are in pages: of closed heads only sink and window are read."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends.blockwise.decode import grouped, opened_pairs, take_in_open
from patchattn.backends.blockwise.dense import by_products
from patchattn.backends.blockwise.products import GRID
from patchattn.backends.blockwise.softmax import Softmax, attend_to, with_sink_logits
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.paged import PagedRows, PagedStore

# Sequences of up to so many keys are padded and attended in one call: more are read faster one by one.
_SHORT = 1024


def attend_paged(
    inputs: AttentionInputs, rows: PagedRows, store: PagedStore, bulk_log_mass: Tensor, margin: float
) -> Attended:
    """Attend to local keys, and to bulk keys where the head gate is open; see `reference.attend`.

    Args:
        inputs: The call, as `PagedRows.without_keys` returns it.
        rows: The sequences; each has bulk keys, break-even or more.
        store: Their keys.
        bulk_log_mass: [sequences, heads, 1] nats.
        margin: Margin in nats from which a gate closes.
    """
    count, heads = inputs.query.shape[:2]
    query, group, n_local = grouped(inputs), inputs.group_size, rows.regions.sink_size + rows.regions.window_size
    local = _attend(inputs, query, *store.read(rows.local()))
    local = Softmax(local.output.to(inputs.compute_dtype), local.log_mass)
    if inputs.sink_logits is not None:
        local = with_sink_logits(local, inputs.sink_logits.view(rows.kv_heads, group))
    opened = opened_pairs(inputs, local.log_mass.flatten().tolist(), bulk_log_mass.flatten().tolist(), margin)
    decisions = bulk_log_mass.new_tensor(opened).bool().view(local.log_mass.shape)
    scored = count * heads * n_local
    for row, n_bulk in enumerate(rows.regions.last_n_bulk):
        of_row = opened[row * heads : (row + 1) * heads]
        if any(of_row):
            found = rows.bulk(row, GRID)
            scored += take_in_open(
                inputs,
                query[row],
                of_row,
                lambda start, stop, found=found: store.read(found[start:stop]),
                (0, n_bulk),
                Softmax(local.output[row], local.log_mass[row]),
                decisions[row],
            )
    return Attended(
        local.output.to(inputs.query.dtype).view(count, heads, 1, -1), decisions.view(count, heads, 1), scored
    )


def attend_paged_densely(inputs: AttentionInputs, rows: PagedRows, store: PagedStore) -> Tensor:
    """Attend to all keys, [sequences, heads, 1, value_dim]; arguments as in `attend_paged`."""
    query = grouped(inputs)
    if rows.regions.key_length <= _SHORT:
        found = attend_to(inputs, query, *store.read(rows.all_keys()), rows.seen())
    else:
        parts = []
        for row in range(len(query)):
            key, value = (x[None] for x in store.read(rows.all_of(row)))
            parts.append(_attend(inputs, query[row : row + 1], key, value))
        found = Softmax(torch.cat([part.output for part in parts]), torch.cat([part.log_mass for part in parts]))
    if inputs.sink_logits is not None:
        found = with_sink_logits(found, inputs.sink_logits.view(rows.kv_heads, inputs.group_size))
    return found.output.to(inputs.query.dtype).reshape(*inputs.query.shape[:3], -1)


def _attend(inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor) -> Softmax:
    """Attend to every key, by two products where they are faster; [sequences, kv_heads, group, ...]."""
    return by_products(inputs, query, key, value) or attend_to(inputs, query, key, value)
