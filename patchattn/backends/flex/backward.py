"""The backward of the flex backend: a clear error, in compiled graphs too."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.errors import UnsupportedCallError


@torch.library.custom_op("patchattn::flex_forward_only", mutates_args=())
def forward_only(output: Tensor, query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Copy an output so that its backward, towards what it was computed from, raises."""
    return output.clone(memory_format=torch.contiguous_format)


@forward_only.register_fake
def _(output, query, key, value, sink_logits):
    return torch.empty_like(output, memory_format=torch.contiguous_format)


@torch.library.custom_op("patchattn::flex_refuse_backward", mutates_args=())
def refuse_backward(gradient: Tensor) -> Tensor:
    """Raise; an operator of its own, so that compiled graphs may contain it."""
    raise UnsupportedCallError(
        "The flex backend has no backward.",
        fix="Run under torch.no_grad(), or call patchattn.unpatch(model) before training.",
    )


@refuse_backward.register_fake
def _(gradient):
    return torch.empty_like(gradient)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    refused = refuse_backward(gradient)
    return None, *(None if shape is None else refused.new_zeros(shape) for shape in ctx.shapes)


def _setup(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.shapes = [None if x is None else x.shape for x in inputs[1:]]


forward_only.register_autograd(_backward, setup_context=_setup)
