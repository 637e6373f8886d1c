"""The flex backend on a CUDA device, through Inductor.

Compiling is what takes the time, so cases that share a graph are one test, and `--part` shares the tests out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from flex_cases import CASES, Case, check

pytestmark = pytest.mark.gpu

GRAPHS: dict[tuple[object, ...], list[str]] = {}
for _name, _case in CASES.items():
    GRAPHS.setdefault(_case.graph, []).append(_name)


@pytest.mark.parametrize("names", GRAPHS.values(), ids=", ".join)
def test_cuda_equals_the_reference(names: list[str]):
    for name in names:
        check(CASES[name], "inductor", torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", ["gqa", "decode", "sinks and softcap"])
def test_single_precision(name: str):
    check(CASES[name], "inductor", torch.float32, "cuda")


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_head_dims(dim: int):
    check(Case(dim=dim, value_dim=dim), "inductor", torch.bfloat16, "cuda")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_growing_lengths_do_not_recompile(phase: str):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for keys in range(200, 1000, 97):
        check(Case(queries=keys // 2 if phase == "prefill" else 1, keys=keys), "inductor", torch.bfloat16, "cuda")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
