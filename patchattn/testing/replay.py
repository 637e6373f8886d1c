"""Recording the gates of one run and replaying them in another, so that rounding can't flip a decision between them."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.hf.patching import PatchHandle


def recorded_gates(handle: PatchHandle) -> dict[int, list[Tensor]]:
    """Return the decisions of a model patched with `record="timeline"`: by layer, [batch, heads, query] per call."""
    return {layer: [opened for _, opened in calls] for layer, calls in handle.report().timeline.items()}


def replay_gates(handle: PatchHandle, gates: dict[int, list[Tensor]]) -> None:
    """Make a patched model repeat recorded decisions, call by call, instead of deciding.

    Args:
        handle: The handle of the patched model; its next gated calls must match the recorded ones.
        gates: As `recorded_gates` returns them.
    """
    for layer, state in handle.states.items():
        state.replay = list(gates[layer])


def gates_of_chunks(gates: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Cut the decisions of one long call into those of consecutive calls of the given lengths."""
    return list(torch.cat(gates, dim=2).split(lengths, dim=2))
