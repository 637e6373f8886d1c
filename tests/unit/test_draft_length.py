"""Lengths of drafts on a clock that is made up."""

import random

import pytest

from patchattn.hf.draft_length import MOST, DraftLength


def run(length, tokens, *, dense=1.0, step, least=None, wider=0.0, acceptance=0.9, seed=0, change=None, noise=0.0):
    """Write a text on a clock that says what things take, by and large; returns the seconds they took and dense ones.

    With noise each timing is off by so much, and one in fifty is three times as long. `least` is what is known of a
    step beforehand; what it takes by default.
    """
    chance = random.Random(seed)

    def told(seconds):
        outlier = 3 if noise and chance.random() < 0.02 else 1
        return seconds * chance.lognormvariate(0, noise) * outlier

    length.begin()
    least = min(step / dense, 0.95) if least is None else least
    spent = written = 0
    while written < tokens:
        if change is not None and written > tokens / 2:
            step = change
        drafted, why = length.choose(least)
        drafted = min(drafted, tokens - written - 1)
        accepted = 0
        while accepted < drafted and chance.random() < acceptance:
            accepted += 1
        drafting = sum(told(step) for _ in range(drafted))
        length.saw(drafted, accepted, drafting, told(dense + drafted * wider), why or "last token")
        spent, written = spent + drafted * (step + wider) + dense, written + accepted + 1
    return spent, written * dense


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("step", "acceptance", "least"), [(1.0, 0.9, 0.9), (0.9, 0.5, 0.8), (2.0, 0.99, 0.5), (0.6, 0.3, 0.6)]
)
def test_never_much_slower_than_dense(step, acceptance, least, seed):
    length = DraftLength()
    spent, dense = run(length, 600, step=step, least=least, acceptance=acceptance, seed=seed, wider=0.05)
    assert spent <= 1.03 * dense
    assert length.counts.without_draft["does not pay"] > 0


SHORT = [(1.0, 0.9, 0.8), (0.9, 0.9, 0.8), (0.71, 0.83, 0.7), (0.6, 0.3, 0.6), (0.9, 0.5, 0.7), (0.4, 0.9, 0.4)]


@pytest.mark.parametrize(("step", "acceptance", "least"), SHORT)
def test_short_texts_are_hardly_slower_either(step, acceptance, least):
    """The first text of a model and those after it, also where drafts have bad luck: 0.97x on a clock without noise."""
    for seed in range(50):
        length = DraftLength()
        for text in range(3):
            ways = {"step": step, "least": least, "acceptance": acceptance, "seed": 3 * seed + text, "wider": 0.05}
            spent, dense = run(length, 64, **ways)
            assert spent <= dense / 0.97


@pytest.mark.parametrize(("step", "acceptance", "least"), SHORT)
def test_noise_costs_few_texts_more(step, acceptance, least):
    speeds = []
    for seed in range(40):
        length = DraftLength()
        for text in range(5):
            ways = {"step": step, "least": least, "acceptance": acceptance, "seed": 5 * seed + text, "wider": 0.05}
            spent, dense = run(length, 64, noise=0.08, **ways)
            speeds.append(dense / spent)
    assert min(speeds) > 0.94
    assert sum(speed < 0.97 for speed in speeds) <= 0.02 * len(speeds)


@pytest.mark.parametrize(("step", "acceptance"), [(0.6, 0.9), (0.71, 0.95), (0.71, 0.88), (0.8, 0.97)])
def test_near_the_best_length_that_is_fixed(step, acceptance):
    """Over texts of 256 tokens, on a clock with noise."""
    wider, length = 0.05, DraftLength()
    found = [
        run(length, 256, step=step, acceptance=acceptance, seed=seed, wider=wider, noise=0.08) for seed in range(20)
    ]
    best = max(sum(acceptance**n for n in range(d + 1)) / (1 + d * (step + wider)) for d in range(MOST + 1))
    speed = sum(dense for _, dense in found) / sum(spent for spent, _ in found)
    assert speed > 1 + 0.5 * (best - 1)


def test_a_shorter_text_is_judged_by_what_it_reads():
    """Of a long text a step of drafting took half a dense one; in a short one they take nearly the same."""
    length = DraftLength()
    run(length, 400, dense=2.0, step=1.0)
    rounds = length.counts.rounds
    assert rounds > 100
    spent, dense = run(length, 64, dense=1.0, step=0.98, acceptance=0.8)
    assert spent <= dense / 0.97
    assert length.counts.rounds <= rounds + 8
    assert length.counts.without_draft["does not pay"] > 40


