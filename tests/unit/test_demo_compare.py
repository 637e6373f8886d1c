"""Tests of `patchattn.demo.compare` and `timing`: answers and predictions on a cache, and times taken in turn."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from patchattn import demo
from patchattn.demo import timing
from patchattn.demo.compare import compare, look
from patchattn.demo.questions import make_quiz
from patchattn.evaluation.answers import write
from patchattn.gates import ClosedGate, OpenGate
from patchattn.hf.candidates import Drafting
from patchattn.hf.patching import is_patched, patch
from patchattn.policy import Policy
from patchattn.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quick_demo")
CHAT = "<u>{{ messages[0]['content'] }}</u><a>"
PROSE = "\n".join(f"Line {number} of a long story in which nothing happens to anybody." for number in range(200))
SMALL = {"length": 512, "questions": 3}


def tokenizer_with(template):
    tokenizer = demo.load()[1]
    tokenizer.chat_template = template
    return tokenizer


def made_up(family="llama"):
    return tiny_model(family, vocab_size=1024, max_position_embeddings=1024)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


# Two whose caches can't be cropped: sliding layers have forgotten what is behind them, linear ones never knew it.
@pytest.mark.parametrize("family", ["llama", "gemma2", "minimax"])
def test_a_question_alone_is_answered_as_if_no_other_had_been_asked(family):
    model = made_up(family)
    quiz = make_quiz(model, tokenizer_with(CHAT), PROSE, seed=0, **SMALL)
    every = look(model, quiz, [], lambda weight: None).answers
    ones = [look(model, replace(quiz, turns=(turn,)), [], lambda weight: None).answers for turn in quiz.turns]
    torch.testing.assert_close(every, torch.cat(ones))
    assert len(every) == sum(len(turn.answer) for turn in quiz.turns)


@pytest.mark.parametrize("template", [None, CHAT])
def test_predictions_on_the_cache_are_those_of_the_whole(template):
    model, quiz = made_up(), make_quiz(made_up(), tokenizer_with(template), PROSE, seed=0, **SMALL)
    found = look(model, quiz, [200, 300], lambda weight: None)
    read, want = quiz.document, []
    for turn in quiz.turns:
        read = (quiz.document if quiz.alone else read) + turn.given + turn.answer[:-1]
        want.append(logits_of(model, read)[-len(turn.answer) :])
    torch.testing.assert_close(found.answers, torch.cat(want), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.text, logits_of(model, quiz.document)[[200, 300]], atol=1e-4, rtol=1e-4)


def test_right_is_what_is_written_greedily_and_text_loss_leaves_facts_out():
    model, tokenizer = demo.load()
    quiz = make_quiz(model, tokenizer, demo.sample_text(), length=1024, questions=6, seed=0)
    cache, right, given = None, 0, quiz.document
    for turn in quiz.turns:
        given += turn.given
        found, _ = write(model, given, cache, len(turn.answer))
        right += found == list(turn.answer)
        given += turn.answer[:-1]
    logits, tokens = logits_of(model, quiz.document).float(), torch.tensor(quiz.document)
    is_text = [not any(start <= at < end for start, end in quiz.planted) for at in range(1, len(tokens))]
    loss = functional.cross_entropy(logits[:-1][is_text], tokens[1:][is_text])
    seen = look(model, quiz, [], lambda weight: None)
    assert 0 < right <= 6
    assert seen.right == right
    assert seen.text_loss == pytest.approx(loss.item(), rel=0.01)


@pytest.mark.parametrize("template", [None, CHAT])
def test_open_gates_agree_and_closed_ones_do_not(template):
    model, tokenizer = made_up(), tokenizer_with(template)
    find = partial(compare, model, tokenizer, PROSE, **SMALL)
    opened = find(Policy(window_size=32, min_bulk=0, gate=OpenGate()))
    assert opened.agreement["text"].top1 > 0.98
    assert opened.agreement["answers"].top1 > 0.9
    assert opened.agreement["answers"].kl < 1e-4
    assert opened.agreement["text"].tokens > 200
    closed = find(Policy(window_size=32, min_bulk=0, gate=ClosedGate()))
    assert closed.agreement["text"].kl > 10 * opened.agreement["text"].kl
    assert closed.agreement["answers"].kl > 10 * opened.agreement["answers"].kl
    assert closed.patched.open_fraction == {"prefill": 0, "decode": 0}
    timeline = closed.report.timeline_of()
    assert len(timeline.phases) == len(closed.tokens)
    # Questions are read at once, the last token of each and its answer one by one.
    assert timeline.phases.count("decode") == closed.agreement["answers"].tokens


@pytest.mark.parametrize("template", [None, CHAT])
def test_drafts_write_what_dense_attention_writes(template):
    found = compare(made_up(), tokenizer_with(template), PROSE, Policy(window_size=32, min_bulk=0), **SMALL)
    drafts = found.drafts
    assert (drafts.same, drafts.texts, drafts.level, drafts.right) == (3, 3, 0, found.dense.right)
    assert 0 < drafts.drafted
    assert 0 < drafts.realised_density < 0.5
    assert found.to_dict()["drafts"]["same"] == 3


def test_texts_of_drafts_that_are_verified_by_gates_are_others(monkeypatch):
    monkeypatch.setattr(Drafting, "is_on", property(lambda self: True, lambda self, on: None), raising=False)
    found = compare(made_up(), tokenizer_with(CHAT), PROSE, Policy(window_size=8, min_bulk=0), **SMALL)
    assert found.drafts.same + found.drafts.level < 3


def test_a_model_that_cannot_draft_is_compared_without():
    found = compare(made_up("minimax"), tokenizer_with(CHAT), PROSE, Policy(window_size=32, min_bulk=0), **SMALL)
    assert found.drafts is None
    assert "recurrent layers" in found.no_drafts
    assert found.to_dict()["drafts"] is None


def test_a_cache_that_says_it_is_empty_is_gone_on_with_token_by_token(monkeypatch):
    def read_twice(*_):
        raise AssertionError("generate would read the whole text again")

    monkeypatch.setattr(timing, "generate_plainly", read_twice)
    monkeypatch.setattr(DynamicCache, "get_seq_length", lambda self, layer_idx=0: 0)
    assert timing._time(made_up(), range(5, 40)).tokens_per_second > 0


def test_a_model_that_answers_nothing_is_said_not_to_be_measured():
    found = compare(made_up(), tokenizer_with(CHAT), PROSE, Policy(window_size=32, min_bulk=0), **SMALL)
    assert found.dense.right == 0
    assert not found.measures_answers
    plain = found.to_dict()
    assert plain["questions_measure_the_model"] is False
    assert set(plain["agreement"]) == {"text", "answers"}


def test_a_window_as_long_as_the_document_leaves_no_text_to_compare():
    found = compare(made_up(), tokenizer_with(CHAT), PROSE, Policy(window_size=600, min_bulk=0), **SMALL)
    assert found.to_dict()["agreement"]["text"] == {"tokens": 0, "top1": None, "kl": None}


def test_dense_and_patched_are_timed_in_turn_and_the_best_round_counts(monkeypatch):
    monkeypatch.undo()  # rounds as in a real demo
    model, seen = made_up(), []
    seconds = itertools.chain([3.0, 2.0, 1.0, 4.0], itertools.repeat(9.0))

    def time_once(model, given):
        seen.append((is_patched(model), len(given)))
        taken = next(seconds)
        return timing.Times(taken, 1 / taken)

    monkeypatch.setattr(timing, "_time", time_once)
    done = []
    policy = Policy(window_size=32, min_bulk=0)
    ways = {"dense": nullcontext, "patched": lambda: patch(model, policy)}
    times, rounds = timing.in_turn(model, ways, range(99), longest=60, done=done.append)
    assert [was for was, _ in seen] == [False, True] * rounds
    assert {count for _, count in seen} == {60 - 1 - 8 - 16}
    assert done == ["dense", "patched"] * rounds
    assert times == {"dense": (1.0, 1.0), "patched": (2.0, 0.5)}
    assert not is_patched(model)


def test_long_rounds_are_two(monkeypatch):
    monkeypatch.undo()
    clock = itertools.count(0, 11)
    monkeypatch.setattr(timing, "_now", lambda model: next(clock))
    monkeypatch.setattr(timing, "_time", lambda model, given: timing.Times(1.0, 1.0))
    model = made_up()
    assert timing.in_turn(model, {"dense": nullcontext}, range(9), longest=60, done=print)[1] == 2
