"""What a patched attention module keeps: its policy and backend, what it counts, what it records."""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchattn.backends import BackendName, load
from patchattn.backends.backend import CallShape
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import Regions, host_may_read
from patchattn.gates.measured import MeasuredHeads
from patchattn.hf.counting import Counters
from patchattn.hf.engine import Batching
from patchattn.policy import PHASES, Phase, Policy

_TIMELINE_ROOM = 2**18
_LEAST_ROOM = 16


class LayerState(nn.Module):
    """What one attention module needs while it is patched, and what it has counted.

    Args:
        policy: The resolved policy.
        layer: Index of the layer.
        heads: Number of query heads on this device.
        backend: Name of the backend.
        original: The attention implementation to hand other work to.
        attend_originally: Its attention function.
        effects: Arguments of a call that some attention function of transformers reads and the gated path does not.
        has_softcap: Whether the module caps its scores.
        has_sinks: Whether the module has learned sink logits.
        is_local: Whether the layer is sliding or chunked, and so local already.
        cache_layer: Index of the layer's keys in the cache: some layers read those of another.
        register: Makes a process know the functions that a patched model calls.
        gated: Whether the policy names this layer; others attend densely.
        record: `None`, `"summary"` or `"timeline"`.
        judges_calls: Whether the backend says which prefills are long enough to be asked; else only `policy` does.
        measured: What a calibration says about the layer's heads on this device; None without one.
    """

    number: Tensor
    batching: Batching
    config: Any = None  # of the module; several models may share one
    drafting: Any = None  # the `Drafting` of a model that drafts; one for all its layers

    def __init__(
        self,
        policy: Policy,
        layer: int,
        heads: int,
        backend: BackendName,
        original: str,
        *,
        attend_originally: Callable[..., Any],
        effects: frozenset[str],
        has_softcap: bool,
        has_sinks: bool,
        is_local: bool,
        cache_layer: int,
        gated: bool,
        register: Callable[[], None],
        record: str | None,
        judges_calls: bool,
        measured: MeasuredHeads | None = None,
    ) -> None:
        super().__init__()
        self.counters = Counters(heads)
        self.policy, self.layer, self.original = policy, layer, original
        self.attend_originally, self.effects, self.is_local = attend_originally, effects, is_local
        self.has_softcap, self.has_sinks = has_softcap, has_sinks
        self.cache_layer, self.gated, self.record, self.register = cache_layer, gated, record, register
        self.attend, self.weighed, self.dense = load(backend).attend, load(backend).own_weighed, load(backend).dense
        self.backend, self.paged, self.by_table = backend, load(backend).paged, load(backend).by_table
        self.break_even = load(backend).break_even if judges_calls else None
        local = policy.sink_size + policy.window_size
        self.least_keys = {phase: local + max(1, policy.break_even(phase)) for phase in PHASES}
        self.timeline: list[tuple[str, Tensor]] = []
        self.timeline_room = _TIMELINE_ROOM
        self.replay: list[Tensor] | None = None
        # A buffer: a number would be a part of the graph, which would be compiled anew for each patch.
        self.register_buffer("number", torch.zeros((), dtype=torch.long), persistent=False)
        self._take_number()
        self.has_measured = measured is not None
        self.reads_hidden = measured is not None and measured.probe is not None
        for name, bits in (measured or MeasuredHeads()).bits().items():
            self.register_buffer(name, bits, persistent=False)

    @property
    def measured(self) -> MeasuredHeads | None:
        """What a calibration says about the layer's heads, on the layer's device."""
        return MeasuredHeads.of_bits(self._buffers) if self.has_measured else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a model that was patched in another process find its functions."""
        super().__setstate__(state)
        self._take_number()
        self.register()

    def _take_number(self) -> None:
        """Take a number by which an operator in a graph finds this state; a copy takes one of its own."""
        number = next(_NUMBERS)
        self.number = torch.full_like(self.number, number)
        _STATES[number] = self

    def dense_reason(self, inputs: AttentionInputs, phase: Phase) -> str | None:
        """Say why a call does not go through the gate; None if it does."""
        reason = self.why_dense(inputs.key.shape[2], phase)
        if reason is not None or self.break_even is None or phase == "decode":
            return reason
        # What a static cache has room for says nothing; only the host knows more.
        keys = inputs.regions.host.filled if host_may_read(inputs.query) else inputs.key.shape[2]
        batch, heads, queries, dim = inputs.query.shape
        local = (self.policy.sink_size, self.policy.window_size)
        shape = CallShape(batch, queries, keys, heads, dim, *local)
        return "short" if keys - sum(local) < self.break_even(shape, phase) else None

    def why_dense(self, keys: int, phase: Phase) -> str | None:
        """Say why no call of a phase over so many keys goes through the gate; None if some do, in decode all."""
        if not self.gated:
            return "layer"
        if self.drafting is not None and not self.drafting.is_on:
            return "not drafting"
        if phase not in self.policy.phases:
            return "phase"
        return "short" if keys < self.least_keys[phase] else None

    def record_call(self, phase: Phase, regions: Regions, attended: Attended) -> None:
        """Count a call that went through the gate, and keep its decisions, as far as `record` asks for it."""
        if self.record is not None:
            self.counters.count(phase, regions.counts, attended)
        if self.record == "timeline":
            self.keep(phase, attended.open | regions.below[:, None])

    def keep(self, phase: str, opened: Tensor) -> None:
        """Keep the decisions of one gated call on its device until a report asks; nothing once there is no room.

        Room is counted in tokens: in these all layers of a model agree, so that all of them stop at the same call. A
        step of decode takes the room of 16, for no device gives out less than 512 bytes.
        """
        if torch.compiler.is_compiling():
            _keep(self.counters.counts, opened.detach(), self.number, phase)
            return
        self.timeline_room -= max(opened.shape[0] * opened.shape[2], _LEAST_ROOM)
        if self.timeline_room >= 0:
            self.timeline.append((phase, opened.detach()))

    def reset_report(self) -> None:
        """Forget what was counted and kept."""
        self.timeline.clear()
        self.timeline_room = _TIMELINE_ROOM
        self.counters.reset()


_STATES: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
# Begins anywhere: a graph that was saved must not find the state of another process under its number.
_NUMBERS = itertools.count(secrets.randbits(62))


# It reads on the host, which no CUDA graph can: it runs between two of them.
@torch.library.custom_op("patchattn::keep", mutates_args=("witness",), tags=(torch.Tag.cudagraph_unsafe,))
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
    return any(state.config is config and not state.batching.is_undone for state in _STATES.values())
