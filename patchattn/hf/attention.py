"""The attention and mask functions that a patched model calls, and the state each of its layers keeps."""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchattn.backends import Backend, load, load_dense, load_plain
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.errors import UnsupportedCallError
from patchattn.gates.gate import Measured, bulk_log_mass, forced, margin_threshold
from patchattn.hf.architecture import ORIGINAL_OF, ORIGINALS, implementation_of, original_attention
from patchattn.hf.cache import load_moments, prepare, store_moments, why_rebuilt
from patchattn.hf.counters import Counters
from patchattn.hf.hooks import CACHE_ARGUMENT, STATE, BatchingRefusal, no_attention_weights
from patchattn.hf.mask import CausalMask, mask
from patchattn.moments.gaussian import CHUNK
from patchattn.policy import PHASES, MomentGate, Phase, Policy, phase_of

_TIMELINE_ROOM = 2**18
_LEAST_ROOM = 16
# What every call brings; whoever brings more is looked at more closely.
_USUAL_ARGUMENTS = frozenset({CACHE_ARGUMENT, "position_ids", "use_cache", "cache_position"})


class LayerState(Counters):
    """What one attention module needs while it is patched, and what it has counted.

    Args:
        policy: The resolved policy.
        layer: Index of the layer.
        heads: Number of query heads on this device.
        backend: The backend.
        original: The attention implementation to hand other work to.
        attend_originally: Its attention function.
        effects: Arguments of a call that some attention function of transformers reads and the gated path does not.
        has_softcap: Whether the module caps its scores.
        has_sinks: Whether the module has learned sink logits.
        is_local: Whether the layer is sliding or chunked, and so local already.
        cache_layer: Index of the layer's keys in the cache: some layers read those of another.
        gated: Whether the policy names this layer; others attend densely.
        record: `None`, `"summary"` or `"timeline"`.
        measured: What a calibration says about the layer's heads on this device; None without one.
    """

    number: Tensor
    refusal: BatchingRefusal
    config: Any = None  # of the module; several models may share one

    def __init__(
        self,
        policy: Policy,
        layer: int,
        heads: int,
        backend: Backend,
        original: str,
        *,
        attend_originally: Callable[..., Any],
        effects: frozenset[str],
        has_softcap: bool,
        has_sinks: bool,
        is_local: bool,
        cache_layer: int,
        gated: bool,
        record: str | None,
        measured: Measured | None = None,
    ) -> None:
        super().__init__(heads)
        self.policy, self.layer, self.backend, self.original = policy, layer, backend, original
        self.attend_originally, self.effects, self.is_local = attend_originally, effects, is_local
        self.has_softcap, self.has_sinks = has_softcap, has_sinks
        self.cache_layer, self.gated, self.record = cache_layer, gated, record
        self.attend, self.attend_densely = load(backend), load_dense(backend)
        self.attend_plainly = load_plain(backend)
        self.threshold = margin_threshold(policy.gate)
        local = policy.sink_size + policy.window_size
        self.least_keys = {phase: local + max(1, policy.break_even(phase)) for phase in PHASES}
        self.timeline: list[tuple[str, Tensor]] = []
        self.timeline_room = _TIMELINE_ROOM
        self.replay: list[Tensor] | None = None
        # A buffer: a number would be a part of the graph, which would be compiled anew for each patch.
        self.register_buffer("number", torch.zeros((), dtype=torch.long), persistent=False)
        self._take_number()
        self.has_measured = measured is not None
        for name, bits in (measured or Measured()).bits().items():
            self.register_buffer(name, bits, persistent=False)

    @property
    def measured(self) -> Measured | None:
        """What a calibration says about the layer's heads, on the layer's device."""
        return Measured.of_bits(self._buffers) if self.has_measured else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a model that was patched in another process find its functions."""
        super().__setstate__(state)
        self._take_number()
        register()

    def _take_number(self) -> None:
        """Take a number by which an operator in a graph finds this state; a copy takes one of its own."""
        number = next(_NUMBERS)
        self.number = torch.full_like(self.number, number)
        _STATES[number] = self

    def dense_reason(self, keys: int, phase: str) -> str | None:
        """Say why a call over so many keys does not go through the gate; None if it does."""
        if not self.gated:
            return "layer"
        if phase not in self.policy.phases:
            return "phase"
        return "short" if keys < self.least_keys[phase] else None

    def count(self, phase: Phase, inputs: AttentionInputs, attended: Attended) -> None:
        """Add one gated call to the counters."""
        regions, heads = inputs.regions, inputs.query.shape[1]
        eager = not torch.compiler.is_compiling()
        break_even = self.policy.break_even(phase)
        facts = regions.counted(break_even) if eager else regions.count(break_even)
        above = attended.open if facts.above is None else attended.open & facts.above[:, None]
        self.add_open(phase, above)
        self.add("asked", phase, facts.n_above)
        self.add("below", phase, facts.n_below)
        self.add("scored", phase, attended.scored_keys)
        self.add("causal", phase, facts.n_causal * heads)

    def keep(self, phase: str, opened: Tensor) -> None:
        """Keep the decisions of one gated call on its device until a report asks; nothing once there is no room.

        Room is counted in tokens: in these all layers of a model agree, so that all of them stop at the same call. A
        step of decode takes the room of 16, for no device gives out less than 512 bytes.
        """
        if torch.compiler.is_compiling():
            _keep(self.counts, opened.detach(), self.number, phase)
            return
        self.timeline_room -= max(opened.shape[0] * opened.shape[2], _LEAST_ROOM)
        if self.timeline_room >= 0:
            self.timeline.append((phase, opened.detach()))

    def reset_report(self) -> None:
        """Forget what was counted and kept."""
        self.timeline.clear()
        self.timeline_room = _TIMELINE_ROOM
        self.reset_counters()


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
    cache = kwargs.pop(CACHE_ARGUMENT, None)
    if state is not None and state._buffers["counts"].device != query.device:
        state.to(query.device)
    if state is None or state.is_local or not isinstance(attention_mask, CausalMask):
        if state is None:
            # A model that is not patched, made from the configuration of one that is.
            forward = original_attention(module, ORIGINAL_OF[implementation_of(module.config)])
        else:
            state.add("dense_calls", "local" if state.is_local else "mask")
            forward = state.attend_originally
        given = attention_mask.own() if isinstance(attention_mask, CausalMask) else attention_mask
        kwargs |= {"softcap": softcap, "s_aux": s_aux}
        kwargs = {name: argument for name, argument in kwargs.items() if argument is not None}
        return forward(module, query, key, value, given, scaling=scaling, dropout=dropout, **kwargs)
    if dropout or not kwargs.keys() <= _USUAL_ARGUMENTS:
        _refuse_unknown(kwargs, dropout, state.effects)
    if (softcap is not None and not state.has_softcap) or (s_aux is not None and not state.has_sinks):
        raise _unknown_arguments(["softcap"] if not state.has_softcap and softcap is not None else ["s_aux"])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    phase = phase_of(query.shape[2])
    reason = state.dense_reason(key.shape[2], phase)
    if reason is not None:
        state.add("dense_calls", reason)
        if softcap is None and s_aux is None and attention_mask.is_last(key.shape[2]):
            output = state.attend_plainly(query, key, value, scale)
            if output is not None:
                return output.transpose(1, 2).contiguous(), None
    regions = attention_mask.regions(state.policy.sink_size, state.policy.window_size, query, key)
    inputs = AttentionInputs(query, key, value, regions, scale, softcap, s_aux)
    output = (
        _attend(state, inputs, phase, cache, kwargs.get("position_ids"))
        if reason is None
        else state.attend_densely(inputs)
    )
    return output.transpose(1, 2).contiguous(), None


def _attend(state: LayerState, inputs: AttentionInputs, phase: Phase, cache: Any, positions: Tensor | None) -> Tensor:
    policy, attend = state.policy, state.attend
    state.add("gated_calls", phase)
    if state.replay is not None:
        mass = forced(state.replay.pop(0), inputs)
    else:
        grid = (policy.sink_size, policy.window_size)
        uses_moments = isinstance(policy.gate, MomentGate) and policy.gate.moments == "prompt"
        moments = load_moments(cache, state.cache_layer, inputs.key, grid) if uses_moments else None
        # Before the first chunk is full there is nothing to take moments from.
        if uses_moments and moments is None and phase == "decode" and inputs.key.shape[2] >= sum(grid) + CHUNK:
            state.add("rebuilt", why_rebuilt(cache, state.cache_layer))
        bound = _chunk_bound(inputs, has_state=moments is not None)
        known = {"max_chunks": bound, "measured": state.measured, "positions": positions}
        mass, moments = bulk_log_mass(policy, state.layer, inputs, moments, **known)
        if moments is not None:
            store_moments(cache, state.cache_layer, moments, grid)
    attended = attend(inputs, mass, state.threshold)
    if state.record is not None:
        state.count(phase, inputs, attended)
    if state.record == "timeline":
        state.keep(phase, attended.open)
    return attended.output


def _chunk_bound(inputs: AttentionInputs, *, has_state: bool) -> int | None:
    """Bound the chunks that prompt moments go on by without looking at the tensors; None means that looking is free."""
    if inputs.query.device.type == "cpu" and not torch.compiler.is_compiling():
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


_STATES: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
# Begins anywhere: a graph that was saved must not find the state of another process under its number.
_NUMBERS = itertools.count(secrets.randbits(62))


@torch.library.custom_op("patchattn::keep", mutates_args=("witness",))
def _keep(witness: Tensor, opened: Tensor, number: Tensor, phase: str) -> None:
    """Keep the decisions of a call inside a graph, which may not change a list: each change would compile it anew.

    Args:
        witness: A tensor of the layer that is said to change, else a compiler would take the call for superfluous.
        opened: [batch, heads, query] bool.
        number: [] int64; the number of the layer's state.
        phase: The phase of the call.
    """
    if (state := _STATES.get(int(number))) is not None:
        # A copy: what is in a graph's memory may be overwritten by its next layer.
        state.keep(phase, opened.to("cpu", copy=True))


@_keep.register_fake
def _(witness: Tensor, opened: Tensor, number: Tensor, phase: str) -> None:
    pass


def is_in_use(config: Any) -> bool:
    """Say whether some model that is patched has this configuration."""
    return any(state.config is config and not state.refusal.is_undone for state in _STATES.values())


def register() -> None:
    """Register the attention and mask functions with transformers, once, at the first patch."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    prepare()
    for name in ORIGINALS.values():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
