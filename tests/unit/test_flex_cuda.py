"""The flex backend on a CUDA device, through Inductor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from flex_cases import CASES, Case, check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_the_reference(name: str, dtype: torch.dtype):
    check(CASES[name], "inductor", dtype, "cuda")


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_head_dims(dim: int):
    check(Case(dim=dim, value_dim=dim), "inductor", torch.bfloat16, "cuda")


def test_growing_lengths_do_not_recompile():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for keys in range(200, 1000, 97):
        check(Case(queries=1, keys=keys), "inductor", device="cuda")
        check(Case(queries=keys // 2, keys=keys), "inductor", device="cuda")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
