"""Attention of one step of continuous batching: many sequences in one row of tokens, their keys in pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.page_table import PageTable, TableInputs, TableRow
from patchattn.call.regions import Counts
from patchattn.gates.base import Known
from patchattn.hf.cache import chunks_kept, load_moments, store_moments, why_rebuilt
from patchattn.hf.gated import attend_call
from patchattn.hf.pages import LayerPages, Sequence, Step
from patchattn.hf.state import LayerState
from patchattn.moments.gaussian import CHUNK
from patchattn.moments.running import PromptMoments


def attend_pages(
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: LayerPages,
    rest: tuple[float, float | None, Tensor | None, bool],
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """Attend as the layer's policy says, each sequence to its own keys.

    Sequences with one query go together: of closed heads only sink and window are read. Each of the others has its keys
    gathered and is a call of its own.

    Args:
        state: The layer.
        query: [1, heads, rows, dim].
        key: [1, kv_heads, rows, dim]; already in the pages.
        value: [1, kv_heads, rows, value_dim].
        pages: The pages of the layer.
        rest: Scale, softcap, sink logits and whole groups, see `AttentionInputs`.
        positions: [1, rows], or None.
        hidden: [1, rows, hidden], or None.

    Returns:
        [1, rows, heads, value_dim].
    """
    listed = [(sequence, _row(state, pages, sequence)) for sequence in pages.step.sequences]
    together = [row for _, row in listed if row is not None]
    by_table = None
    if together and state.by_table is not None:
        by_table = _attend_by_table(state, query, pages, rest, together, positions, hidden)
        if len(together) == query.shape[2]:
            return by_table.unsqueeze(0)
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for sequence in (sequence for sequence, row in listed if row is None):
        rows, regions = sequence.rows, sequence.regions(state.policy, query.device)
        inputs = AttentionInputs(query[:, :, rows], *pages.read(sequence, key, value), regions, *rest)
        of_rows = (None if x is None else x[:, rows] for x in (positions, hidden))
        found, attended = attend_call(state, inputs, sequence.memory, *of_rows)
        if attended is not None and state.record is not None:
            asked = int(regions.host_counts.n_asked) * attended.open.shape[1]
            pages.step.count([sequence], sequence.phase, asked, attended.open)
        output[:, rows] = found.transpose(1, 2)
    if by_table is not None:
        return output.index_copy_(1, _table(state, pages, together).of_step, by_table.unsqueeze(0))
    for (reason, _), rows in _apart(together).items():
        found = _attend_rows(state, query, pages, rest, reason, rows, positions, hidden)
        output[0, _picked(rows, query.device)] = found
    return output


class Row(NamedTuple):
    """A sequence with one query that goes together with others.

    Args:
        sequence: The sequence.
        reason: Why it is dense; None if it is asked.
        moments: The moments by which it is asked; None where none are needed, or there are none yet.
    """

    sequence: Sequence
    reason: str | None
    moments: PromptMoments | None


def _row(state: LayerState, pages: LayerPages, sequence: Sequence) -> Row | None:
    """Say how a sequence goes together with others; None if it is a call of its own."""
    gate, takes_rows = state.policy.gate, state.paged is not None or state.by_table is not None
    if not takes_rows or state.replay is not None or sequence.queries != 1 or not len(pages.places):
        return None
    reason = state.why_dense(sequence.keys, "decode")
    if reason is not None:
        return Row(sequence, reason, None)
    if gate.reads_keys:
        return None
    moments = _moments(state, pages, sequence) if gate.keeps_moments else None
    if gate.keeps_moments and moments is None and state.by_table is None:
        return None
    return Row(sequence, None, moments)


def _moments(state: LayerState, pages: LayerPages, sequence: Sequence) -> PromptMoments | None:
    """Return the moments of a sequence up to its query; None before the first chunk is full.

    Once in a chunk they go on, from keys that are gathered for it. How far they go the host knows.
    """
    policy, memory, layer = state.policy, sequence.memory, state.cache_layer
    grid = (policy.sink_size, policy.window_size)
    needed = (sequence.keys - sum(grid)) // CHUNK
    if needed < 1:
        return None
    kept = load_moments(memory, layer, pages.store.key[:1].unsqueeze(0), grid)
    covered = 0 if kept is None else chunks_kept(memory, layer, grid)
    if kept is not None and covered == needed:
        return kept
    if kept is None:
        state.counters.add("rebuilt", why_rebuilt(memory, layer))
    key = pages.read_keys(sequence)
    upto = torch.full((1,), needed, dtype=torch.long, device=key.device)
    start = PromptMoments.empty(key) if kept is None else kept
    moments = start.advanced(key, sequence.regions(policy, key.device), upto, needed - covered)
    store_moments(memory, layer, moments, grid, sequence.keys)
    return moments


def _apart(rows: list[Row]) -> dict[tuple[str | None, int], list[Row]]:
    """Part those that are asked, and dense ones by reason and by about how long they are: the shorter are padded."""
    parts: dict[tuple[str | None, int], list[Row]] = {}
    for row in rows:
        size = 0 if row.reason is None else row.sequence.keys.bit_length()
        parts.setdefault((row.reason, size), []).append(row)
    return parts


def _picked(rows: list[Row], device: torch.device) -> slice | Tensor:
    """Return which of the step's rows they are."""
    begins = [row.sequence.begin for row in rows]
    is_run = begins[-1] - begins[0] == len(begins) - 1
    return slice(begins[0], begins[-1] + 1) if is_run else torch.tensor(begins, device=device)


