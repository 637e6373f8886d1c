"""A small Llama on the faked device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(layers: int, length: int) -> LlamaForCausalLM:
    """Make a model of real tensors, for texts of up to `length` tokens."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def move_to_fake_device(model: nn.Module) -> None:
    """Do what `model.to("cuda")` does, which needs a device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cuda"), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cuda")


def through_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let `torch.tensor` make fake tensors: on a device it goes past the fake mode."""

    def run(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, **options)
        return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)

    return run


@contextlib.contextmanager
def made_on_fake_device() -> Iterator[None]:
    """Let all tensors that are made on the device be fake, under a fake mode."""
    with (
        mock.patch.object(torch, "tensor", through_the_host(torch.tensor)),
        mock.patch.object(torch, "as_tensor", through_the_host(torch.as_tensor)),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
    ):
        yield
