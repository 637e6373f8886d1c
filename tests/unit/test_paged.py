"""One query of many sequences against keys in pages: the reference on each alone, and nothing of others is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchattn.backends import reference
from patchattn.backends.blockwise import decode, paged, products
from patchattn.backends.blockwise.paged import attend_paged, attend_paged_densely
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores, exact_masses, masked_log_mass
from patchattn.call.paged import PagedRows, PagedStore
from patchattn.call.regions import Regions
from patchattn.gates.decision import forced
from patchattn.testing import assert_within_budget


@dataclass(frozen=True)
class Watched(PagedStore):
    """Notes which places are read, of which KV heads."""

    seen: list[Tensor] = field(default_factory=list)

    def read(self, found: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(found)
        # What was copied before is gone.
        for held in self.scratch._held.values():
            held.fill_(torch.nan)
        return super().read(found)


@dataclass
class Call:
    """Sequences in a store, whose other places hold NaN and inf."""

    query: Tensor
    store: Watched
    kv_heads: int
    places: list[Tensor]
    sink: int
    window: int
    options: dict[str, Any]

    @classmethod
    def drawn(
        cls,
        lengths: list[int],
        *,
        kv_heads: int = 2,
        group: int = 2,
        dims: tuple[int, int] = (16, 16),
        sink: int = 4,
        window: int = 32,
        softcap: float | None = None,
        sink_logits: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Call:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        total, heads = sum(lengths), kv_heads * group
        order = torch.randperm(2 * total + 300, generator=draw)
        places = list(order[:total].split(lengths))
        key, value = (torch.full((len(order), kv_heads, dim), torch.nan, dtype=dtype) for dim in dims)
        key[order[total + 100 :]] = value[order[total + 100 :]] = torch.inf
        for x, dim in zip((key, value), dims, strict=True):
            x[order[:total]] = normal(total, kv_heads, dim)
        logits = normal(heads) if sink_logits else None
        options = {"scale": 1.5 / math.sqrt(dims[0]), "softcap": softcap, "sink_logits": logits}
        return cls(
            normal(len(lengths), heads, 1, dims[0]), Watched(key, value), kv_heads, places, sink, window, options
        )

    def rows(self, *, break_even: int = 0) -> PagedRows:
        return PagedRows.of(self.places, self.kv_heads, self.sink, self.window, break_even)

    def paged(self) -> AttentionInputs:
        return self.rows().without_keys(self.query, self.store, *self.options.values())

    def alone(self, row: int, dtype: torch.dtype | None = None) -> AttentionInputs:
        """One of the sequences as a call of its own."""
        dtype = dtype or self.query.dtype
        keys = self.places[row]
        key, value = (x[keys].transpose(0, 1)[None].to(dtype) for x in (self.store.key, self.store.value))
        ones = torch.ones(1, len(keys))
        regions = Regions.of(ones, query_length=1, sink_size=self.sink, window_size=self.window)
        logits = self.options["sink_logits"]
        options = self.options | {"sink_logits": None if logits is None else logits.to(dtype)}
        return AttentionInputs(self.query[row : row + 1].to(dtype), key, value, regions, **options)

    def expected(self, opened: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What the reference says of each sequence alone."""
        outputs = []
        for row in range(len(self.places)):
            inputs = self.alone(row, dtype)
            outputs.append(reference.attend(inputs, forced(opened[row : row + 1], inputs), 0.0).output)
        return torch.cat(outputs)

    def check_reads(self, opened: Tensor) -> None:
        """Only keys of the sequences were read: local ones, and of KV heads between open ones those of the bulk."""
        heads, own = self.kv_heads, {}
        for row, places in enumerate(self.places):
            local = {*places[: self.sink].tolist(), *places[-self.window :].tolist()}
            own |= {(place, head): (row, place in local) for place in places.tolist() for head in range(heads)}
        of_heads = opened.view(len(self.places), heads, -1).any(-1).tolist()
        local, *bulk = ([divmod(at, heads) for at in found.flatten().tolist()] for found in self.store.seen)
        assert {at: own[at] for at in local} == {at: found for at, found in own.items() if found[1]}
        for at in (at for found in bulk for at in found):
            row, is_local = own[at]
            first = [head for head, is_open in enumerate(of_heads[row]) if is_open]
            assert first[0] <= at[1] <= first[-1]
            assert not is_local


