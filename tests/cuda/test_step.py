"""What a layer does in a step of continuous batching, in plain PyTorch: nothing of it waits for the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from faked import fake_mode
from llama import made_on_fake_device, move_to_fake_device, tiny_llama
from test_eager import CALL, Operators
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

import patchattn
from patchattn.backends.flex.compiled import forget
from patchattn.call.paged import PagedStore
from patchattn.hf.paged_attention import attend_pages
from patchattn.hf.pages import LayerPages, RequestMemory, Sequence, Step

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")]
PAGE, STRIDE = 256, 1024
LAYERS = 2


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


class Engine:
    """Steps of requests on the fake device, in the layers of a patched model; counts operators of the last layer."""

    def __init__(self, handle: Any, operators: Operators) -> None:
        self.states, self.operators = handle.states, operators
        self.memories: dict[str, RequestMemory] = {}
        length = 63 * STRIDE + PAGE
        self.store, self.stacked = PagedStore(draw(length, 2, 64), draw(length, 2, 64)), {}

    def step(self, **requests: tuple[int, int]) -> Step:
        """Attend to the keys of requests: of each how many queries it has, and how many keys."""
        sequences, begin, first = [], 0, 0
        for name, (queries, keys) in requests.items():
            memory = self.memories.setdefault(name, RequestMemory(LAYERS))
            sequences.append(Sequence(begin, queries, keys, first, memory))
            begin, first = begin + queries, first + keys
        step, (query, key) = Step(sequences), (draw(1, heads, begin, 64) for heads in (4, 2))
        places, write_to = draw(first, dtype=torch.long), draw(begin, dtype=torch.long)
        pages = LayerPages(step, self.store, places, write_to, self.stacked, PAGE, STRIDE)
        self.operators.kernels.clear()
        for layer, state in self.states.items():
            with self.operators.counting() if layer == LAYERS - 1 else nullcontext():
                keys = pages.update(key, key, layer)
                found = attend_pages(state, query, *keys, pages, (0.125, None, None), None, None)
            assert found.shape == (1, begin, 4, 64)
        return step


def test_a_step_waits_for_nothing():
    operators, compile_eagerly = Operators(), torch.compile

    def compile_one(function: Any, **options: Any) -> Any:
        return operators.as_one(CALL, compile_eagerly(function, **options | {"backend": "eager"}))

    model = tiny_llama(LAYERS, 8192)
    with fake_mode(), torch.no_grad(), made_on_fake_device(), mock.patch.object(torch, "compile", compile_one):
        move_to_fake_device(model)
        torch.compiler.reset()
        forget()
        with mock.patch("patchattn.hf.patching.self_check"):
            handle = patchattn.patch(model, patchattn.Policy(window_size=64, min_bulk=0), backend="flex")
        engine = Engine(handle, operators)
        # Prompts in two parts, one behind a beginning that others have read; then rows, one of them behind such.
        engine.step(a=(500, 500), b=(300, 812))
        step = engine.step(a=(200, 700), b=(1, 813), c=(1, 700), d=(1, 90), e=(1, 20))
        with pytest.raises(DataDependentOutputException):
            step.settle()
        # The moments of a and b go on between these.
        for grown in (1, 2, 130):
            engine.step(b=(1, 813 + grown), a=(1, 700 + grown), c=(1, 700 + grown))
        assert CALL in operators.kernels
        engine.step(b=(1, 945), a=(1, 832), c=(1, 832))
        forget()
    print(f"\na step of rows: {sum(operators.kernels.values())} operators: {operators.kernels}")
    # Keys and values are written to their pages, and the decisions of each row are added up for its request.
    assert operators.kernels == {CALL: 1, "aten.index_copy_": 2, "aten.sum.dim_IntList": 1}
