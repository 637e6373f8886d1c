"""Tests of where a part of a model computes, and in which dtype."""

import pytest
import torch
from torch import nn

from patchattn.hf.weights import compute_device, compute_dtype, input_device, input_dtype, kept_buffers
from patchattn.testing import tiny_model


class Packed(nn.Module):
    """A linear layer with quantised weights and a scale."""

    def __init__(self, dtype, *, scale=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(2, dtype=scale))


class Adapted(nn.Module):
    """A quantised layer with an adapter in float32 beside it."""

    def __init__(self, base):
        super().__init__()
        self.lora_A, self.base_layer = nn.Linear(2, 2), base


def replaced(model, make):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, make())
    return model, model.model.layers[1].self_attn


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32], ids=str)
def test_scales_do_not_tell_the_dtype(dtype):
    model, module = replaced(tiny_model("llama", dtype=torch.bfloat16), lambda: Packed(dtype))
    assert compute_dtype(module, model) == torch.bfloat16


def test_adapters_of_quantised_layers_do_not_tell_the_dtype():
    model, module = replaced(tiny_model("llama", dtype=torch.float16), lambda: Adapted(Packed(torch.uint8)))
    assert compute_dtype(module, model) == torch.float16


def test_norms_of_queries_tell_the_dtype():
    model, module = replaced(tiny_model("qwen3", dtype=torch.bfloat16), lambda: Packed(torch.int32))
    model.model.layers[1].input_layernorm.float()
    assert compute_dtype(module, model) == torch.bfloat16


def test_the_embedding_tells_the_dtype_where_all_layers_are_packed():
    model, module = replaced(tiny_model("llama", dtype=torch.bfloat16), nn.Identity)
    model.model.layers[1].input_layernorm = nn.Identity()
    model.model.layers[1].post_attention_layernorm = nn.Identity()
    model.model.layers[1].mlp = Packed(torch.uint8)
    assert compute_dtype(module, model) == torch.bfloat16


def test_the_configuration_tells_the_dtype_where_no_weights_do():
    model, module = replaced(tiny_model("llama", dtype=torch.bfloat16), nn.Identity)
    kept = ("layers", "model", "self_attn")
    for part in (*model.model.layers, model.model, model):
        for name, _ in [*part.named_children()]:
            if name not in kept:
                setattr(part, name, nn.Identity())
    assert not list(model.parameters())
    assert compute_dtype(module, model) == torch.bfloat16
    model.config.dtype = None
    assert compute_dtype(module, model) == torch.float32
    assert compute_device(module, model) == torch.device("cpu")


def test_buffers_that_are_computed_anew_are_not_weights():
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert [name for name, _ in model.named_buffers()]
    assert not kept_buffers(model)
    model.model.register_buffer("scales", torch.ones(2))
    assert len(kept_buffers(model)) == 1


def test_a_module_without_weights_computes_where_those_around_it_do():
    model, module = replaced(tiny_model("llama"), nn.Identity)
    model.model.layers[1].to("meta")
    # Nothing fetches them: what is around them tells.
    assert compute_device(module, model) == torch.device("cpu")
    assert input_device(model) == torch.device("cpu")
    assert input_dtype(model) == torch.float32
