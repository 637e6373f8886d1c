"""The attention and mask functions that a patched model calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import host_may_read
from patchattn.errors import UnsupportedCallError
from patchattn.gates.base import Known
from patchattn.gates.decision import forced
from patchattn.hf.architecture import ORIGINAL_OF, ORIGINALS, implementation_of, original_attention
from patchattn.hf.cache import load_moments, make_places, prepare, reach_query, store_moments, why_rebuilt
from patchattn.hf.hooks import CACHE_ARGUMENT, HIDDEN_ARGUMENT, STATE, no_attention_weights
from patchattn.hf.mask import CausalMask, mask
from patchattn.hf.state import LayerState
from patchattn.moments.gaussian import CHUNK
from patchattn.policy import Phase, phase_of

# What every call brings; whoever brings more is looked at more closely.
_USUAL_ARGUMENTS = frozenset({CACHE_ARGUMENT, HIDDEN_ARGUMENT, "position_ids", "use_cache", "cache_position"})


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the layer's policy says; the function transformers calls in place of its own.

    Args:
        module: The attention module.
        query: [batch, heads, query, dim].
        key: [batch, kv_heads, keys, dim].
        value: [batch, kv_heads, keys, value_dim].
        attention_mask: What `mask` returned, or a mask of the caller's own.
        scaling: Factor on the dot products.
        dropout: Must be zero.
        softcap: Softcap of the scores.
        s_aux: [heads] learned sink logits.
        **kwargs: What the model passes on; anything unknown is refused.

    Returns:
        [batch, query, heads, value_dim], and None for the weights.
    """
    state = module._modules.get(STATE)
    cache, hidden = kwargs.pop(CACHE_ARGUMENT, None), kwargs.pop(HIDDEN_ARGUMENT, None)
    if state is not None and state._buffers["number"].device != query.device:
        state.to(query.device)
    if state is None or state.is_local or not isinstance(attention_mask, CausalMask):
        if state is None:
            # A model that is not patched, made from the configuration of one that is.
            forward = original_attention(module, ORIGINAL_OF[implementation_of(module.config)])
        else:
            state.counters.add("dense_calls", "local" if state.is_local else "mask")
            forward = state.attend_originally
        given = attention_mask.own() if isinstance(attention_mask, CausalMask) else attention_mask
        kwargs |= {"softcap": softcap, "s_aux": s_aux}
        kwargs = {name: argument for name, argument in kwargs.items() if argument is not None}
        return forward(module, query, key, value, given, scaling=scaling, dropout=dropout, **kwargs)
    if dropout or not kwargs.keys() <= _USUAL_ARGUMENTS:
        _refuse_unknown(kwargs, dropout, state.effects)
    if (softcap is not None and not state.has_softcap) or (s_aux is not None and not state.has_sinks):
        raise _unknown_arguments(["softcap"] if not state.has_softcap and softcap is not None else ["s_aux"])
    policy, phase = state.policy, phase_of(query.shape[2])
    regions = attention_mask.regions(policy.sink_size, policy.window_size, query, key, policy.break_even(phase))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = AttentionInputs(query, key, value, regions, scale, softcap, s_aux)
    reason = state.dense_reason(inputs, phase)
    if reason is None:
        output = _attend(state, inputs, phase, cache, kwargs.get("position_ids"), hidden)
    else:
        state.counters.add("dense_calls", reason)
        if reason != "layer" and policy.gate.keeps_moments:
            make_places(cache, state.cache_layer, key)
        output = state.dense(inputs)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    state: LayerState,
    inputs: AttentionInputs,
    phase: Phase,
    cache: Any,
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    counters = state.counters
    counters.add("gated_calls", phase)
    if state.replay is not None:
        attended = state.attend(inputs, forced(state.replay.pop(0), inputs), state.policy.gate.margin)
    else:
        attended = _weigh_and_attend(state, inputs, phase, cache, positions, hidden)
    if state.record is not None:
        counters.count(phase, inputs.regions, attended)
    if state.record == "timeline":
        state.keep(phase, attended.open | inputs.regions.below[:, None])
    return attended.output


def _weigh_and_attend(
    state: LayerState,
    inputs: AttentionInputs,
    phase: Phase,
    cache: Any,
    positions: Tensor | None,
    hidden: Tensor | None,
) -> Attended:
    gate = state.policy.gate
    grid = (inputs.regions.sink_size, inputs.regions.window_size)
    moments = load_moments(cache, state.cache_layer, inputs.key, grid) if gate.keeps_moments else None
    # Before the first chunk is full there is nothing to take moments from.
    is_late = phase == "decode" and inputs.key.shape[2] >= sum(grid) + CHUNK
    if gate.keeps_moments and moments is None and is_late:
        state.counters.add("rebuilt", why_rebuilt(cache, state.cache_layer))
    bound = _chunk_bound(inputs, has_state=moments is not None)
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    asks = state.weighed is not None and not torch.compiler.is_compiling()
    is_near = asks and reach_query(cache, state.cache_layer, queries, keys)
    known = Known(state.layer, moments, bound, state.measured, positions, is_near, hidden)
    found = None if state.weighed is None else state.weighed(inputs, gate, known)
    if found is None:
        mass, moments = gate.weigh(inputs, known)
        attended = state.attend(inputs, mass, gate.margin)
    else:
        attended, moments = found
    if moments is not None:
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


def _refuse_unknown(kwargs: dict[str, Any], dropout: float, effects: frozenset[str]) -> None:
    if kwargs.get("output_attentions"):
        raise no_attention_weights()
    if dropout:
        raise UnsupportedCallError(
            f"The model asks for attention dropout {dropout}, which the gated path does not have.",
            fix="call model.eval(), or unpatch the model to train it",
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedCallError(
            "The call asks for attention in both directions (is_causal=False), which has no sink and window.",
            fix="drop is_causal, or unpatch the model for this call",
        )
    known = {"is_causal", "output_attentions"}
    unknown = [
        name
        for name, given in kwargs.items()
        if name in effects and name not in known and given is not None and given is not False
    ]
    if unknown:
        raise _unknown_arguments(unknown)


def _unknown_arguments(names: list[str]) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"The call brings arguments to attention that the gated path does not know: {', '.join(sorted(names))}.",
        fix="drop the argument, or unpatch the model for this call; packed sequences are told by position_ids, "
        "continuous batching and sparse-index models are not supported",
    )


def register() -> None:
    """Register the attention and mask functions with transformers, once, at the first patch."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    prepare()
    for name in ORIGINALS.values():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
