"""What the flex backend compiles to for an H100, without one: `pytest -m cuda -n0 -s tests/cuda` prints it.

The numbers of launches are those of the versions in `tests/constraints.txt`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from faked import SHARED_MEMORY
from recorder import Compiled, compiling
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from patchattn.backends import flex
from patchattn.backends.flex.compiled import forget
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.errors import BackendError
from patchattn.gates.base import Known
from patchattn.gates.moment import MomentGate
from patchattn.moments.prompt import PromptMoments

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")]


@dataclass(frozen=True)
class Case:
    """A call of one layer, and what it costs: launches of kernels, and pins, for a decode step or a slab.

    A step is weighed by the moments of the prompt in the same graph, a prefill before its graph.
    """

    launches: int
    pins: int
    queries: int = 1
    keys: int = 8192
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    slot: int | None = None  # of the first query; None means that the queries are the last
    padded: bool = False
    softcap: float | None = None
    sinks: bool = False
    most_spilled: int = 64  # bytes, of each kernel

    def attend(self) -> None:
        """Attend on fake tensors."""

        def draw(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=self.dtype, device="cuda")

        valid = torch.ones(self.batch, self.keys, dtype=torch.bool, device="cuda")
        if self.padded:
            valid[0, :100] = False
        slot = torch.full((), self.keys - self.queries if self.slot is None else self.slot, device="cuda")
        regions = Regions.of(valid, query_length=self.queries, sink_size=4, window_size=1024, query_slot=slot)
        inputs = AttentionInputs(
            draw(self.batch, self.heads, self.queries, self.dim),
            draw(self.batch, self.kv_heads, self.keys, self.dim),
            draw(self.batch, self.kv_heads, self.keys, self.dim),
            regions,
            self.dim**-0.5,
            self.softcap,
            draw(self.heads) if self.sinks else None,
        )
        if self.queries == 1:
            known = Known(moments=PromptMoments.empty(inputs.key), max_chunks=1)
            assert flex.step(inputs, MomentGate(), known) is not None
        else:
            flex.attend(inputs, torch.empty(self.batch, self.heads, self.queries, device="cuda"), 0.5)


DECODE, PREFILL = (12, 0), (16, 1)
SHARED = (16, 8)  # at most, once for all layers
SLABS = {"queries": 9000, "keys": 32768}  # three slabs, the last one shorter, are one graph
CASES = {
    "decode": Case(*DECODE),
    "prefill": Case(*PREFILL, **SLABS),
    "decode, padding, softcap and sinks": Case(*DECODE, batch=2, padded=True, softcap=30.0, sinks=True),
}
MORE = {
    "decode, float16": Case(*DECODE, dtype=torch.float16),
    "decode, group of 3": Case(*DECODE, heads=9, kv_heads=3, dim=64),
    # Both passes keep more than the 255 registers that a thread has: what that costs must be measured on a card.
    "decode, dim 256": Case(*DECODE, keys=16384, heads=16, dim=256, most_spilled=188),
    "decode, batch 8 with padding": Case(*DECODE, batch=8, padded=True),
    "decode, softcap and sinks": Case(*DECODE, heads=64, dim=64, softcap=30.0, sinks=True),
    "decode, static cache": Case(*DECODE, slot=5000),
    "prefill, float16": Case(*PREFILL, **SLABS, dtype=torch.float16),
    "prefill, group of 3": Case(*PREFILL, **SLABS, heads=9, kv_heads=3, dim=64),
    "prefill, dim 256": Case(*PREFILL, **SLABS, heads=16, dim=256),
    "prefill, padding": Case(*PREFILL, **SLABS, batch=2, padded=True),
    "prefill, padding, softcap and sinks": Case(*PREFILL, **SLABS, batch=2, padded=True, softcap=30.0, sinks=True),
    "prefill, static cache": Case(*PREFILL, **SLABS, slot=0),
    # A softcap in the tiles that Inductor has for this head dimension, too.
    "prefill, softcap and sinks": Case(
        *PREFILL, **SLABS, heads=64, dim=64, softcap=30.0, sinks=True, most_spilled=2300
    ),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_compiles_for_an_h100(name: str):
    case = (CASES | MORE)[name]
    forget()
    with compiling() as found:
        case.attend()
    print(f"\n{name}: {found}")
    assert not wrong(case, found)


def wrong(case: Case, found: Compiled) -> list[str]:
    """Say what must not be."""
    queries = min(case.queries, flex.call.SLAB)
    scores = queries * case.keys if queries > 1 else case.batch * case.heads * case.keys
    problems = (
        [] if len(found.graphs) == 2 else [f"{len(found.graphs)} graphs, not one that layers share and one for each"]
    )
    for graph in found.graphs:
        problems += [f"waits for the device: {what}" for what in graph.waits]
        problems += [f"as large as queries x keys: {name}" for name, size in graph.buffers.items() if size >= scores]
        problems += [f"{name} was not compiled" for name in graph.kernels if name not in found.kernels]
    (*_, shared), layer = [(0, 0), *((graph.n_launches, graph.n_pins) for graph in found.graphs[:-1])], found.graphs[-1]
    if shared[0] > SHARED[0] or shared[1] > SHARED[1]:
        problems.append(
            f"{shared[0]} launches and {shared[1]} pins for all layers, not up to {SHARED[0]} and {SHARED[1]}"
        )
    if (layer.n_launches, layer.n_pins) != (case.launches, case.pins):
        problems.append(f"{layer.n_launches} launches and {layer.n_pins} pins, not {case.launches} and {case.pins}")
    for name, configurations in found.kernels.items():
        # Where there are several, autotuning takes one that fits.
        shared, spilled = (min(getattr(c, what) for c in configurations) for what in ("shared", "spilled"))
        if shared > SHARED_MEMORY:
            problems.append(f"{shared} bytes of shared memory in {name}")
        if spilled > case.most_spilled:
            problems.append(f"{spilled} bytes spilled in {name}")
    return problems


def test_the_check_can_fail():
    """A layer that makes all scores, asks the device for numbers, and has an operator of Inductor's own choice."""

    def attend(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = query @ key.T
        return scores.cumsum(1), (scores > 0).nonzero(), scores.sum(1).cpu()

    with compiling() as found, torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        query, key = (torch.empty(n, 64, dtype=torch.bfloat16, device="cuda") for n in (4096, 8192))
        with pytest.raises(DynamicOutputShapeException):  # the fake device answers no questions
            torch.compile(attend, fullgraph=True)(query, key)
    said = "\n".join(wrong(Case(1, 1, queries=4096), found))
    for problem in (
        "waits for the device: aten.nonzero",
        "waits for the device: u0",
        "waits for the device: prims.device_put.default",
        "as large as queries x keys",
        "launches and 0 pins, not 1 and 1",
    ):
        assert problem in said


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(source, *args, **kwargs):
        raise RuntimeError("too many registers")

    forget()
    with compiling():
        monkeypatch.setattr("triton.compile", refuse)
        with pytest.raises(BackendError) as error:
            CASES["decode"].attend()
    for part in ("key [1, 8, 8192, 128]", "bfloat16 on cuda", "triton_poi_fused", "too many registers"):
        assert part in str(error.value)
