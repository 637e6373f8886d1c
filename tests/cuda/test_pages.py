"""What rows of many requests over pages compile to for an H100, without one; see `test_compile.py`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llama import made_on_fake_device
from recorder import compiling, problems

from patchattn import ClosedGate, MomentGate, StaticGate
from patchattn.backends.flex.compiled import forget
from patchattn.backends.flex.table import attend_table
from patchattn.call.page_table import PageTable, TableInputs, TableRow
from patchattn.call.paged import PagedStore
from patchattn.gates.base import HeadGate, Known
from patchattn.moments.prompt import PromptMoments

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
LENGTHS = [9000, 20_000, 300, 4000, 33_000]
LAYERS = 32


@dataclass(frozen=True)
class Case:
    """Steps of an engine, and what each layer launches: kernels, and pins.

    Of the rows one is not asked. `gate=None` is the gate that is weighed by the moments of the prompts.
    """

    launches: int
    pins: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 256
    pages: int = 512
    softcap: float | None = None
    sinks: bool = False
    gate: HeadGate | None = None
    most_spilled: int = 64  # bytes, of each kernel

    def attend(self) -> None:
        """Attend on fake tensors: two steps of two layers, the second with other rows and longer requests."""

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        stride = 2 * LAYERS * self.page_size
        length = (self.pages - 1) * stride + self.page_size
        memory = draw(self.pages * stride, self.kv_heads, self.dim)
        for grown in (0, 1000):
            rows, first = [], 0
            for number, keys in enumerate(LENGTHS):
                rows.append(TableRow(number, first, keys + grown, keys > 1000))
                first += keys + grown
            table = PageTable.of(rows, draw(first, dtype=torch.long), self.page_size, stride, 4, 1024)
            for layer in range(2):
                begins = (self.page_size * (2 * layer + number) for number in range(2))
                store = PagedStore(*(memory[begin : begin + length] for begin in begins))
                query = draw(1, self.heads, len(LENGTHS) + grown, self.dim)
                logits = draw(self.heads) if self.sinks else None
                moments = PromptMoments.empty(draw(table.numbers.shape[1], self.kv_heads, 1, self.dim))
                inputs = TableInputs(query, store, table, self.dim**-0.5, self.softcap, logits)
                attended = attend_table(inputs, self.gate or MomentGate(), Known(moments=moments))
                assert attended.output.shape == (len(LENGTHS), self.heads, 1, self.dim)


ROWS = (8, 0)
SHARED = 12  # launches and pins for all layers together, at most
CASES = {"rows": Case(*ROWS)}
MORE = {
    "gates that are given": Case(7, 0, gate=ClosedGate()),
    "listed heads": Case(7, 0, gate=StaticGate(open_heads=((0, 3), (7, 31)))),
    "float16": Case(*ROWS, dtype=torch.float16),
    # With a head dimension of 64 the sums of the estimate are two launches.
    "group of 3": Case(9, 0, heads=9, kv_heads=3, dim=64),
    "dim 256": Case(*ROWS, heads=16, dim=256, most_spilled=120),  # as in `test_compile.py`
    "softcap and sinks": Case(9, 0, heads=64, dim=64, softcap=30.0, sinks=True),
    "small pages": Case(*ROWS, page_size=32, pages=4096),
    "pages that are no power of two": Case(*ROWS, page_size=48, pages=4096),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_compiles_for_an_h100(name: str):
    case = (CASES | MORE)[name]
    forget()
    with compiling() as found, made_on_fake_device():
        case.attend()
    print(f"\n{name}: {found}")
    # No tensor of rows by all keys that they have, which are fewer than the store has places for.
    assert not problems(found, case, largest=len(LENGTHS) * sum(LENGTHS), once=SHARED)
