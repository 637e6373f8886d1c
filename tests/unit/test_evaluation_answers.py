"""Scores of a model on documents with planted questions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from patchattn.evaluation.answers import Scores, teacher_forced
from patchattn.evaluation.documents import Document, Question


class Oracle:
    """A model that is sure of the next token, except at some positions."""

    device = torch.device("cpu")

    def __init__(self, wrong_at: tuple[int, ...] = ()) -> None:
        self.wrong_at = wrong_at

    def __call__(self, ids: torch.Tensor, *, use_cache: bool) -> SimpleNamespace:
        logits = torch.full((1, ids.shape[1], 10), -50.0)
        for at, token in enumerate(ids[0, 1:].tolist()):
            logits[0, at, (token + 1) % 10 if at + 1 in self.wrong_at else token] = 50.0
        return SimpleNamespace(logits=logits)


def document() -> Document:
    """Twenty tokens: text, a planted line at 4..8, a question at 10 whose answer is 13..15, and one at 16."""
    first = Question("fact", "q", " a", planted_at=4, start=10, answer_start=13, answer_end=16)
    second = Question("note", "q", " a", planted_at=4, start=16, answer_start=18, answer_end=20)
    return Document(tuple(at % 7 for at in range(20)), (first, second), ((4, 8),))


def test_all_answer_tokens_must_be_right() -> None:
    scores = teacher_forced(Oracle(wrong_at=(14,)), [document(), document()])
    assert scores.right == {"fact": 0, "note": 2}
    assert scores.asked == {"fact": 2, "note": 2}
    assert scores.exact_match("note") == 1.0
    assert scores.exact_match() == 0.5
    assert scores.text_loss == pytest.approx(0.0)


@pytest.mark.parametrize(("wrong", "costs"), [(3, True), (8, True), (4, False), (7, False), (10, False), (15, False)])
def test_text_loss_leaves_planted_lines_and_questions_out(wrong: int, costs: bool) -> None:
    # Of the 19 predicted tokens, 4 are planted and 10 belong to questions: 5 are text.
    assert teacher_forced(Oracle(wrong_at=(wrong,)), [document()]).text_loss == pytest.approx(
        20.0 if costs else 0.0, abs=1e-3
    )


def test_without_questions_of_a_kind_nothing_is_right() -> None:
    assert Scores({}, {"fact": 4}, 0.0).exact_match() == 0.0
