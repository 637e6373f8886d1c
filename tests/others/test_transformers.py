"""The common model tests of transformers, on patched models; run with `pytest -m others`, needs PyPI once.

Each test runs twice from the same seed, on stock models and on patched ones. It must do the same both times, and all
forward passes must give the same outputs; or it must be refused as `selection.REFUSED` says.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from selection import FAMILIES, LEFT_ALONE, LEFT_OUT, ONE_OF_TWO, ONLY_CASES, REFUSED, SELECTED, WITHOUT_WEIGHTS

pytestmark = pytest.mark.others
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module", autouse=True)
def fetched(request):
    """Fetch the tests once: where they can't be had, that is one error for all."""
    if "others" not in request.config.option.markexpr:
        pytest.skip("only with -m others: fetches the tests of transformers from PyPI")
    from common_tests import load

    load()


def run_all(family, name, *, has_attentions=True):
    """Run every case of a test on stock and on patched models; return pairs of runs, or skip with its own reason."""
    from common_tests import cases, make_test_class
    from patched_run import run

    kind = make_test_class(family)
    kind.has_attentions = has_attentions
    if name not in cases():
        pytest.skip("this version of transformers has no such test")
    only = ONLY_CASES.get(name)
    own = kind.own_implementation if name in ONE_OF_TWO else None
    pairs = []
    for method in cases()[name]:
        if only is not None and not only.search(method):
            continue
        stock = run(kind(method), patched=False)
        # Counts as evidence only if it passes on what it was written for.
        assert not stock.errors, f"{method} fails on the stock model: {stock.errors[0]}"
        if stock.skipped is None and stock.outputs:
            pairs.append((method, stock, run(kind(method), patched=True, only=own)))
    if not pairs:
        pytest.skip(f"transformers skips it: {stock.skipped or 'the family has no such model'}")
    return pairs


def assert_same(family, name, pairs):
    for method, stock, patched in pairs:
        if patched.errors:
            raise patched.errors[0]
        assert patched.skipped is None
        assert len(patched.outputs) == len(stock.outputs) > 0, method
        for got, expected in zip(patched.outputs, stock.outputs, strict=True):
            tolerance = TOLERANCE[expected.dtype]
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        families, reason = LEFT_ALONE.get(name, ((), ""))
        assert bool(patched.left_alone) == (family in families), patched.left_alone
        assert all(reason in said for said in patched.left_alone.values()), patched.left_alone
        assert (patched.gated_calls > 0) == (family not in families)
        assert patched.open_fractions <= {1.0}


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_or_is_refused(family, name):
    pairs = run_all(family, name)
    refusal = REFUSED.get(name)
    if refusal is None:
        assert_same(family, name, pairs)
        return
    for method, _, patched in pairs:
        assert patched.errors, f"{method} passes on patched models, so it is not refused: {refusal.reason}"
        for error in patched.errors:
            if not isinstance(error, refusal.error) or refusal.says not in str(error):
                raise error


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_without_attention_weights(family, name):
    assert_same(family, name, run_all(family, name, has_attentions=False))


def test_every_test_is_run_or_left_out_for_a_reason():
    from common_tests import cases

    left_out = {name: [why for why, names in LEFT_OUT.items() if re.search(names, name)] for name in cases()}
    assert {name for name, reasons in left_out.items() if not reasons} <= set(SELECTED)
    assert not [name for name in SELECTED if left_out.get(name)]
    assert {*WITHOUT_WEIGHTS, *ONLY_CASES, *ONE_OF_TWO, *REFUSED, *LEFT_ALONE} <= set(SELECTED)
