"""Attention of one step of continuous batching: many sequences in one row of tokens, their keys in pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchattn.backends.backend import AttendPaged
from patchattn.call.inputs import AttentionInputs
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
    rest: tuple[float, float | None, Tensor | None],
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """Attend as the layer's policy says, each sequence to its own keys.

    Sequences with one query, whose heads the gate is asked about, go together: of closed heads only sink and window are
    read. Each of the others has its keys gathered and is a call of its own.

    Args:
        state: The layer.
        query: [1, heads, rows, dim].
        key: [1, kv_heads, rows, dim]; already in the pages.
        value: [1, kv_heads, rows, value_dim].
        pages: The pages of the layer.
        rest: Scale, softcap and sink logits, see `AttentionInputs`.
        positions: [1, rows], or None.
        hidden: [1, rows, hidden], or None.

    Returns:
        [1, rows, heads, value_dim].
    """
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    together = _together(state, pages)
    if together and state.attend_paged is not None:
        _attend_together(state, state.attend_paged, together, query, pages, rest, positions, hidden, output)
    for at, sequence in enumerate(pages.step.sequences):
        if at in together:
            continue
        rows = sequence.rows
        regions = sequence.regions(state.policy, query.device)
        inputs = AttentionInputs(query[:, :, rows], *pages.read(sequence, key, value), regions, *rest)
        found, attended = attend_call(
            state,
            inputs,
            sequence.memory,
            None if positions is None else positions[:, rows],
            None if hidden is None else hidden[:, rows],
        )
        if attended is not None and state.record is not None:
            sequence.count(attended, regions)
        output[:, rows] = found.transpose(1, 2)
    return output


def _together(state: LayerState, pages: LayerPages) -> dict[int, PromptMoments | None]:
    """Return which sequences go together, each with the moments that it has."""
    policy = state.policy
    if state.attend_paged is None or not state.gated or "decode" not in policy.phases or policy.gate.reads_keys:
        return {}
    if state.replay is not None:
        return {}
    found: dict[int, PromptMoments | None] = {}
    for at, sequence in enumerate(pages.step.sequences):
        if sequence.queries != 1 or sequence.keys < state.least_keys["decode"]:
            continue
        if not policy.gate.keeps_moments:
            found[at] = None
            continue
        grid = (policy.sink_size, policy.window_size)
        moments = load_moments(sequence.memory, state.cache_layer, pages.store.key[:1].unsqueeze(0), grid)
        # Once in a chunk they have to go on, from keys that are gathered for it.
        if moments is not None and moments.is_complete(sequence.regions(policy, pages.store.key.device)):
            found[at] = moments
    return found


def _attend_together(
    state: LayerState,
    attend: AttendPaged,
    together: dict[int, PromptMoments | None],
    query: Tensor,
    pages: LayerPages,
    rest: tuple[float, float | None, Tensor | None],
    positions: Tensor | None,
    hidden: Tensor | None,
    output: Tensor,
) -> None:
    """Attend sequences with one query each, into `output`."""
    gate, chosen = state.policy.gate, tuple(together)
    sequences = [pages.step.sequences[at] for at in chosen]
    rows = pages.step.paged_rows(chosen, pages.places, pages.store.kv_heads, state.policy)
    begins = [sequence.begin for sequence in sequences]
    at = slice(begins[0], begins[-1] + 1)
    picked = at if len(begins) == at.stop - at.start else torch.tensor(begins, device=query.device)
    inputs = rows.without_keys(query[0, :, picked].transpose(0, 1).unsqueeze(2), pages.store, *rest)
    kept = [moments for moments in together.values() if moments is not None]
    known = Known(
        state.layer,
        pages.moments_of(state.layer, kept) if kept else None,
        None,
        state.measured,
        None if positions is None else positions[0, picked].unsqueeze(1),
        reach_query=False,
        hidden=None if hidden is None else hidden[0, picked].unsqueeze(1),
    )
    mass, _ = gate.weigh(inputs, known)
    attended = attend(inputs, rows, pages.store, mass, gate.margin)
    state.counters.add("gated_calls", "decode")
    state.record_call("decode", rows.regions, attended)
    if state.record is not None:
        heads = attended.open.shape[1]
        for sequence, opened in zip(sequences, attended.open.sum((1, 2)).tolist(), strict=True):
            sequence.memory.count("decode", heads, opened)
    output[0, picked] = attended.output[:, :, 0]


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
