"""What a patched layer runs around its compiled call, in plain PyTorch: `pytest -m cuda -n0 -s tests/cuda` prints it.

Each operator costs the host some microseconds, whatever its size, so that decoding waits for them.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from faked import fake_mode
from llama import made_on_fake_device, move_to_fake_device, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import patchattn
from patchattn.backends.flex.compiled import forget
from patchattn.hf.architecture import with_cache

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")]
LENGTH = 8192
CALL, ATTENTION = "compiled call", "scaled_dot_product_attention"
# What the patch adds to each layer: operators that launch a kernel or take memory, and those that only give a view.
ADDED = {"prefill": {"kernels": 13, "views": 14}, "decode": {"kernels": 0, "views": 4}}


class Operators(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches; a function that is replaced by `as_one` counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.is_counting = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.prim.device.default:  # a question of the fake mode
            return operator(*args)
        is_view = operator.is_view or operator is torch.ops.aten._unsafe_view.default
        (self.views if is_view else self.kernels)[str(operator).removesuffix(".default")] += 1
        result = operator(*args, **(kwargs or {}))
        if "_to_copy" in str(operator):
            assert result.device.type == "cuda", "a copy that waits for the device"
        return result

    def as_one(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that it is counted as one operator, and nothing within it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.is_counting:
                return function(*args, **kwargs)
            self.kernels[name] += 1
            self.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                self.__enter__()

        return run

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        with self:
            self.is_counting = True
            try:
                yield
            finally:
                self.is_counting = False


@functools.cache
def operators_of(layers: int, *, patched: bool) -> dict[str, Operators]:
    """Count the operators of a prefill and of the decode step after it, with all layers."""
    counts = {"prefill": Operators(), "decode": Operators()}
    compile_eagerly = torch.compile
    model = tiny_llama(layers, 2 * LENGTH)
    with fake_mode(), torch.no_grad():
        move_to_fake_device(model)
        cache = DynamicCache(config=model.config)
        torch.compiler.reset()
        forget()
        if patched:
            with mock.patch("patchattn.hf.patching.self_check"):
                patchattn.patch(model, patchattn.Policy(window_size=1024), backend="flex")
        for (phase, operators), queries in zip(counts.items(), (LENGTH, 1), strict=True):

            def compile_one(function: Any, operators: Operators = operators, **options: Any) -> Any:
                return operators.as_one(CALL, compile_eagerly(function, **options | {"backend": "eager"}))

            attention = operators.as_one(ATTENTION, F.scaled_dot_product_attention)
            tokens = torch.zeros(1, queries, dtype=torch.long, device="cuda")
            with (
                mock.patch.object(torch, "compile", compile_one),
                made_on_fake_device(),
                mock.patch.object(F, "scaled_dot_product_attention", attention),
                operators.counting(),
            ):
                model(tokens, logits_to_keep=1, **with_cache(model, cache))
            forget()
            assert (CALL in operators.kernels) == patched, phase
    return counts


@pytest.mark.parametrize("phase", ADDED)
def test_operators_per_layer(phase: str):
    patched, stock = (per_layer(phase, patched=patched) for patched in (True, False))
    added = {name: found - stock[name] for name, found in patched.items()}
    for name in added:
        print(f"\n{phase}: {added[name].total():.0f} {name} more in a layer than {stock[name].total():.0f}")
        print("\n".join(f"  {count:3.0f} x {operator}" for operator, count in added[name].most_common()))
    assert {name: patched[name].total() - stock[name].total() for name in patched} == ADDED[phase]


def per_layer(phase: str, *, patched: bool) -> dict[str, Counter[str]]:
    """Count the operators of one layer, by what they do."""
    few, many = (operators_of(layers, patched=patched)[phase] for layers in (2, 4))
    found = {"kernels": many.kernels - few.kernels, "views": many.views - few.views}
    return {name: Counter({op: count / 2 for op, count in counts.items()}) for name, counts in found.items()}