@contextmanager
def small_products() -> Iterator[None]:
    """Let bfloat16 go through the products also where there is little to multiply."""
    with (
        mock.patch.object(products, "_FEWEST_NUMBERS", 0),
        mock.patch.object(products, "_FEWEST_NUMBERS_OF_ONE_ROW", 0),
    ):
        yield


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Call, Tensor]:
    """A call, and decisions for it."""
    sink, window = draw(st.integers(0, 6)), draw(st.integers(1, 40))
    bulks = draw(st.lists(st.integers(1, 300) | st.sampled_from([127, 128, 129, 256]), min_size=1, max_size=4))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    call = Call.drawn(
        [sink + window + bulk for bulk in bulks],
        kv_heads=kv_heads,
        group=group,
        dims=draw(st.sampled_from([(8, 8), (16, 16), (64, 64), (16, 24)])),
        sink=sink,
        window=window,
        softcap=draw(st.sampled_from([None, 3.0])),
        sink_logits=draw(st.booleans()),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )
    size = len(bulks) * kv_heads * group
    opened = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    event("mixed" if len(set(opened)) > 1 else "one kind of decision")
    return call, torch.tensor(opened).view(len(bulks), kv_heads * group, 1)


def attend(call: Call, opened: Tensor) -> Any:
    mass = torch.where(opened, torch.inf, -torch.inf)
    attended = attend_paged(call.paged(), call.rows(), call.store, mass, 0.0)
    assert torch.equal(attended.open, opened)
    return attended


@given(calls(torch.float64))
def test_pages_equal_the_reference_on_each_sequence_alone(drawn: tuple[Call, Tensor]) -> None:
    call, opened = drawn
    attended = attend(call, opened)
    torch.testing.assert_close(attended.output, call.expected(opened), rtol=1e-9, atol=1e-10)
    call.check_reads(opened)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(st.data())
