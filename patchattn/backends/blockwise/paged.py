"""One query for each of many sequences whose keys are in pages: of closed heads only sink and window are read."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends.blockwise.decode import grouped, take_in_open
from patchattn.backends.blockwise.products import GRID, attend_by_products, may_use_products
from patchattn.backends.blockwise.softmax import Softmax, attend_to, with_sink_logits
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.paged import PagedRows, PagedStore
from patchattn.gates.decision import is_open

# Sequences of up to so many keys are padded and attended in one call: more are read faster one by one.
_SHORT = 1024
# Keys at either end of a range whose scores are a guess of its log mass.
_GLANCED = 16


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
    local = _attend(inputs, query, *store.read(rows.local(GRID)), n_local)
    if inputs.sink_logits is not None:
        local = with_sink_logits(local, inputs.sink_logits.view(rows.kv_heads, group))
    masses = zip(local.log_mass.flatten().tolist(), bulk_log_mass.flatten().tolist(), strict=True)
    opened = [is_open(near, far, margin) for near, far in masses]
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
        for row, places in enumerate(rows.places):
            key, value = (x[None] for x in store.read(rows.all_of(row, GRID)))
            parts.append(_attend(inputs, query[row : row + 1], key, value, len(places)))
        found = Softmax(*(torch.cat(part) for part in zip(*((p.output, p.log_mass) for p in parts), strict=True)))
    if inputs.sink_logits is not None:
        found = with_sink_logits(found, inputs.sink_logits.view(rows.kv_heads, inputs.group_size))
    return found.output.to(inputs.query.dtype).reshape(*inputs.query.shape[:3], -1)


def _attend(inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, n_keys: int) -> Softmax:
    """Attend to the first so many keys: by two products where they are faster, from a glance at the keys at both ends.

    Args:
        inputs: The call, for scale, softcap and dtype.
        query: [sequences, kv_heads, group, dim].
        key: [sequences, kv_heads, keys, dim].
        value: [sequences, kv_heads, keys, value_dim].
        n_keys: How many keys count.

    Returns:
        Output and log mass in the compute dtype, [sequences, kv_heads, group, ...].
    """
    found = None
    flat_query, flat_key, flat_value = (x.flatten(0, 1) for x in (query, key, value))
    if inputs.softcap is None and may_use_products(flat_query, flat_key, 0, n_keys):
        ends = torch.cat([flat_key[:, :_GLANCED], flat_key[:, n_keys - _GLANCED : n_keys]], dim=1)
        scores = torch.bmm(flat_query, ends.mT).float() * inputs.scale
        guess = scores.logsumexp(-1)
        found = attend_by_products(flat_query, flat_key, flat_value, 0, n_keys, inputs.scale, guess)
    if found is None:
        found = attend_to(inputs, query, key[:, :, :n_keys], value[:, :, :n_keys])
    shape = query.shape[:3]
    return Softmax(found.output.to(inputs.compute_dtype).view(*shape, -1), found.log_mass.view(shape))
