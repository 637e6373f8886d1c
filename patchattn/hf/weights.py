"""Where a part of a model computes and in which dtype, which its weights may not tell: quantised, packed, offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from patchattn.hf.offload import execution_device

_COMPUTE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# Positions, counters and switches: neither weights nor packed ones.
_NO_WEIGHTS = frozenset({torch.int64, torch.bool})


def compute_device(module: nn.Module, model: nn.Module) -> torch.device:
    """Return the device on which a module computes, which is not where its weights are when those are offloaded.

    Args:
        module: The module; one without parameters and buffers computes where the modules around it do.
        model: The model that holds it.
    """
    for part in _outwards(module, model):
        tensor = next(chain(part.parameters(), part.buffers()), None)
        if tensor is not None and not tensor.is_meta:
            return tensor.device
        device = execution_device(part)
        if device is not None:
            return device
    # No weights anywhere, or none that anything fetches.
    return torch.get_default_device()


def input_device(model: Any) -> torch.device:
    """Return the device on which a model takes its token ids; one that is not of transformers says so itself."""
    if not hasattr(model, "get_input_embeddings"):
        return model.device
    return compute_device(model.get_input_embeddings(), model)


def compute_dtype(module: nn.Module, model: Any) -> torch.dtype:
    """Return the dtype of a module's queries, keys and values.

    It is the dtype of the module's weights, or of the nearest ones around it that are not quantised: norms, embeddings.
    Of a part with quantised weights nothing counts: scales and adapters may have a dtype that is not its output's.

    Args:
        module: The attention module.
        model: The Hugging Face model that holds it; its configuration is asked last.
    """
    for part in _outwards(module, model):
        dtype = _plain_dtype(part)
        if dtype is not None:
            return dtype
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return dtype if dtype in _COMPUTE_DTYPES else torch.get_default_dtype()


def input_dtype(model: Any) -> torch.dtype:
    """Return the dtype of what a Hugging Face model's layers are given."""
    return compute_dtype(model.get_input_embeddings(), model)


def kept_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers of a module and its parts that are saved with it: not those computed anew, as frequencies."""
    return [buffer for part in module.modules() for buffer in _own_kept_buffers(part)]


def _outwards(module: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    """Go from a module through those that hold it to the model."""
    yield module
    name = next((name for name, part in model.named_modules() if part is module), "")
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _plain_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the weights of a module or of its parts, without parts that hold quantised ones."""
    own = [*module.parameters(recurse=False), *_own_kept_buffers(module)]
    for weights in (own, *([*part.parameters(), *kept_buffers(part)] for part in module.children())):
        if not any(map(_is_quantised, weights)):
            dtype = next((tensor.dtype for tensor in weights if tensor.dtype in _COMPUTE_DTYPES), None)
            if dtype is not None:
                return dtype
    return None


def _own_kept_buffers(module: nn.Module) -> list[Tensor]:
    left_out = module._non_persistent_buffers_set
    return [buffer for name, buffer in module._buffers.items() if buffer is not None and name not in left_out]


def _is_quantised(tensor: Tensor) -> bool:
    # bitsandbytes can keep packed numbers in a tensor that says it is of a floating point dtype.
    return tensor.dtype not in _COMPUTE_DTYPES | _NO_WEIGHTS or hasattr(tensor, "quant_state")
