"""The attention and mask functions that a patched model calls."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.errors import UnsupportedCallError
from patchattn.hf.architecture import ORIGINAL_OF, ORIGINALS, implementation_of, original_attention
from patchattn.hf.cache import prepare
from patchattn.hf.engine import ENGINE_ARGUMENTS
from patchattn.hf.gated import attend_call
from patchattn.hf.hooks import CACHE_ARGUMENT, HIDDEN_ARGUMENT, PAGES_ARGUMENT, STATE, no_attention_weights
from patchattn.hf.mask import CausalMask, mask
from patchattn.hf.paged_attention import attend_local_pages, attend_pages
from patchattn.policy import phase_of

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
    pages = kwargs.pop(PAGES_ARGUMENT, None)
    if state is not None and state._buffers["number"].device != query.device:
        state.to(query.device)
    if pages is not None:
        kwargs = {name: argument for name, argument in kwargs.items() if name not in ENGINE_ARGUMENTS}
    if state is None or state.is_local or (pages is None and not isinstance(attention_mask, CausalMask)):
        kwargs |= {"softcap": softcap, "s_aux": s_aux}
        kwargs = {name: argument for name, argument in kwargs.items() if argument is not None}
        kwargs |= {"scaling": scaling, "dropout": dropout}
        if state is None:
            # A model that is not patched, made from the configuration of one that is.
            forward = original_attention(module, ORIGINAL_OF[implementation_of(module.config)])
        else:
            state.counters.add("dense_calls", "local" if state.is_local else "mask")
            forward = state.attend_originally
            if pages is not None:
                return attend_local_pages(partial(forward, module, **kwargs), query, key, value, *pages), None
        given = attention_mask.own() if isinstance(attention_mask, CausalMask) else attention_mask
        return forward(module, query, key, value, given, **kwargs)
    if dropout or not kwargs.keys() <= _USUAL_ARGUMENTS:
        _refuse_unknown(kwargs, dropout, state.effects)
    if (softcap is not None and not state.has_softcap) or (s_aux is not None and not state.has_sinks):
        raise _unknown_arguments(["softcap"] if not state.has_softcap and softcap is not None else ["s_aux"])
    scale, positions = query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("position_ids")
    if pages is not None:
        rest = (scale, softcap, s_aux, state.policy.whole_groups)
        return attend_pages(state, query, key, value, pages, rest, positions, hidden), None
    assert isinstance(attention_mask, CausalMask)
    policy, break_even = state.policy, state.policy.break_even(phase_of(query.shape[2]))
    regions = attention_mask.regions(policy.sink_size, policy.window_size, query, key, break_even)
    inputs = AttentionInputs(query, key, value, regions, scale, softcap, s_aux, policy.whole_groups)
    output, _ = attend_call(state, inputs, cache, positions, hidden)
    return output.transpose(1, 2).contiguous(), None


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
