"""The flex backend on a CUDA device, through Inductor.

Compiling is what takes the time, so cases that share a graph are one test, and `--part` shares the tests out.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from flex_cases import CASES, Case, check
from test_page_table import Call, decided

from patchattn.backends.flex.table import attend_table
from patchattn.call.paged import PagedStore
from patchattn.gates.base import Known
from patchattn.testing import assert_within_budget

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


@pytest.mark.parametrize(
    "options", [{}, {"page_size": 256, "dim": 64}, {"kv_heads": 3, "softcap": 3.0, "sink_logits": True, "dim": 128}]
)
def test_rows_over_pages(options: dict[str, object]):
    for seed, lengths in enumerate(([900, 37, 90], [164, 20, 2000, 64])):
        call = Call.drawn(lengths, shared=2, dtype=torch.bfloat16, elsewhere=9.0, seed=seed, **options)
        opened = torch.rand(len(lengths), call.query.shape[1], 1, generator=torch.Generator().manual_seed(seed)) > 0.5
        logits = call.options["sink_logits"]
        there = replace(
            call,
            query=call.query.cuda(),
            store=PagedStore(call.store.key.cuda(), call.store.value.cuda()),
            places=[places.cuda() for places in call.places],
            options=call.options | {"sink_logits": None if logits is None else logits.cuda()},
        )
        inputs, gate = there.inputs(), decided(opened.cuda())
        attend_table(inputs, gate, Known())
        torch.cuda.set_sync_debug_mode("error")
        try:
            attended = attend_table(inputs, gate, Known())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(attended.open.cpu(), opened & torch.tensor(call.asked)[:, None, None])
        assert_within_budget(attended.output.cpu(), call.expected(opened), call.expected(opened, torch.float64))
