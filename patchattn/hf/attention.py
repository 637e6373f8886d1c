"""The attention and mask functions that a patched model calls, and the state each of its layers keeps."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from patchattn.backends import Backend, load, load_dense, load_plain
from patchattn.errors import PatchStateError, UnsupportedCallError
from patchattn.gate import Measured, bulk_log_mass, forced, margin_threshold
from patchattn.hf.cache import load_moments, prepare, store_moments
from patchattn.hf.counters import Counters
from patchattn.hf.hooks import CACHE_ARGUMENT, STATE, BatchingRefusal, no_attention_weights
from patchattn.hf.support import ORIGINALS, eager_attention, is_local
from patchattn.inputs import Attended, AttentionInputs
from patchattn.moments import CHUNK
from patchattn.policy import PHASES, MomentGate, Phase, Policy, phase_of
from patchattn.regions import Regions, first_real_slot

_LAYOUT_ROWS = 3
_TIMELINE_ROOM = 2**18
_LEAST_ROOM = 16
_REGIONS = "_patchattn_regions"
_PLAIN = "_patchattn_plain"
# Arguments that are refused for some values by name, and those that change nothing here, whatever they say.
_CHECKED_ARGUMENTS = frozenset({"is_causal", "output_attentions", "sliding_window"})
_HARMLESS_ARGUMENTS = frozenset(
    {CACHE_ARGUMENT, "position_ids", "use_cache", "output_hidden_states", "return_dict", "cache_position"}
    | {"num_items_in_batch", "logits_to_keep", "output_router_logits", "labels"}
)


class LayerState(Counters):
    """What one attention module needs while it is patched, and what it has counted.

    Args:
        policy: The resolved policy.
        layer: Index of the layer.
        heads: Number of query heads on this device.
        backend: The backend.
        original: The attention implementation to hand other work to.
        gated: Whether the policy names this layer; others attend densely.
        record: `None`, `"summary"` or `"timeline"`.
        measured: What a calibration says about the layer's heads on this device; None without one.
    """

    refusal: BatchingRefusal

    def __init__(
        self,
        policy: Policy,
        layer: int,
        heads: int,
        backend: Backend,
        original: str,
        *,
        gated: bool,
        record: str | None,
        measured: Measured | None = None,
    ) -> None:
        super().__init__(heads)
        self.policy, self.layer, self.backend, self.original = policy, layer, backend, original
        self.gated, self.record = gated, record
        self.attend, self.attend_densely = load(backend), load_dense(backend)
        self.attend_plainly = load_plain(backend)
        self.threshold = margin_threshold(policy.gate)
        local = policy.sink_size + policy.window_size
        self.least_keys = {phase: local + max(1, policy.break_even(phase)) for phase in PHASES}
        self.timeline: list[tuple[str, Tensor]] = []
        self.timeline_room = _TIMELINE_ROOM
        self.replay: list[Tensor] | None = None
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
        register()

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
            # What a graph gives back may be overwritten by its next run.
            self.timeline.append((phase, opened.detach().cpu()))
            return
        self.timeline_room -= max(opened.shape[0] * opened.shape[2], _LEAST_ROOM)
        if self.timeline_room >= 0:
            self.timeline.append((phase, opened.detach()))

    def reset_report(self) -> None:
        """Forget what was counted and kept."""
        self.timeline.clear()
        self.timeline_room = _TIMELINE_ROOM
        self.reset_counters()


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    *,
    config: Any,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """Describe a plain causal call as a small layout; let the original implementation make any other mask.

    Returns:
        [batch, 1, rows, keys] int32: whether each key is real, the slot of the first query, and the slot of each
        sequence's first real token, the last two repeated along the keys; see `_layout_rows`. For masks that are not
        plainly causal (sliding, packed, custom), what the original implementation's mask function returns.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, prepare_padding_mask

    if mask_function is not causal_mask_function or not isinstance(kv_offset, int) or kv_offset != 0:
        original = {name: key for key, name in ORIGINALS.items()}[config._attn_implementation]
        return ALL_MASK_ATTENTION_FUNCTIONS[original](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            device=device,
            **kwargs,
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    n_rows = _layout_rows(q_length)
    if _is_plain(padding, q_length, kv_length, q_offset, device):
        rows = torch.tensor((1, q_offset, *[0] * (n_rows - 2)), dtype=torch.int32, device=device)
        layout = rows.view(1, 1, n_rows, 1).expand(batch_size, 1, n_rows, kv_length)
        # For the layers, which would have to look at the device to know.
        setattr(layout, _PLAIN, True)
        return layout
    if padding is None:
        layout = torch.zeros(batch_size, 1, n_rows, kv_length, dtype=torch.int32, device=device)
        layout[:, :, 0] = 1
        layout[:, :, 1] = q_offset
        return layout
    valid = padding[:, :kv_length].to(device=device, dtype=torch.bool)
    first = first_real_slot(valid)[:, None].expand(-1, kv_length)
    if isinstance(q_offset, Tensor):
        query_slot = q_offset.to(device)
    else:
        # Not as_tensor, which compiles the number in: one graph for each length of a dynamic cache.
        query_slot = torch.full((), q_offset, device=device)
    slot = query_slot.expand(batch_size, kv_length)
    rows = [valid, slot, *[first] * (n_rows - 2)]
    return torch.stack([row.int() for row in rows], dim=1)[:, None]


def _is_plain(padding: Tensor | None, q_length: int, kv_length: int, q_offset: int | Tensor, device: Any) -> bool:
    """Say whether the host knows that nothing is padding and that the queries are the last slots."""
    if torch.compiler.is_compiling() or torch.device(device).type != "cpu":
        return False
    if not isinstance(q_offset, int) or q_offset + q_length != kv_length:
        return False
    return padding is None or bool(padding.all())


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
    if state is None:
        raise PatchStateError(
            f"{type(module).__name__} runs through patchattn but was never patched.",
            fix="patch the whole model with patchattn.patch(model)",
        )
    if state._buffers["counts"].device != query.device:
        state.to(query.device)
    cache = kwargs.get(CACHE_ARGUMENT)
    is_known_plain = _is_known_plain(attention_mask)
    if not is_known_plain and not _is_layout(attention_mask, query.shape[2]):
        state.add("dense_calls", "local" if is_local(module) else "mask")
        kwargs.pop(CACHE_ARGUMENT, None)
        kwargs |= {"softcap": softcap, "s_aux": s_aux}
        kwargs = {name: given for name, given in kwargs.items() if given is not None}
        forward = original_attention(module, state.original)
        return forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout or not kwargs.keys() <= _HARMLESS_ARGUMENTS:
        _refuse_unknown(kwargs, dropout)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    phase = phase_of(query.shape[2])
    reason = state.dense_reason(key.shape[2], phase)
    if reason is not None:
        state.add("dense_calls", reason)
        if is_known_plain and softcap is None and s_aux is None:
            output = state.attend_plainly(query, key, value, scale)
            if output is not None:
                return output.transpose(1, 2).contiguous(), None
    regions = _regions(attention_mask, state.policy, query.shape[2])
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
        moments = load_moments(cache, state.layer, inputs.key, grid) if uses_moments else None
        bound = _chunk_bound(inputs, has_state=moments is not None)
        known = {"max_chunks": bound, "measured": state.measured, "positions": positions}
        mass, moments = bulk_log_mass(policy, state.layer, inputs, moments, **known)
        if moments is not None:
            store_moments(cache, state.layer, moments, grid)
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


def _regions(layout: Tensor, policy: Policy, query_length: int) -> Regions:
    """Read the layout; all layers of a forward pass share it, and outside of a graph they share what is read too."""
    if torch.compiler.is_compiling():
        return _read_layout(layout, policy, query_length)
    known: Regions | None = getattr(layout, _REGIONS, None)
    sizes = (policy.sink_size, policy.window_size, query_length)
    if known is None or (known.sink_size, known.window_size, known.query_length) != sizes:
        if _is_known_plain(layout):
            batch, keys = layout.shape[0], layout.shape[3]
            known = Regions.plain(policy.sink_size, policy.window_size, query_length, batch, keys, layout.device)
        else:
            known = _read_layout(layout, policy, query_length)
        setattr(layout, _REGIONS, known)
    return known


def _read_layout(layout: Tensor, policy: Policy, query_length: int) -> Regions:
    return Regions(
        policy.sink_size,
        policy.window_size,
        query_length,
        # Clones in plain strides: those of a view depend on the length and would recompile a kernel for each.
        layout[:, 0, 0].bool().clone(memory_format=torch.contiguous_format),
        layout[:, 0, 2, 0].long().clone(memory_format=torch.contiguous_format),
        layout[0, 0, 1, 0].long(),
    )


def _is_known_plain(attention_mask: Tensor | None) -> TypeGuard[Tensor]:
    """Say whether `mask` made this and knew that nothing is padding and that the queries are the last slots."""
    return not torch.compiler.is_compiling() and getattr(attention_mask, _PLAIN, False)


def _layout_rows(query_length: int) -> int:
    """Return the rows of a layout: never as many as there are queries, which a mask of the caller's own has."""
    return _LAYOUT_ROWS + 1 if query_length == _LAYOUT_ROWS else _LAYOUT_ROWS


def _is_layout(attention_mask: Any, query_length: int) -> TypeGuard[Tensor]:
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.dtype == torch.int32
        and attention_mask.dim() == 4
        and attention_mask.shape[2] == _layout_rows(query_length)
    )


