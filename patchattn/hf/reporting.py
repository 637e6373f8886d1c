"""The report of a patched model, read from what its layers counted."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from patchattn.hf.architecture import group_size, head_sizes, underlying
from patchattn.hf.state import LayerState
from patchattn.hf.support import attention_modules
from patchattn.hf.weights import compute_dtype
from patchattn.policy import PHASES, Policy
from patchattn.report import GateReport, HeadShape


def report_of(
    model: Any, states: Mapping[int, LayerState], policy: Policy, backend: str, expected_kl: float | None = None
) -> GateReport:
    """Read the counters of a model's layers.

    Args:
        model: The model, patched or not any more.
        states: By layer index.
        policy: The policy in force.
        backend: The backend in use.
        expected_kl: See `GateReport`.
    """
    return GateReport(
        policy,
        backend,
        layers={
            index: {phase: state.counters.of_phase(phase) for phase in PHASES}
            for index, state in states.items()
            if state.gated
        },
        dense_calls={index: state.counters.by_reason("dense_calls") for index, state in states.items()},
        rebuilt={index: state.counters.by_reason("rebuilt") for index, state in states.items()},
        timeline={index: list(state.timeline) for index, state in states.items()},
        timeline_is_cut=any(state.timeline_room < 0 for state in states.values()),
        expected_kl=expected_kl,
        drafts=next((deepcopy(state.drafting.counts) for state in states.values() if state.drafting is not None), None),
        shapes={index: _head_shape(module, model) for index, module in attention_modules(model).items()},
    )


def _head_shape(module: Any, model: Any) -> HeadShape:
    """Return the sizes of a layer's heads, for estimates; the cache has the dtype of the keys."""
    dtype = compute_dtype(module, underlying(model))
    return HeadShape(*head_sizes(module), group_size(module), dtype.itemsize, str(dtype).removeprefix("torch."))
