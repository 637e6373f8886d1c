"""Attention of a few rows by two matrix products: as exact as the fused kernel, whatever was read before."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from patchattn.backends import blockwise, reference
from patchattn.backends.blockwise import products
from patchattn.backends.blockwise.products import attend_by_products, may_use_products
from patchattn.backends.blockwise.softmax import Softmax
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates.decision import all_open, forced
from patchattn.testing import assert_within_budget

SCALE = 64**-0.5

pytestmark = pytest.mark.skipif(
    not products._has_fast_products(), reason="the processor has no matrix products in bfloat16"
)


def drawn(
    kv_heads: int = 3, rows: int = 3, keys: int = 3000, *, spread: float = 1.0, mean: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(kv_heads, n, 64, generator=draw) for n in (rows, keys, keys))
    # One direction that all keys share, as rotary models have it: large scores that differ little.
    key[..., 0] += mean
    query[..., 0] = query[..., 0].abs() + 1
    return tuple(x.bfloat16() for x in (query * spread, key, value))  # pyright: ignore[reportReturnType]


def before(log_mass: Tensor) -> Softmax:
    """Attention to other keys, of some log mass."""
    return Softmax(torch.randn(*log_mass.shape, 64, generator=torch.Generator().manual_seed(1)), log_mass)


def in_float64(query: Tensor, key: Tensor, value: Tensor, begin: int, end: int, near: Softmax) -> tuple[Tensor, Tensor]:
    scores = query.double() @ key[:, begin:end].double().mT * SCALE
    weights = torch.cat([scores, near.log_mass.double().unsqueeze(-1)], -1)
    shares = weights.softmax(-1)
    output = shares[..., :-1] @ value[:, begin:end].double() + shares[..., -1:] * near.output
    return output, weights.logsumexp(-1)


@pytest.mark.parametrize("off", [-60.0, -3.0, 0.0, 1.0, 3.0, 6.0], ids=lambda off: f"before {off:+.0f}")
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_products_are_exact_whatever_was_read_before(off: float, rows: int, mean: float) -> None:
    call = drawn(rows=rows, mean=mean, spread=3.0)
    begin, end = 5, 2900  # not on the grid
    largest = (call[0].double() @ call[1][:, begin:end].double().mT * SCALE).amax(-1).float()
    near = before(largest + off)
    truth, log_mass = in_float64(*call, begin, end, near)
    assert may_use_products(*call[:2], begin, end)
    got = attend_by_products(*call, begin, end, SCALE, near)
    assert got is not None
    query, key, value = (x[None] for x in call)
    output, of_range, *_ = torch._scaled_dot_product_flash_attention_for_cpu(
        query, key[:, :, begin:end], value[:, :, begin:end], scale=SCALE
    )
    plain = Softmax(output[0].float(), of_range[0]).merge(near).output.bfloat16()
    assert_within_budget(got.output.bfloat16(), plain, truth)
    assert (got.log_mass.double() - log_mass).abs().max() < 0.01 * max(off, 2)


def test_many_stretches_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    call = drawn()
    call[1][:, 1500] *= 4  # the level is raised in the middle
    monkeypatch.setattr(products, "_MOST_NUMBERS", 3 * 64 * 500)
    near = before(torch.zeros(3, 3))
    got = attend_by_products(*call, 5, 2900, SCALE, near)
    assert got is not None
    truth, log_mass = in_float64(*call, 5, 2900, near)
    assert (got.output - truth).abs().max() < 0.01 * truth.abs().max()
    assert (got.log_mass.double() - log_mass).abs().max() < 0.01


def test_keys_far_below_those_before_change_nothing() -> None:
    near = before(torch.full((3, 3), 1001.0))
    got = attend_by_products(*drawn(), 0, 2944, SCALE, near)
    assert got is not None
    assert_within_budget(got.output, near.output, near.output.double())
    assert (got.log_mass == 1001).all()


def test_scores_that_are_not_finite_are_left_to_others() -> None:
    query, key, value = drawn()
    for mass in (math.nan, -math.inf):
        assert attend_by_products(query, key, value, 0, 2944, SCALE, before(torch.full((3, 3), mass))) is None
    key[1, 77] = math.inf
    assert attend_by_products(query, key, value, 0, 2944, SCALE, before(torch.zeros(3, 3))) is None


def decode_call(batch: int = 2, group: int = 3, keys: int = 4100, window: int = 200, **changes: Any) -> AttentionInputs:
    query, key, value = drawn(kv_heads=batch * 3, rows=group, keys=keys)
    valid = torch.ones(batch, keys, dtype=torch.bool)
    valid[-1, : changes.get("left", 0)] = False
    slot = changes.get("query_slot", keys - 1)
    regions = Regions.of(valid, query_length=1, query_slot=slot, sink_size=4, window_size=window)
    return AttentionInputs(
        query.reshape(batch, 3 * group, 1, 64), *(x.view(batch, 3, keys, 64) for x in (key, value)), regions, SCALE
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one sequence": {"batch": 1, "keys": 6000},
    "one head for each KV head": {"group": 1},
    "left padding": {"left": 300},
    "static cache": {"query_slot": 3990},
    "small window": {"window": 16, "query_slot": 3990},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_decode_step_by_products_is_within_the_error_budget(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = decode_call(**CASES[name])
    exact = AttentionInputs(
        *(x.double() for x in (inputs.query, inputs.key, inputs.value)), inputs.regions, inputs.scale
    )
    opened = torch.rand(inputs.query.shape[:3], generator=torch.Generator().manual_seed(1)) < share
    opened[0, 0] = True
    used: list[bool] = []

    def noted(*args: Any) -> Any:
        found = attend_by_products(*args)
        used.append(found is not None)
        return found

    for module in ("decode", "dense"):
        # Not by its name: the package has a function that is called like the module.
        monkeypatch.setattr(import_module(f"patchattn.backends.blockwise.{module}"), "attend_by_products", noted)
    truth, plain = (reference.attend(x, forced(opened, x), 0.0).output for x in (exact, inputs))
    dense_truth, dense_plain = (reference.attend(x, all_open(x), 0.0).output for x in (exact, inputs))
    unused = inputs.regions.host.filled
    inputs.key[:, :, unused:] = inputs.value[:, :, unused:] = torch.nan
    got = blockwise.attend(inputs, forced(opened, inputs), 0.0)
    assert used or name == "small window"
    assert torch.equal(got.open, opened)
    assert_within_budget(got.output, plain, truth)
    n_bulk_calls = len(used)
    assert_within_budget(blockwise.dense(inputs), dense_plain, dense_truth)
    assert len(used) > n_bulk_calls
    assert all(used)


@pytest.mark.parametrize("queries", [2, 3, 9, 16, 17])
def test_a_draft_is_verified_within_the_error_budget(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, used = torch.Generator().manual_seed(0), []

    def noted(*args: Any) -> Any:
        used.append(args[0].shape)
        return attend_by_products(*args)

    monkeypatch.setattr(import_module("patchattn.backends.blockwise.dense"), "attend_by_products", noted)
    query, key, value = (torch.randn(1, heads, n, 64, generator=draw) for heads, n in ((9, queries), *[(3, 6000)] * 2))
    regions = Regions.plain(16, 1024, queries, 1, 6000, torch.device("cpu"))
    call = AttentionInputs(query.bfloat16(), key.bfloat16(), value.bfloat16(), regions, SCALE)
    exact = AttentionInputs(*(x.double() for x in (call.query, call.key, call.value)), regions, SCALE)
    truth, plain = (reference.attend(x, all_open(x), 0.0).output for x in (exact, call))
    assert_within_budget(blockwise.dense(call), plain, truth)
    assert used == ([(3, 3 * queries, 64)] if queries <= 5 else [])


@pytest.mark.parametrize("slot", [-1, 3000], ids=["of the last query", "far away"])
def test_a_key_that_is_not_finite_spoils_only_those_who_see_it(slot: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, 64, generator=draw).bfloat16() for heads, n in ((9, 3), *[(3, 6000)] * 2)
    )
    call = AttentionInputs(query, key, value, Regions.plain(16, 1024, 3, 1, 6000, torch.device("cpu")), SCALE)
    clean = blockwise.dense(call)
    key[:, 0, slot] = torch.nan
    spoilt = blockwise.dense(call)
    sees = torch.zeros(9, 3, dtype=torch.bool)
    sees[:3, 2 if slot == -1 else 0 :] = True
    assert spoilt[0, sees].isnan().all()
    assert_within_budget(spoilt[0, ~sees], clean[0, ~sees], clean[0, ~sees].double())
