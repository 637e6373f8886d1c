"""The report of a patched model, read from what its layers counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchattn.hf.architecture import group_size, head_sizes, underlying
from patchattn.hf.support import attention_modules
from patchattn.hf.weights import compute_dtype
from patchattn.policy import PHASES, Policy
from patchattn.report import GateReport, HeadShape, LayerCounts


def report_of(model: Any, states: Mapping[int, Any], policy: Policy, backend: str) -> GateReport:
    """Read the counters of a model's layers.

    Args:
        model: The model, patched or not any more.
        states: `patchattn.hf.state.LayerState` by layer index.
        policy: The policy in force.
        backend: The backend in use.
    """
    counters = {index: state.counters for index, state in states.items()}
    return GateReport(
        policy,
        backend,
        layers={index: _counts(counters[index]) for index, state in states.items() if state.gated},
        dense_calls={index: _by_reason(c.dense_reasons, c.dense_calls) for index, c in counters.items()},
        rebuilt={index: _by_reason(c.rebuild_reasons, c.rebuilt) for index, c in counters.items()},
        timeline={index: list(state.timeline) for index, state in states.items()},
        timeline_is_cut=any(state.timeline_room < 0 for state in states.values()),
        shapes={index: _head_shape(module, model) for index, module in attention_modules(model).items()},
    )


def _counts(counters: Any) -> dict[Any, LayerCounts]:
    return {
        phase: LayerCounts(
            tuple(counters.open_pairs[row].tolist()),
            int(counters.asked[row]),
            int(counters.below[row]),
            int(counters.scored[row]),
            int(counters.causal[row]),
            int(counters.gated_calls[row]),
        )
        for row, phase in enumerate(PHASES)
    }


def _by_reason(reasons: tuple[str, ...], counts: list[int]) -> dict[str, int]:
    return {reason: int(count) for reason, count in zip(reasons, counts, strict=True) if count}


def _head_shape(module: Any, model: Any) -> HeadShape:
    """Return the sizes of a layer's heads, for estimates; the cache has the dtype of the keys."""
    dtype = compute_dtype(module, underlying(model))
    return HeadShape(*head_sizes(module), group_size(module), dtype.itemsize, str(dtype).removeprefix("torch."))
