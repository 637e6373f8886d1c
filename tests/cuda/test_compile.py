"""What the flex backend compiles to for an H100, without one: `pytest -m cuda -n0 -s tests/cuda` prints it.

The numbers of launches are those of the versions in `tests/constraints.txt`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from recorder import Compiled, compiling, problems
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from patchattn.backends import flex
from patchattn.backends.flex.compiled import forget
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.errors import BackendError
from patchattn.gates.base import Known
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.moment import MomentGate
from patchattn.moments.prompt import PromptMoments

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # sums of products of keys stay in float32
]


@dataclass(frozen=True)
class Case:
    """A call of one layer, and what it costs: launches of kernels, and pins, for a decode step or a slab.

    Its queries are weighed by the moments of the prompt in the same graph.
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
    whole_groups: bool = False
    hidden: int = 0  # size of the hidden state that a probe reads; 0 for no probe
    most_spilled: int = 64  # bytes, of each kernel
    gathered: bool = False  # keys lie as those do that are gathered from pages

    def attend(self) -> None:
        """Attend on fake tensors."""

        def draw(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=self.dtype, device="cuda")

        valid = torch.ones(self.batch, self.keys, dtype=torch.bool, device="cuda")
        if self.padded:
            valid[0, :100] = False
        slot = torch.full((), self.keys - self.queries if self.slot is None else self.slot, device="cuda")
        regions = Regions.of(valid, query_length=self.queries, sink_size=4, window_size=1024, query_slot=slot)
        sizes = (self.keys, self.kv_heads) if self.gathered else (self.kv_heads, self.keys)
        key, value = (draw(self.batch, *sizes, self.dim) for _ in range(2))
        inputs = AttentionInputs(
            draw(self.batch, self.heads, self.queries, self.dim),
            key.transpose(1, 2) if self.gathered else key,
            value.transpose(1, 2) if self.gathered else value,
            regions,
            self.dim**-0.5,
            self.softcap,
            draw(self.heads) if self.sinks else None,
            self.whole_groups,
        )
        measured = hidden = None
        if self.hidden:
            margins, probe = (torch.empty(self.heads, *more, device="cuda") for more in ((), (self.hidden,)))
            measured = MeasuredHeads(margins, probe=probe)
            hidden = draw(self.batch, self.queries, self.hidden)
        known = Known(moments=PromptMoments.empty(inputs.key), measured=measured, hidden=hidden)
        assert flex.weigh_and_attend(inputs, MomentGate(), known) is not None


DECODE, PREFILL = (12, 0), (33, 1)
SHARED = 24  # launches and pins for all layers together, at most
SLABS = {"queries": 9000, "keys": 32768}  # three slabs, the last one shorter, are one graph
CASES = {
    "decode": Case(*DECODE),
    "prefill": Case(*PREFILL, **SLABS),
    # The product with the hidden state is a launch, and in a prefill the hidden state in float32 another.
    "decode, probe": Case(13, 0, hidden=4096),
    "prefill, probe": Case(35, 1, **SLABS, hidden=4096),
    "decode, padding, softcap and sinks": Case(13, 0, batch=2, padded=True, softcap=30.0, sinks=True),
}
MORE = {
    "decode, whole groups": Case(13, 0, whole_groups=True),
    "decode, float16": Case(*DECODE, dtype=torch.float16),
    # Keys of the next chunk are a launch of their own where Inductor does not put them behind the kernel of local keys,
    # and with a head dimension of 64 so is the count of scored keys.
    "decode, group of 3": Case(14, 0, heads=9, kv_heads=3, dim=64),
    # Both passes keep more than the 255 registers that a thread has: what that costs must be measured on a card.
    # So many keys, because moments of 8 KV heads are as large as the scores of 32,768.
    "decode, dim 256": Case(13, 0, keys=65536, heads=16, dim=256, most_spilled=188),
    "decode, batch 8 with padding": Case(*DECODE, batch=8, padded=True),
    "decode, softcap and sinks": Case(14, 0, heads=64, dim=64, softcap=30.0, sinks=True),
    "decode, static cache": Case(*DECODE, slot=5000),
    "prefill, float16": Case(*PREFILL, **SLABS, dtype=torch.float16),
    # The tiles that Inductor has for this head dimension, with softcap and without.
    "prefill, group of 3": Case(*PREFILL, **SLABS, heads=9, kv_heads=3, dim=64, most_spilled=1808),
    "prefill, dim 256": Case(*PREFILL, **SLABS, heads=16, dim=256),
    "prefill, padding": Case(*PREFILL, **SLABS, batch=2, padded=True),
    "prefill, padding, softcap and sinks": Case(*PREFILL, **SLABS, batch=2, padded=True, softcap=30.0, sinks=True),
    "prefill, from pages": Case(*PREFILL, **SLABS, gathered=True),
    "prefill, static cache": Case(*PREFILL, **SLABS, slot=0),
    "prefill, softcap and sinks": Case(
        *PREFILL, **SLABS, heads=64, dim=64, softcap=30.0, sinks=True, most_spilled=2308
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
    return problems(found, case, largest=scores, once=SHARED)


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
    with compiling(), monkeypatch.context() as patched:  # undone before the recorder undoes its own
        patched.setattr("triton.compile", refuse)
        with pytest.raises(BackendError) as error:
            CASES["decode"].attend()
    for part in ("key [1, 8, 8192, 128]", "bfloat16 on cuda", "triton_poi_fused", "too many registers"):
        assert part in str(error.value)
