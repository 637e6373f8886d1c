"""Looking at the attention calls of a patched model, or answering them in place of its backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.hf.patching import PatchHandle

Observer = Callable[[int, AttentionInputs, Callable[[], Attended]], Attended]


@contextmanager
def observing(handle: PatchHandle, observer: Observer) -> Iterator[PatchHandle]:
    """Show every gated attention call of a patched model to an observer, which returns what the call gives.

    Args:
        handle: The handle of the patched model. Observers may be stacked; the newest is asked first.
        observer: Called as `observer(layer, inputs, attend)`; `attend()` computes what the layer would give.

    Yields:
        The handle; the observer is gone on exit, also where the model was unpatched meanwhile.
    """
    states = handle.states
    before = {layer: (state.attend, state.weighed, state.paged, state.by_table) for layer, state in states.items()}
    for layer, state in handle.states.items():
        state.attend = partial(_shown, observer, layer, state.attend)
        state.weighed = state.paged = state.by_table = None
    try:
        yield handle
    finally:
        for layer, state in handle.states.items():
            state.attend, state.weighed, state.paged, state.by_table = before[layer]


def _shown(
    observer: Observer,
    layer: int,
    attend: Callable[[AttentionInputs, Tensor, float], Attended],
    inputs: AttentionInputs,
    bulk_log_mass: Tensor,
    margin: float,
) -> Attended:
    return observer(layer, inputs, partial(attend, inputs, bulk_log_mass, margin))
