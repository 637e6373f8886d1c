"""One query for each of many sequences whose keys are in pages: of closed heads only sink and window are read."""

from __future__ import annotations

from torch import Tensor

from patchattn.backends.blockwise.decode import grouped, take_in_open
from patchattn.backends.blockwise.products import GRID
from patchattn.backends.blockwise.softmax import Softmax, attend_to, with_sink_logits
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.paged import PagedRows, PagedStore
from patchattn.gates.decision import is_open


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
    query, group = grouped(inputs), inputs.group_size
    local = attend_to(inputs, query, *store.read(rows.local))
    local = Softmax(local.output.to(inputs.compute_dtype), local.log_mass)
    if inputs.sink_logits is not None:
        local = with_sink_logits(local, inputs.sink_logits.view(rows.kv_heads, group))
    masses = zip(local.log_mass.flatten().tolist(), bulk_log_mass.flatten().tolist(), strict=True)
    opened = [is_open(near, far, margin) for near, far in masses]
    decisions = bulk_log_mass.new_tensor(opened).bool().view(local.log_mass.shape)
    scored = count * heads * (rows.regions.sink_size + rows.regions.window_size)
    for row, (found, n_bulk) in enumerate(zip(rows.bulk, rows.n_bulk, strict=True)):
        of_row = opened[row * heads : (row + 1) * heads]
        if any(of_row):
            # Up to 127 keys of the window beside: products are over multiples of so many.
            some = found[:, : -(-n_bulk // GRID) * GRID]
            scored += take_in_open(
                inputs,
                query[row],
                of_row,
                lambda start, stop, some=some: store.read(some[start:stop]),
                (0, n_bulk),
                Softmax(local.output[row], local.log_mass[row]),
                decisions[row],
            )
    return Attended(
        local.output.to(inputs.query.dtype).view(count, heads, 1, -1), decisions.view(count, heads, 1), scored
    )


def attend_paged_densely(inputs: AttentionInputs, rows: PagedRows, store: PagedStore) -> Tensor:
    """Attend to all keys, [sequences, heads, 1, value_dim]; arguments as in `attend_paged`."""
    found = attend_to(inputs, grouped(inputs), *store.read(rows.all_keys), rows.seen)
    if inputs.sink_logits is not None:
        found = with_sink_logits(found, inputs.sink_logits.view(rows.kv_heads, inputs.group_size))
    return found.output.reshape(*inputs.query.shape[:3], -1)
