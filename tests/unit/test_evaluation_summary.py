"""What cells add up to, worked out by hand."""

from __future__ import annotations

import math

import pytest

from patchattn.evaluation.agreement import Agreement
from patchattn.evaluation.cells import Cell, PhaseCounts, together
from patchattn.evaluation.statistics import Interval, mean_of_means
from patchattn.evaluation.summary import Closeness, summarize


def cell(policy: str, task: str, *scores: float, seed: int = 0) -> Cell:
    return Cell(policy, task, 64, seed, scores)


DENSE = (cell("dense", "a", 1, 1, 0, 0), cell("dense", "b", 1, 1, 1, 1))


def test_the_mean_drop_is_over_tasks_and_the_worst_task_is_named() -> None:
    found = summarize("p", 64, [cell("p", "a", 0, 0, 0, 1), cell("p", "b", 1, 1, 1, 0)], DENSE)
    assert found.mean_score == pytest.approx(0.5)
    assert found.drop.value == pytest.approx(0.25)
    assert found.drop.low < 0.25 < found.drop.high
    # Both drop by 0.25; the first one is named.
    assert found.worst_task == "a"
    found = summarize("p", 64, [cell("p", "a", 1, 1, 0, 0), cell("p", "b", 0, 0, 1, 1)], DENSE)
    assert (found.worst_task, found.worst_drop.value) == ("b", 0.5)
    assert found.worst_drop.low >= 0


def test_pairs_of_equal_answers_have_no_spread() -> None:
    same = [cell("p", "a", 1, 1, 0, 0), cell("p", "b", 1, 1, 1, 1)]
    found = summarize("p", 64, same, DENSE)
    assert found.drop == Interval(0, 0, 0)
    assert (found.worst_task, found.worst_drop) == (None, None)
    shifted = summarize("p", 64, [cell("p", "a", 0.5, 0.5, -0.5, -0.5), same[1]], DENSE)
    assert shifted.worst_drop == Interval(0.5, 0.5, 0.5)


def test_seeds_count_apart_and_together() -> None:
    dense = (cell("dense", "a", 1, 1), cell("dense", "a", 1, 0, seed=7))
    mine = (cell("p", "a", 1, 0), cell("p", "a", 0, 0, seed=7))
    found = summarize("p", 64, mine, dense)
    assert found.mean_by_seed == (0.5, 0.0)
    assert found.mean_score == 0.25
    assert found.drop.value == 0.5
    both = together(mine)
    assert (both.scores, both.seed) == ((1, 0, 0, 0), None)
    counted = [Cell("p", "a", 64, seed, (1.0,), counts={"decode": PhaseCounts(1, 2, 3, 4)}) for seed in (0, 1)]
    assert together(counted).counts == {"decode": PhaseCounts(2, 4, 6, 8)}


def test_closeness_weighs_tokens_and_hides_nothing() -> None:
    found = Closeness.of([Agreement(1, 1, 0.0), Agreement(3, 0, 0.6), Agreement()])
    assert (found.top1.value, found.kl.value) == pytest.approx((0.25, 0.15))
    assert found.top1.low == 0
    assert found.top1.high == 1
    assert Closeness.of([Agreement()]) is None
    for broken in (math.inf, math.nan):
        found = Closeness.of([Agreement(1, 1, 0.0), Agreement(1, 1, broken)])
        assert not math.isfinite(found.kl.value)
        assert found.top1.value == 1


def test_nothing_measured_is_no_number() -> None:
    found = summarize("p", 64, [], [])
    assert math.isnan(found.mean_score)
    assert found.to_dict()["mean_score"] is None
    assert (found.drop, found.text, found.answers) == (None, None, None)


def test_the_bootstrap_of_means_covers_the_truth() -> None:
    found = mean_of_means([[0, 1] * 50, [1] * 10])
    assert found.value == pytest.approx(0.75)
    # Half of the spread of a share of 100 draws.
    assert (found.low, found.high) == pytest.approx((0.75 - 0.049, 0.75 + 0.049), abs=0.01)
