"""Weights that accelerate keeps elsewhere: such a module's tensors sit on the meta device between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device to which hooks fetch the weights of a module or of its parts; None if there are no hooks."""
    hooks = [hook for part in module.modules() for hook in _offloading_hooks(part)]
    return torch.device(hooks[0].execution_device) if hooks else None


def lacks_weights(module: nn.Module, *, covered: bool = False) -> bool:
    """Say whether a model has parameters or buffers on the meta device that no hook fetches before they are needed.

    Args:
        module: The model.
        covered: Whether a hook of a parent fetches the weights of its children too.
    """
    hooks = _offloading_hooks(module)
    own = (*module._parameters.values(), *module._buffers.values())
    if not covered and not hooks and any(tensor is not None and tensor.is_meta for tensor in own):
        return True
    covered = covered or any(getattr(hook, "place_submodules", False) for hook in hooks)
    return any(lacks_weights(child, covered=covered) for child in module.children())


def _offloading_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # accelerate chains several into one
    return [hook for hook in hooks if getattr(hook, "offload", False)]