def _refuse_unknown(kwargs: dict[str, Any], dropout: float) -> None:
    if kwargs.get("output_attentions"):
        raise no_attention_weights()
    if dropout:
        raise UnsupportedCallError(
            f"The model asks for attention dropout {dropout}, which the gated path does not have.",
            fix="call model.eval(), or unpatch the model to train it",
        )
    if kwargs.get("sliding_window") is not None:
        raise UnsupportedCallError(
            "A layer asks for a sliding window but was given a plain causal mask.", fix="report the model's class"
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedCallError(
            "The call asks for attention in both directions (is_causal=False), which has no sink and window.",
            fix="drop is_causal, or unpatch the model for this call",
        )
    known = _HARMLESS_ARGUMENTS | _CHECKED_ARGUMENTS
    unknown = [name for name, given in kwargs.items() if name not in known and given is not None and given is not False]
    if unknown:
        raise UnsupportedCallError(
            f"The model passes arguments to attention that the gated path does not know: {', '.join(sorted(unknown))}.",
            fix="unpatch the model for this call; packed sequences are told by position_ids, continuous batching and "
            "sparse-index models are not supported",
        )


def original_attention(module: Any, original: str) -> Any:
    """Return the attention function that the module called before it was patched."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original == "eager":
        return eager_attention(module)
    return ALL_ATTENTION_FUNCTIONS[original]


def register() -> None:
    """Register the attention and mask functions with transformers, once, at the first patch."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    prepare()
    for name in ORIGINALS.values():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