def test_what_reading_less_saves_is_carried_over():
    """Steps of drafting save half of what they read less, in one text and in others: 0.75 and 0.85 of a dense step."""
    length = DraftLength()
    for seed in range(8):
        run(length, 256, step=0.75, least=0.5, seed=seed, acceptance=0.95)
    before = length.counts.rounds
    run(length, 256, step=0.98, least=0.96, acceptance=0.8)
    assert length.counts.rounds - before <= 15
    spent, dense = run(length, 256, step=0.75, least=0.5, acceptance=0.95, seed=9)
    assert spent < 0.95 * dense


@pytest.mark.parametrize(("step", "acceptance", "gain"), [(0.7, 0.92, 1.05), (0.4, 0.9, 1.4), (0.1, 0.95, 3.0)])
def test_drafts_where_it_pays(step, acceptance, gain):
    length = DraftLength()
    spent, dense = run(length, 1000, step=step, acceptance=acceptance, wider=0.02)
    assert dense / spent > gain
    assert 0.6 * acceptance < length.counts.acceptance < acceptance + 0.02


def test_one_draft_that_is_refused_does_not_end_drafting():
    """Neither in its text nor in the next."""
    length = DraftLength()
    length.begin()
    for number in range(100):
        drafted, why = length.choose(0.7)
        length.saw(drafted, 0 if length.counts.rounds == 0 else drafted, 0.7 * drafted, 1.0 + 0.05 * drafted, why)
        if number == 60:
            assert length.counts.rounds > 1
    before = length.counts.rounds
    run(length, 64, step=0.7, acceptance=1.0)
    assert length.counts.rounds > before + 10


@pytest.mark.parametrize("slow", [1.5, 3.0, 10.0])
@pytest.mark.parametrize("number", range(3))
def test_one_slow_round_does_not_end_drafting(slow, number):
    """In texts of 40 tokens, which are too short to win back much."""
    length, rounds = DraftLength(), []
    for _ in range(12):
        length.begin()
        for _ in range(40):
            drafted, why = length.choose(0.65)
            took = slow if drafted and length.counts.rounds == number else 1.0
            length.saw(drafted, drafted, 0.7 * drafted * took, (1.0 + 0.05 * drafted) * took, why)
        rounds.append(length.counts.rounds - sum(rounds))
    assert min(rounds[8:]) > 20, rounds


def test_cheap_steps_make_long_drafts():
    lengths = []
    for step in (0.6, 0.05):
        length = DraftLength()
        run(length, 400, step=step, acceptance=0.9)
        lengths.append(length.counts.drafted / length.counts.rounds)
    assert lengths[0] < 4 < lengths[1]


def test_tries_again_and_stops_again():
    length = DraftLength()
    run(length, 3000, step=2.0, least=0.2, change=0.2)
    assert length.counts.rounds > 100
    length = DraftLength()
    spent, dense = run(length, 3000, step=0.4, change=1.2, seed=1)
    assert length.counts.without_draft["does not pay"] > 500
    assert spent < 0.9 * dense


def test_dense_steps_are_timed_in_each_text():
    length = DraftLength()
    run(length, 200, step=0.2)
    before = dict(length.counts.without_draft)
    run(length, 10, step=0.2)
    assert length.counts.without_draft["measuring"] == before["measuring"] + 3


def test_a_fixed_length_is_kept():
    length = DraftLength(5)
    run(length, 100, step=9.0)
    assert length.counts.drafted >= 5 * (length.counts.rounds - 1)
    assert not length.counts.without_draft.keys() - {"last token"}


def test_calls_that_compile_are_no_measure():
    """The first dense step, the first draft and one in the middle take a thousand times as long."""
    length = DraftLength()
    length.begin()
    for number, seconds in enumerate([1000.0, 1.0, 1.0]):
        assert length.choose(0.3) == (0, "measuring"), number
        length.saw(0, 0, 0.0, seconds, "measuring")
    for number in range(60):
        drafted, why = length.choose(0.3)
        slow = 1000 if number in (0, 20) else 1
        length.saw(drafted, drafted, 0.3 * drafted * slow, 1.1 * slow, why)
    assert length.counts.rounds >= 53
    assert length.counts.without_draft.get("does not pay", 0) == 0
