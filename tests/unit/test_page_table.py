"""Rows over pages by their tables: the reference on each alone; nothing of others is read, and of closed heads less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchattn import ClosedGate, MomentGate, StaticGate
from patchattn.backends import reference
from patchattn.backends.flex import passes, table
from patchattn.backends.flex.compiled import forget
from patchattn.backends.flex.owned import Layout
from patchattn.backends.flex.table import attend_table_with, why_not
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.page_table import PageTable, TableInputs, TableRow
from patchattn.call.paged import PagedStore
from patchattn.call.regions import Regions
from patchattn.gates.base import Known
from patchattn.gates.decision import forced
from patchattn.gates.measured import MeasuredHeads
from patchattn.moments.prompt import PromptMoments
from patchattn.testing import assert_within_budget


@dataclass
class Call:
    """Requests in pages of a store whose other places hold NaN; the rows are not in the order of the step."""

    query: Tensor
    store: PagedStore
    places: list[Tensor]
    asked: list[bool]
    page_size: int
    stride: int
    sink: int
    window: int
    options: dict[str, Any]

    @classmethod
    def drawn(
        cls,
        lengths: list[int],
        *,
        asked: list[bool] | None = None,
        shared: int = 0,
        kv_heads: int = 2,
        group: int = 2,
        dim: int = 16,
        page_size: int = 16,
        layers: int = 3,
        sink: int = 4,
        window: int = 32,
        softcap: float | None = None,
        sink_logits: bool = False,
        whole_groups: bool = False,
        dtype: torch.dtype = torch.float64,
        elsewhere: float = torch.nan,
        seed: int = 0,
    ) -> Call:
        """`shared` pages at the begin of all requests that are long enough are the same."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        stride = 2 * layers * page_size
        counts = [-(-length // page_size) for length in lengths]
        ids = torch.randperm(sum(counts) + 3, generator=draw)
        store = [torch.full(((len(ids) - 1) * stride + page_size, kv_heads, dim), elsewhere, dtype=dtype) for _ in "kv"]
        places, first = [], ids[: counts[0]]
        for length, own in zip(lengths, ids.split([*counts, 3]), strict=False):
            whole = min(shared, length // page_size, lengths[0] // page_size)
            own = torch.cat([first[:whole], own[whole:]])
            places.append((own[:, None] * stride + torch.arange(page_size)).flatten()[:length])
        for x in store:
            x[torch.cat(places).unique()] = normal(len(torch.cat(places).unique()), kv_heads, dim)
        heads = kv_heads * group
        logits = normal(heads) if sink_logits else None
        options = {"scale": 1.5 / math.sqrt(dim), "softcap": softcap, "sink_logits": logits}
        options |= {"whole_groups": whole_groups}
        asked = [length > sink + window for length in lengths] if asked is None else asked
        query = normal(1, heads, len(lengths) + 2, dim)
        return cls(query, PagedStore(*store), places, asked, page_size, stride, sink, window, options)

    @property
    def order(self) -> list[int]:
        """Which row of the step each request is."""
        return [len(self.places) - number for number in range(len(self.places))]

    def inputs(self) -> TableInputs:
        rows, first = [], 0
        for row, places, is_asked in zip(self.order, self.places, self.asked, strict=True):
            rows.append(TableRow(row, first, len(places), is_asked))
            first += len(places)
        sizes = self.page_size, self.stride, self.sink, self.window
        return TableInputs(
            self.query, self.store, PageTable.of(rows, torch.cat(self.places), *sizes), *self.options.values()
        )

    def alone(self, number: int, dtype: torch.dtype | None = None) -> AttentionInputs:
        """One of the requests as a call of its own."""
        dtype = dtype or self.query.dtype
        key, value = (
            x[self.places[number]].transpose(0, 1)[None].to(dtype) for x in (self.store.key, self.store.value)
        )
        ones, row = torch.ones(1, len(self.places[number])), self.order[number]
        regions = Regions.of(ones, query_length=1, sink_size=self.sink, window_size=self.window)
        logits = self.options["sink_logits"]
        options = self.options | {"sink_logits": None if logits is None else logits.to(dtype)}
        return AttentionInputs(self.query[:, :, row : row + 1].to(dtype), key, value, regions, **options)

    def expected(self, opened: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What the reference says of each request alone, with all gates open where it is not asked."""
        outputs = []
        for number, is_asked in enumerate(self.asked):
            inputs = self.alone(number, dtype)
            of_row = opened[number : number + 1] if is_asked else torch.ones(1, 1, 1, dtype=torch.bool)
            outputs.append(reference.attend(inputs, forced(of_row, inputs), 0.0).output)
        return torch.cat(outputs)


def decided(opened: Tensor) -> Any:
    """A gate that decides like this."""
    return SimpleNamespace(margin=0.0, weigh=lambda inputs, known: (torch.where(opened, torch.inf, -torch.inf), None))


@dataclass
class Kernel:
    """Does what the kernel of flex decoding does: of the keys it reads those of the listed blocks, and no others."""

    reads: list[list[list[Tensor]]]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float, **_: Any
    ) -> tuple[Tensor, Any]:
        assert block_mask.full_kv_num_blocks is None
        block, (batch, heads, rows, _) = block_mask.BLOCK_SIZE[1], query.shape
        output, log_mass = torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf)
        self.reads.append([[torch.tensor([])] * heads for _ in range(batch)])
        for b in range(batch):
            for h in range(heads):
                of_head = h if block_mask.kv_num_blocks.shape[1] > 1 else 0
                listed = block_mask.kv_indices[b, of_head, 0, : block_mask.kv_num_blocks[b, of_head, 0]]
                places = (listed[:, None] * block + torch.arange(block)).flatten()
                self.reads[-1][b][h] = places
                if not len(places):
                    continue
                at = torch.tensor(b), torch.tensor(h), torch.arange(rows)[:, None], places
                seen = block_mask.mask_mod(*at)
                scores = query[b, h] @ key[0, h, places].nan_to_num().T * scale
                scores = scores if score_mod is None else score_mod(scores, *at)
                scores = scores.masked_fill(~seen, -torch.inf)
                log_mass[b, h] = scores.logsumexp(-1)
                # As the kernel leaves rows that see nothing: whatever.
                output[b, h] = scores.softmax(-1).nan_to_num() @ value[0, h, places].nan_to_num()
        return output, SimpleNamespace(lse=log_mass)


@contextmanager
def by_hand() -> Iterator[Kernel]:
    """Run what is compiled as it is written, with a kernel that reads what is listed."""
    kernel = Kernel([])
    forget()
    with (
        mock.patch.object(passes, "flex_attention", kernel),
        mock.patch.object(table, "refuse_uncompiled"),
        mock.patch.object(table, "compile_alone", lambda run, compiler, dynamic: run),
    ):
        yield kernel
    forget()


def attend(call: Call, gate: Any, known: Known | None = None) -> tuple[Attended, Kernel]:
    with by_hand() as kernel:
        return attend_table_with(call.inputs(), gate, known or Known(), compiler="eager"), kernel


def check_reads(call: Call, opened: Tensor, attended: Attended, kernel: Kernel) -> None:
    """Only blocks with own keys were read: local ones, and of KV heads with an open head those of the bulk."""
    local, bulk = kernel.reads
    block, kv_heads = Layout(call.page_size, call.stride, 0).block, call.store.key.shape[1]
    scored, group = 0, call.query.shape[1] // kv_heads
    for number, places in enumerate(call.places):
        of_heads = opened[number].view(kv_heads, -1).any(-1).tolist()
        near = torch.cat([places[: call.sink], places[-call.window :]])
        far = places[call.sink : max(call.sink, len(places) - call.window)]
        for head, is_open in enumerate(of_heads):
            reads_bulk = (is_open or not call.asked[number]) and len(far) > 0
            for found, wanted in ((local, near), (bulk, far if reads_bulk else far[:0])):
                read = found[number][head]
                assert (read // block).unique().tolist() == (wanted // block).unique().tolist()
                assert len(read) == len(read.unique())
                scored += len(read) * group * call.asked[number]
    assert not any(len(read) for found in kernel.reads for row in found[len(call.places) :] for read in row)
    assert attended.scored_keys == scored


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    # What the kernel returns is merged in float32.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Call, Tensor]:
    """A call, and decisions for it."""
    sink, window = draw(st.integers(0, 40)), draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=5))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    call = Call.drawn(
        lengths,
        asked=[length > sink + window and draw(st.booleans()) for length in lengths],
        shared=draw(st.integers(0, 4)),
        kv_heads=kv_heads,
        group=group,
        page_size=draw(st.sampled_from([16, 32, 48, 128, 256])),
        layers=draw(st.integers(1, 3)),
        sink=sink,
        window=window,
        softcap=draw(st.sampled_from([None, 3.0])),
        sink_logits=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    size = len(lengths) * kv_heads * group
    opened = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    event(f"{sum(call.asked)} of {len(lengths)} asked")
    return call, torch.tensor(opened).view(len(lengths), kv_heads * group, 1)


@given(calls())
@settings(max_examples=settings().max_examples // 2)
def test_rows_equal_the_reference_on_each_request_alone(drawn: tuple[Call, Tensor]) -> None:
    call, opened = drawn
    attended, kernel = attend(call, decided(opened))
    assert torch.equal(attended.open, opened & torch.tensor(call.asked)[:, None, None])
    assert_equal(attended.output, call.expected(opened))
    check_reads(call, opened, attended, kernel)


def test_heads_beside_an_open_one_open_too_where_groups_are_whole() -> None:
    call = Call.drawn([300, 200, 36, 90], whole_groups=True)
    opened = torch.rand(4, call.query.shape[1], 1, generator=torch.Generator().manual_seed(1)) < 0.3
    gate = decided(opened)
    gate.weigh = lambda inputs, known: (torch.where(opened, 1e30, -1e30).double(), None)
    attended, kernel = attend(call, gate)
    kv_heads = call.store.key.shape[1]
    whole = (
        opened.unflatten(1, (kv_heads, -1)).any(2, keepdim=True).expand(4, kv_heads, call.query.shape[1] // kv_heads, 1)
    )
    whole = whole.flatten(1, 2)
    assert torch.equal(attended.open, whole & torch.tensor(call.asked)[:, None, None])
    assert (attended.open & ~opened).any()
    assert (~attended.open).any()
    assert_equal(attended.output, call.expected(whole))
    check_reads(call, whole, attended, kernel)


def moments_of(call: Call, number: int) -> PromptMoments:
    inputs = call.alone(number)
    _, moments = MomentGate().weigh(inputs, Known())
    assert moments is not None
    return moments


def side_by_side(call: Call) -> PromptMoments:
    """Moments of all requests, and of rows that fill up."""
    found = [moments_of(call, number) for number in range(len(call.places))]
    found += [PromptMoments.empty(call.store.key.transpose(0, 1)[None])] * (
        call.inputs().table.numbers.shape[1] - len(found)
    )
    return PromptMoments(*(torch.cat(part) for part in zip(*(one.parts for one in found), strict=True)))


@pytest.mark.parametrize("estimate", ["lognormal", "guarded", "saturating"])
@pytest.mark.parametrize("measured", ["nothing", "margins", "probe"])
def test_gates_are_those_of_each_request_alone(estimate: Any, measured: str) -> None:
    # The second is too short for moments, and opens; the last is not asked.
    call = Call.drawn(
        [500, 100, 300, 163, 164, 700], asked=[True] * 5 + [False], kv_heads=3, softcap=4.0, sink_logits=True
    )
    heads, rows = call.query.shape[1], call.inputs().table.numbers.shape[1]
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 1, 8, generator=draw, dtype=torch.float64)
    margins, probe = torch.randn(heads, generator=draw), torch.randn(heads, 8, generator=draw)
    margins[1], margins[2] = -torch.inf, torch.inf
    heads_of = {"nothing": None, "margins": MeasuredHeads(margins), "probe": MeasuredHeads(margins, probe=probe)}[
        measured
    ]
    gate = MomentGate(threshold=0.12, estimate=estimate)
    known = Known(0, side_by_side(call), measured=heads_of, hidden=hidden)
    attended, _ = attend(call, gate, known)
    wanted = []
    for number, is_asked in enumerate(call.asked):
        inputs = call.alone(number)
        mass, _ = gate.weigh(inputs, replace(known, moments=None, hidden=hidden[number : number + 1]))
        wanted.append(reference.attend(inputs, mass, gate.margin).open & is_asked)
    assert torch.equal(attended.open, torch.cat(wanted))
    assert 5 < attended.open.sum() < attended.open.numel() - 5
    assert_equal(attended.output, call.expected(attended.open))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("compiler", "options"),
    [
        ("eager", {}),
        pytest.param("aot_eager", {"kv_heads": 3, "softcap": 3.0, "sink_logits": True}, marks=pytest.mark.slow),
        pytest.param("aot_eager", {"group": 1, "page_size": 48}, marks=pytest.mark.slow),
    ],
)
def test_compiled_rows_are_within_the_error_budget(compiler: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    forget()
    lengths = [[200, 37, 90], [164, 20, 300, 64]]
    for seed, drawn in enumerate(lengths):
        # Uncompiled FlexAttention reads all places, and multiplies what it does not see by 0.
        call = Call.drawn(drawn, shared=2, dtype=dtype, elsewhere=9.0, seed=seed, **options)
        opened = torch.rand(len(drawn), call.query.shape[1], 1, generator=torch.Generator().manual_seed(seed)) > 0.5
        attended = attend_table_with(call.inputs(), decided(opened), Known(), compiler=compiler)
        assert torch.equal(attended.open, opened & torch.tensor(call.asked)[:, None, None])
        assert_within_budget(attended.output, call.expected(opened), call.expected(opened, torch.float64))
    forget()


def test_rows_none_of_which_is_asked_need_no_gate() -> None:
    call = Call.drawn([60, 200], asked=[False, False])
    attended, _ = attend(call, ClosedGate())
    assert not attended.open.any()
    assert attended.scored_keys == 0
    assert_equal(attended.output, call.expected(attended.open))


def test_listed_heads_are_told_once_for_all_layers() -> None:
    call = Call.drawn([300, 200, 36, 90])
    inputs, gate = call.inputs(), StaticGate(open_heads=((0, 1), (2, 0), (2, 3)))
    wanted = [[1], [], [0, 3], []]
    with by_hand(), mock.patch.object(table, "on_device", side_effect=table.on_device) as told:
        for layer, heads in enumerate(wanted):
            attended = attend_table_with(inputs, gate, Known(layer), compiler="eager")
            opened = torch.zeros_like(attended.open)
            opened[:, heads] = torch.tensor(call.asked)[:, None, None]
            assert torch.equal(attended.open, opened)
            assert_equal(attended.output, call.expected(opened))
    assert told.call_count == 1


def test_a_table_is_told_once() -> None:
    call = Call.drawn([300, 200, 90])
    inputs = call.inputs()
    assert inputs.table.numbers.tolist() == [[3, 2, 1, 0], [0, 300, 500, 0], [300, 200, 90, 0], [1, 1, 1, 0]]
    with by_hand(), mock.patch.object(table.Owned, "of", side_effect=table.Owned.of) as made:
        for _ in range(3):
            attend_table_with(inputs, ClosedGate(), Known(), compiler="eager")
    assert made.call_count == 1
    assert vars(inputs.table.counts) == {"n_asked": 3, "n_below": 0, "n_causal": 590}


@pytest.mark.parametrize(
    ("device", "page_size", "dim", "reason"),
    [
        ("cpu", 256, 64, "no log-sum-exp on a CPU"),
        ("cuda", 24, 64, "multiple of 16"),
        ("cuda", 256, 8, "heads of 16"),
        ("cuda", 48, 16, None),
    ],
)
def test_what_keeps_it_from_serving(device: str, page_size: int, dim: int, reason: str | None) -> None:
    found = why_not(torch.device(device), page_size, dim)
    assert found is None if reason is None else reason in (found or "")