def _attend_rows(
    state: LayerState,
    query: Tensor,
    pages: LayerPages,
    rest: tuple[float, float | None, Tensor | None, bool],
    reason: str | None,
    rows: list[Row],
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """Attend rows that are all asked, or all dense for a reason, [rows, heads, value_dim]; see `attend_pages`."""
    assert state.paged is not None
    sequences, picked = [row.sequence for row in rows], _picked(rows, query.device)
    call = pages.step.paged_rows(sequences, pages.places, state.policy, pages.store.key.shape[1])
    inputs = call.without_keys(query[0, :, picked].transpose(0, 1).unsqueeze(2), pages.store, *rest)
    if reason is not None:
        state.counters.add("dense_calls", reason)
        return state.paged.dense(inputs, call, pages.store)[:, :, 0]
    gate, kept = state.policy.gate, [row.moments for row in rows]
    moments = pages.moments_of(state.layer, kept) if gate.keeps_moments else None
    mass, _ = gate.weigh(inputs, _known(state, moments, picked, positions, hidden))
    attended = state.paged.attend(inputs, call, pages.store, mass, gate.margin)
    _count(state, pages, rows, call.regions.counts, attended)
    return attended.output[:, :, 0]


def _attend_by_table(
    state: LayerState,
    query: Tensor,
    pages: LayerPages,
    rest: tuple[float, float | None, Tensor | None, bool],
    rows: list[Row],
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """Attend rows, asked and dense ones, [rows, heads, value_dim]; see `attend_pages`."""
    assert state.by_table is not None
    table, gate = _table(state, pages, rows), state.policy.gate
    asked = [row for row in rows if row.reason is None]
    known = Known(state.layer)
    if asked:
        filled = [row.moments for row in rows] + [None] * (table.numbers.shape[1] - len(rows))
        moments = pages.moments_of(state.layer, filled) if gate.keeps_moments else None
        known = _known(state, moments, table.numbers[0], positions, hidden)
    attended = state.by_table.attend(TableInputs(query, pages.store, table, *rest), gate, known)
    for reason in {row.reason for row in rows if row.reason is not None}:
        state.counters.add("dense_calls", reason)
    if asked:
        _count(state, pages, asked, table.counts, table.asked(attended))
    return attended.output[:, :, 0]


def _table(state: LayerState, pages: LayerPages, rows: list[Row]) -> PageTable:
    """Return where the keys of rows are, on the device."""
    told = [TableRow(each.begin, each.first_key, each.keys, reason is None) for each, reason, _ in rows]
    return pages.step.table(told, pages, state.policy)


def _known(
    state: LayerState,
    moments: PromptMoments | None,
    picked: slice | Tensor,
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Known:
    """Say what a gate may use of some of the step's rows."""
    positions, hidden = (None if x is None else x[0, picked].unsqueeze(1) for x in (positions, hidden))
    return Known(state.layer, moments, measured=state.measured, positions=positions, hidden=hidden)


def _count(state: LayerState, pages: LayerPages, rows: list[Row], counts: Counts, attended: Attended) -> None:
    """Count a call of rows that were asked."""
    state.counters.add("gated_calls", "decode")
    if state.record is not None:
        state.counters.count("decode", counts, attended)
        pages.step.count([row.sequence for row in rows], "decode", attended.open.shape[1], attended.open)


def attend_local_pages(
    attend: Callable[..., tuple[Tensor, Any]], query: Tensor, key: Tensor, value: Tensor, step: Step, window: int
) -> Tensor:
    """Attend in a sliding layer, by the model's own attention, each sequence to the keys that the engine kept of it.

    Args:
        attend: The model's own attention function; takes query, key, value and mask.
        query: [1, heads, rows, dim].
        key: [1, kv_heads, keys, dim]; of each sequence the last of its window and those of its rows.
        value: [1, kv_heads, keys, value_dim].
        step: The sequences.
        window: Number of last tokens that are attended, the query's own included.

    Returns:
        [1, rows, heads, value_dim].
    """
    parts, begin = [], 0
    for sequence in step.sequences:
        count = sequence.queries + min(sequence.keys - sequence.queries, window - 1)
        ages = _ages(sequence, count, query.device)
        mask = torch.zeros(1, 1, *ages.shape, dtype=query.dtype, device=query.device)
        mask.masked_fill_((ages < 0) | (ages >= window), -torch.inf)
        own = (x[:, :, begin : begin + count] for x in (key, value))
        parts.append(attend(query[:, :, sequence.rows], *own, mask)[0])
        begin += count
    return torch.cat(parts, dim=1)


def _ages(sequence: Sequence, count: int, device: torch.device) -> Tensor:
    """Return how many tokens before each row each of the last keys is, [rows, keys]."""
    rows, keys = (torch.arange(n, device=device) for n in (sequence.queries, count))
    return (rows + count - sequence.queries)[:, None] - keys
