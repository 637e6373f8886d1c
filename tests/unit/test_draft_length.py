"""Lengths of drafts on a clock that is made up."""

import random

import pytest

from patchattn.hf.draft_length import DraftLength


def run(length, tokens, *, dense, step, wider=0.0, acceptance=0.9, seed=0, change=None):
    """Write a text; returns the seconds it took and those of dense steps."""
    chance = random.Random(seed)
    length.begin()
    spent = written = 0
    while written < tokens:
        if change is not None and written > tokens / 2:
            step = change
        drafted, why = length.choose()
        accepted = 0
        while accepted < drafted and chance.random() < acceptance:
            accepted += 1
        seconds = drafted * step, dense + drafted * wider
        length.saw(drafted, accepted, *seconds, why)
        spent, written = spent + sum(seconds), written + accepted + 1
    return spent, written * dense


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("step", "acceptance"), [(1.0, 0.9), (0.9, 0.5), (2.0, 0.99), (0.6, 0.3)])
def test_never_much_slower_than_dense(step, acceptance, seed):
    length = DraftLength()
    spent, dense = run(length, 600, dense=1.0, step=step, acceptance=acceptance, seed=seed, wider=0.05)
    assert spent <= 1.03 * dense
    assert length.counts.without_draft["does not pay"] > 0


@pytest.mark.parametrize(("step", "acceptance"), [(1.0, 0.9), (0.71, 0.86), (0.6, 0.3), (0.9, 0.5), (0.4, 0.9)])
def test_short_texts_are_hardly_slower_either(step, acceptance):
    """The first text of a model and the next, also where drafts have bad luck."""
    for seed in range(100):
        length = DraftLength()
        for text in range(2):
            ways = {"step": step, "acceptance": acceptance, "seed": 2 * seed + text, "wider": 0.05}
            spent, dense = run(length, 64, dense=1.0, **ways)
            assert spent <= 1.03 * dense


def test_a_shorter_text_is_judged_by_its_own_steps():
    """Of a long text a step of drafting took half a dense one; in a short one they take the same."""
    length = DraftLength()
    run(length, 400, dense=2.0, step=1.0)
    spent, dense = run(length, 64, dense=1.0, step=1.0)
    assert spent <= 1.03 * dense
    assert length.counts.without_draft["does not pay"] > 20


@pytest.mark.parametrize(("step", "acceptance", "gain"), [(0.7, 0.92, 1.05), (0.4, 0.9, 1.4), (0.1, 0.95, 3.0)])
def test_drafts_where_it_pays(step, acceptance, gain):
    length = DraftLength()
    spent, dense = run(length, 1000, dense=1.0, step=step, acceptance=acceptance, wider=0.02)
    assert dense / spent > gain
    assert 0.6 * acceptance < length.counts.acceptance < acceptance + 0.02


def test_cheap_steps_make_long_drafts():
    lengths = []
    for step in (0.6, 0.05):
        length = DraftLength()
        run(length, 400, dense=1.0, step=step, acceptance=0.9)
        lengths.append(length.counts.drafted / length.counts.rounds)
    assert lengths[0] < 4 < lengths[1]


def test_tries_again_and_stops_again():
    length = DraftLength()
    run(length, 3000, dense=1.0, step=2.0, change=0.2)
    assert length.counts.rounds > 100
    length = DraftLength()
    spent, dense = run(length, 3000, dense=1.0, step=0.2, change=3.0, seed=1)
    assert length.counts.without_draft["does not pay"] > 500
    assert spent < 0.75 * dense


def test_what_was_learned_stays_and_dense_steps_are_timed_in_each_text():
    length = DraftLength()
    run(length, 200, dense=1.0, step=0.2)
    before = dict(length.counts.without_draft)
    run(length, 10, dense=1.0, step=0.2)
    assert length.counts.without_draft["measuring"] == before["measuring"] + 2


def test_a_fixed_length_is_kept():
    length = DraftLength(5)
    run(length, 100, dense=1.0, step=9.0)
    assert length.counts.drafted == 5 * length.counts.rounds
    assert not length.counts.without_draft


def test_calls_that_compile_are_no_measure():
    """The first dense step, the first draft and one in the middle take a thousand times as long."""
    length = DraftLength()
    length.begin()
    for number, seconds in enumerate([1000.0, 1.0]):
        assert length.choose() == (0, "measuring"), number
        length.saw(0, 0, 0.0, seconds, "measuring")
    for number in range(60):
        drafted, why = length.choose()
        slow = 1000 if number in (0, 20) else 1
        length.saw(drafted, drafted, 0.3 * drafted * slow, 1.1 * slow, why)
    assert length.counts.rounds >= 57
    assert length.counts.without_draft.get("does not pay", 0) == 0
