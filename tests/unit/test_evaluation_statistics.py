"""Intervals of shares and of what is measured on documents."""

from __future__ import annotations

import numpy as np
import pytest

from patchattn.evaluation.statistics import ratio_of_sums, relative_change, share, wilson_interval


def test_wilson_interval() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)
    assert share(8, 10) == (0.8, low, high)


def test_a_bootstrap_is_as_wide_as_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = ratio_of_sums(values, np.ones(400))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_changes_are_paired_with_dense_attention() -> None:
    dense = [2.0, 9.0, 4.0, 3.0]
    found = relative_change([1.1 * loss for loss in dense], dense)
    assert found == pytest.approx((0.1, 0.1, 0.1))
    found = relative_change([2.5, 9.0, 4.0, 2.9], dense)
    assert found.low < 0 < found.value < found.high
