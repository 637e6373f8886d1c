"""Backends: the same function as `patchattn.backends.reference.attend`, each fast somewhere.

- `flex`: FlexAttention under `torch.compile`; the default on CUDA.
- `blockwise`: plain PyTorch without a compiler; the default everywhere else.
- `reference`: the eager truth, for tests.

Each is a file or folder of that name with a `BACKEND`; this list is all that has to know of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

import torch

from patchattn.backends.backend import Backend
from patchattn.errors import BackendError

BackendName = Literal["flex", "blockwise", "reference"]


def resolve(name: str, device: torch.device) -> BackendName:
    """Return the backend that a choice means on a device.

    Args:
        name: `"auto"` or the name of a backend.
        device: Where the model runs.

    Raises:
        BackendError: Not the name of a backend.
    """
    if name == "auto":
        return "flex" if device.type == "cuda" else "blockwise"
    for known in get_args(BackendName):
        if name == known:
            return known
    raise BackendError(
        f"Unknown backend {name!r}.", fix=f'use "auto" or one of {", ".join(map(repr, get_args(BackendName)))}'
    )


def load(name: BackendName) -> Backend:
    """Import a backend."""
    return import_module(f"patchattn.backends.{name}").BACKEND
