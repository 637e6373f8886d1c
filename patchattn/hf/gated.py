"""One attention call of a patched layer whose keys are at hand: through the gate, or densely and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import host_may_read
from patchattn.gates.base import Known
from patchattn.gates.decision import forced
from patchattn.hf.cache import load_moments, make_places, reach_query, store_moments, why_rebuilt
from patchattn.hf.state import LayerState
from patchattn.moments.gaussian import CHUNK
from patchattn.policy import phase_of


def attend_call(
    state: LayerState, inputs: AttentionInputs, cache: Any, positions: Tensor | None, hidden: Tensor | None
) -> tuple[Tensor, Attended | None]:
    """Attend as the layer's policy says, and count it.

    Args:
        state: The layer.
        inputs: The attention call.
        cache: Where prompt moments are kept; None keeps none.
        positions: See `Known`.
        hidden: See `Known`.

    Returns:
        [batch, heads, query, value_dim]; and what the gate did, None where the call did not go through it.
    """
    phase = phase_of(inputs.query.shape[2])
    reason = state.dense_reason(inputs, phase)
    if reason is None:
        state.counters.add("gated_calls", phase)
        if state.replay is not None:
            attended = state.attend(inputs, forced(state.replay.pop(0), inputs), state.policy.gate.margin)
        else:
            attended = _weigh_and_attend(state, inputs, cache, positions, hidden)
        state.record_call(phase, inputs.regions, attended)
        return attended.output, attended
    state.counters.add("dense_calls", reason)
    if reason != "layer" and state.policy.gate.keeps_moments:
        make_places(cache, state.cache_layer, inputs.key)
    return state.dense(inputs), None


def _weigh_and_attend(
    state: LayerState, inputs: AttentionInputs, cache: Any, positions: Tensor | None, hidden: Tensor | None
) -> Attended:
    gate = state.policy.gate
    grid = (inputs.regions.sink_size, inputs.regions.window_size)
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    moments = load_moments(cache, state.cache_layer, inputs.key, grid) if gate.keeps_moments else None
    # Before the first chunk is full there is nothing to take moments from.
    is_late = queries == 1 and keys >= sum(grid) + CHUNK
    if gate.keeps_moments and moments is None and is_late:
        state.counters.add("rebuilt", why_rebuilt(cache, state.cache_layer))
    bound = _chunk_bound(inputs, has_state=moments is not None)
    asks = state.weighed is not None and not torch.compiler.is_compiling()
    is_near = asks and reach_query(cache, state.cache_layer, queries, keys)
    known = Known(state.layer, moments, bound, state.measured, positions, is_near, hidden)
    found = None if state.weighed is None else state.weighed(inputs, gate, known)
    if found is None:
        mass, moments = gate.weigh(inputs, known)
        attended = state.attend(inputs, mass, gate.margin)
    else:
        attended, moments = found
    # Later steps of a draft go back to the moments of its first one, whose token stays in the text.
    if moments is not None and (state.drafting is None or state.drafting.keeps_moments):
        store_moments(cache, state.cache_layer, moments, grid, keys)
    return attended


def _chunk_bound(inputs: AttentionInputs, *, has_state: bool) -> int | None:
    """Bound the chunks that prompt moments go on by without looking at the tensors; None means that looking is free."""
    if host_may_read(inputs.query):
        return None
    if has_state and inputs.query.shape[2] == 1:
        return 1
    chunks = inputs.key.shape[2] // CHUNK + 1
    if not torch.compiler.is_compiling():
        return chunks
    # A graph holds for a number of chunks: powers of two keep the graphs few when lengths vary.
    bound = 1
    while bound < chunks:
        bound *= 2
    return bound
