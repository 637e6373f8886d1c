"""Weights that accelerate keeps elsewhere: such a module's parameters sit on the meta device between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compute_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes, which is not where its weights are when those are offloaded."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = [hook for part in module.modules() for hook in _offloading_hooks(part)]
    return torch.device(hooks[0].execution_device) if hooks else device


def lacks_weights(module: nn.Module, *, covered: bool = False) -> bool:
    """Say whether a model has parameters on the meta device that no hook fetches before they are needed.

    Args:
        module: The model.
        covered: Whether a hook of a parent fetches the parameters of its children too.
    """
    hooks = _offloading_hooks(module)
    if not covered and not hooks and any(own is not None and own.is_meta for own in module._parameters.values()):
        return True
    covered = covered or any(getattr(hook, "place_submodules", False) for hook in hooks)
    return any(lacks_weights(child, covered=covered) for child in module.children())


def _offloading_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # accelerate chains several into one
    return [hook for hook in hooks if getattr(hook, "offload", False)]
