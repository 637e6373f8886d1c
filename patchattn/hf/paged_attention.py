"""Attention of one step of continuous batching: many sequences in one row of tokens, their keys in pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.paged import PagedRows
from patchattn.gates.base import Known
from patchattn.hf.cache import load_moments
from patchattn.hf.gated import attend_call
from patchattn.hf.pages import LayerPages, Sequence, Step
from patchattn.hf.state import LayerState
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

    Sequences with one query go together, asked ones and dense ones: of closed heads only sink and window are read. Each
    of the others has its keys gathered and is a call of its own.

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
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    together: dict[tuple[str | None, int], list[tuple[Sequence, PromptMoments | None]]] = {}
    for sequence in pages.step.sequences:
        kind, moments = _kind(state, pages, sequence)
        if kind is not None:
            together.setdefault(kind, []).append((sequence, moments))
            continue
        rows, regions = sequence.rows, sequence.regions(state.policy, query.device)
        inputs = AttentionInputs(query[:, :, rows], *pages.read(sequence, key, value), regions, *rest)
        of_rows = (None if x is None else x[:, rows] for x in (positions, hidden))
        found, attended = attend_call(state, inputs, sequence.memory, *of_rows)
        if attended is not None and state.record is not None:
            sequence.count(attended, regions)
        output[:, rows] = found.transpose(1, 2)
    for (reason, _), of_kind in together.items():
        sequences = [sequence for sequence, _ in of_kind]
        begins = [sequence.begin for sequence in sequences]
        is_run = begins[-1] - begins[0] == len(begins) - 1
        picked = slice(begins[0], begins[-1] + 1) if is_run else torch.tensor(begins, device=query.device)
        rows = pages.step.paged_rows(sequences, pages.places, state.policy, pages.store.key.shape[1])
        inputs = rows.without_keys(query[0, :, picked].transpose(0, 1).unsqueeze(2), pages.store, *rest)
        if reason is None:
            kept = [moments for _, moments in of_kind if moments is not None]
            moments = pages.moments_of(state.layer, kept) if kept else None
            position, state_of_row = (None if x is None else x[0, picked].unsqueeze(1) for x in (positions, hidden))
            known = Known(state.layer, moments, measured=state.measured, positions=position, hidden=state_of_row)
            found = _ask(state, sequences, inputs, rows, pages, known)
        else:
            state.counters.add("dense_calls", reason)
            found = state.paged.dense(inputs, rows, pages.store)  # pyright: ignore[reportOptionalMemberAccess]
        output[0, picked] = found[:, :, 0]
    return output


def _kind(
    state: LayerState, pages: LayerPages, sequence: Sequence
) -> tuple[tuple[str | None, int] | None, PromptMoments | None]:
    """Say with which others a sequence goes together.

    Returns:
        None if with none; else why it is dense, None if it is asked, and of dense ones about how long it is, for the
        shorter are padded. And the moments by which it is asked.
    """
    gate = state.policy.gate
    if state.paged is None or state.replay is not None or sequence.queries != 1 or not len(pages.places):
        return None, None
    reason = state.why_dense(sequence.keys, "decode")
    if reason is not None:
        return (reason, sequence.keys.bit_length()), None
    moments = _moments(state, pages, sequence) if gate.keeps_moments else None
    # Once in a chunk moments have to go on, from keys that are gathered for it.
    alone = gate.reads_keys or (gate.keeps_moments and moments is None)
    return None if alone else (None, 0), moments


def _moments(state: LayerState, pages: LayerPages, sequence: Sequence) -> PromptMoments | None:
    """Return the moments of a sequence; None where they don't go up to its query."""
    policy, key = state.policy, pages.store.key
    grid = (policy.sink_size, policy.window_size)
    moments = load_moments(sequence.memory, state.cache_layer, key[:1].unsqueeze(0), grid)
    is_complete = moments is not None and moments.is_complete(sequence.regions(policy, key.device))
    return moments if is_complete else None


def _ask(
    state: LayerState,
    sequences: list[Sequence],
    inputs: AttentionInputs,
    rows: PagedRows,
    pages: LayerPages,
    known: Known,
) -> Tensor:
    """Attend sequences that go together through the gate, [sequences, heads, 1, value_dim]."""
    assert state.paged is not None
    gate = state.policy.gate
    mass, _ = gate.weigh(inputs, known)
    attended = state.paged.attend(inputs, rows, pages.store, mass, gate.margin)
    state.counters.add("gated_calls", "decode")
    state.record_call("decode", rows.regions, attended)
    if state.record is not None:
        asked = attended.open.shape[1]
        for sequence, opened in zip(sequences, attended.open.sum((1, 2)).tolist(), strict=True):
            sequence.memory.count("decode", asked, opened)
    return attended.output


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