@settings(max_examples=settings().max_examples // 2)
def test_pages_are_within_the_error_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    call, opened = data.draw(calls(dtype))
    with small_products():
        attended = attend(call, opened)
    assert_within_budget(attended.output, call.expected(opened), call.expected(opened, torch.float64))
    call.check_reads(opened)


@pytest.mark.parametrize("short", [0, 1024], ids=["one by one", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(calls(torch.float64), st.data())
@settings(max_examples=settings().max_examples // 3)
def test_dense_pages_equal_the_reference_with_all_gates_open(
    short: int, dtype: torch.dtype, drawn: Any, data: Any
) -> None:
    call, opened = drawn
    # Some are shorter than sink and window.
    lengths = [data.draw(st.integers(1, len(places))) for places in call.places]
    call.places = [places[:length] for places, length in zip(call.places, lengths, strict=True)]
    logits = call.options["sink_logits"]
    call.options["sink_logits"] = None if logits is None else logits.to(dtype)
    call.store = Watched(call.store.key.to(dtype), call.store.value.to(dtype))
    call.query, opened = call.query.to(dtype), torch.ones_like(opened)
    with small_products(), mock.patch.object(paged, "_SHORT", short):
        got = attend_paged_densely(call.paged(), call.rows(), call.store)
    if dtype == torch.float64:
        torch.testing.assert_close(got, call.expected(opened), rtol=1e-9, atol=1e-10)
    else:
        assert_within_budget(got, call.expected(opened), call.expected(opened, torch.float64))
    read = {at for found in call.store.seen for at in (found // call.kv_heads).flatten().tolist()}
    assert read == set(torch.cat(call.places).tolist())


@pytest.mark.parametrize("bulk", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("window", [1, 100, 200])
def test_what_is_filled_up_is_of_the_own_bulk(bulk: int, window: int) -> None:
    # Places of nobody hold NaN and inf, and keys of the other sequence are larger than any of its own.
    call = Call.drawn([4 + window + bulk, 4 + window + 50], window=window, dtype=torch.bfloat16, dims=(64, 64))
    call.store.value[call.places[1]] *= 1000
    opened = torch.tensor([True, False]).view(2, 1, 1).expand(2, 4, 1)
    with small_products():
        got = attend(call, opened).output[0]
    assert_within_budget(got, call.expected(opened)[0], call.expected(opened, torch.float64)[0])
    *_, found = call.store.seen
    assert set((found // 2).flatten().tolist()) == set(call.places[0][4 : 4 + bulk].tolist())
    assert found.shape[-1] == -(-bulk // products.GRID) * products.GRID


@pytest.mark.parametrize("sink_logits", [False, True], ids=["", "sink logits"])
def test_decisions_are_those_of_the_reference(sink_logits: bool) -> None:
    call = Call.drawn([90, 300, 41], sink_logits=sink_logits, softcap=2.0, kv_heads=3)
    masses, margins = [], []
    for row in range(3):
        inputs = call.alone(row)
        masses.append(exact_masses(inputs)[0].bulk)
        local = masked_log_mass(attention_scores(inputs), inputs.regions.local_mask()[:, None], inputs.sink_logits)
        margins.append((local - masses[-1]).flatten())
    ordered = torch.cat(margins).sort().values
    margin = float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())
    wanted = [reference.attend(call.alone(row), mass, margin) for row, mass in enumerate(masses)]
    got = attend_paged(call.paged(), call.rows(), call.store, torch.cat(masses), margin)
    assert torch.equal(got.open, torch.cat([each.open for each in wanted]))
    assert 0 < got.open.sum() < got.open.numel()
    torch.testing.assert_close(got.output, torch.cat([each.output for each in wanted]), rtol=1e-9, atol=1e-10)


def test_scored_keys_are_those_of_a_call_with_its_keys_at_hand() -> None:
    call = Call.drawn([200, 90, 400], kv_heads=2, group=3)
    opened = torch.rand(3, 6, 1, generator=torch.Generator().manual_seed(3)) > 0.6
    scored = 0
    for row in range(3):
        inputs = call.alone(row)
        scored += decode.attend_decode(inputs, forced(opened[row : row + 1], inputs), 0.0).scored_keys
    assert attend(call, opened).scored_keys == scored
    assert 3 * 6 * 36 < scored < 6 * (200 + 90 + 400)


def test_a_gate_that_looks_at_keys_that_are_not_read_opens() -> None:
    call = Call.drawn([100, 60])
    inputs, rows = call.paged(), call.rows(break_even=3)
    mass = exact_masses(inputs)[0].bulk
    assert mass.isnan().all()
    assert attend_paged(inputs, rows, call.store, mass, 0.0).open.all()
    assert rows.regions.last_n_bulk == [64, 24]
    assert rows.regions.break_even == 3
    assert inputs.key.shape == (2, 2, 100, 16)


def test_whole_groups_open_as_in_the_reference() -> None:
    call = Call.drawn([90, 140], kv_heads=2, group=3)
    call.options["whole_groups"] = True
    # Two groups of each sequence: one open head beside one that is closed for certain, and all closed.
    mass = torch.tensor([1e9, -1e9, -torch.inf, -1e9, -1e9, -1e9, -1e9, -1e9, -1e9, -torch.inf, 1e9, -1e9])
    mass = mass.double().view(2, 6, 1)
    attended = attend_paged(call.paged(), call.rows(), call.store, mass, 0.0)
    assert attended.open.flatten().int().tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    wanted = [reference.attend(call.alone(row), mass[row : row + 1], 0.0) for row in range(2)]
    assert torch.equal(torch.cat([one.open for one in wanted]), attended.open)
    torch.testing.assert_close(torch.cat([one.output for one in wanted]), attended.output)
