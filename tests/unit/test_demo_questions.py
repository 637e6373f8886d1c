"""Tests of `patchattn.demo.questions`: what a model is asked, in which words, and how many tokens that takes."""

from __future__ import annotations

import re

import pytest

from patchattn import demo
from patchattn.demo.questions import Quiz, frame_of, make_quiz
from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.facts import MOST_FACTS
from patchattn.testing import tiny_model

CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
PROSE = "\n".join(f"Line {number} of a long story in which nothing happens to anybody." for number in range(400))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=1024, max_position_embeddings=2048)


@pytest.fixture
def tokenizer():
    return demo.load()[1]


def quiz_of(model, tokenizer, template=None, *, length=600, questions=4) -> Quiz:
    tokenizer.chat_template = template
    return make_quiz(model, tokenizer, PROSE, length=length, questions=questions, seed=3)


def planted_lines(quiz: Quiz, tokenizer) -> list[str]:
    return [tokenizer.decode(quiz.document[start:end]) for start, end in quiz.planted]


def test_with_a_chat_template_each_question_comes_alone_and_its_answer_is_begun(model, tokenizer):
    quiz = quiz_of(model, tokenizer, CHAT)
    assert quiz.alone
    assert tokenizer.decode(quiz.document).startswith("<|bos|><user>\nRead this text.\n\n")
    assert quiz.document.count(tokenizer.bos_token_id) == 1
    assert len(quiz.document) + max(len(turn.given) + len(turn.answer) for turn in quiz.turns) == 600
    lines = planted_lines(quiz, tokenizer)
    for turn in quiz.turns:
        asked = re.fullmatch(r"\nQuestion: (.+\?)\n<assistant>\n(.+)", tokenizer.decode(turn.given))
        assert f"{asked[2]}{tokenizer.decode(turn.answer)}" in "".join(lines)


def test_without_a_chat_template_questions_and_right_answers_are_one_conversation(model, tokenizer):
    quiz = quiz_of(model, tokenizer)
    assert not quiz.alone
    assert len(quiz.tokens()) == 599  # all but the last token of the last answer
    talk = tokenizer.decode(quiz.tokens()[len(quiz.document) :] + quiz.turns[-1].answer[-1:])
    answers = re.findall(r"\nQuestion: .+\?\nAnswer: (.+)", talk)
    assert len(answers) == 4
    assert all(any(answer in line for line in planted_lines(quiz, tokenizer)) for answer in answers)


@pytest.mark.parametrize("template", [None, CHAT])
def test_facts_stand_alone_on_their_lines_and_are_not_text(model, tokenizer, template):
    quiz = quiz_of(model, tokenizer, template)
    assert all(re.fullmatch(r"[A-Z].+\.\n", line) for line in planted_lines(quiz, tokenizer))
    assert max(end for _, end in quiz.planted) < 0.95 * len(quiz.document)
    begin = quiz.text_start
    text = tokenizer.decode([quiz.document[begin], *(quiz.document[at + 1] for at in quiz.text_positions())])
    whole = tokenizer.decode(quiz.document[begin:])
    for line in planted_lines(quiz, tokenizer):
        assert line not in text
        whole = whole.replace(line, "")
    assert text == whole


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no user may speak') }}", "no user may speak"),
        ("{{ messages[0]['role'] }}", "not enough values"),
        ("{{ messages[0]['content'] * 2 }}", "too many values"),
        ("{% for %}", "Expected"),
    ],
)
def test_a_broken_template_is_left_out_with_a_reason(model, tokenizer, template, reason):
    quiz = quiz_of(model, tokenizer, template)
    assert not quiz.alone
    assert "broken" in quiz.manner
    assert reason in quiz.manner


def test_the_frame_is_what_the_template_makes(tokenizer):
    tokenizer.chat_template = CHAT
    frame = frame_of(tokenizer)
    request = [{"role": "user", "content": "Read this text.\n\nA\nQuestion: B?"}]
    whole = tokenizer.apply_chat_template(request, tokenize=False, add_generation_prompt=True)
    assert f"{frame.before}A{frame.between}B?{frame.after}" == whole


def test_the_shipped_model_is_asked_for_keys():
    model, tokenizer = demo.load()
    assert demo.is_shipped(model)
    quiz = make_quiz(model, tokenizer, demo.sample_text(), length=600, questions=4, seed=0)
    assert not quiz.alone
    assert all(re.fullmatch(r"# \w+ = \d{5}\n", line) for line in planted_lines(quiz, tokenizer))
    assert len(quiz.tokens()) == 600 - len("\n\n")  # neither the last digit nor the line break after it
    assert [len(turn.answer) for turn in quiz.turns] == [6] * 4


def test_other_models_are_shown_prose(model, monkeypatch):
    assert not demo.is_shipped(model)
    text, what = demo.default_text(model)
    assert len(text) > 200_000
    assert "pydoc_data.topics" in what
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    assert demo.default_text(model) == (demo.sample_text(), "Python source that ships along")


def test_what_can_not_be_asked_is_refused(model, tokenizer):
    with pytest.raises(DocumentError, match="more than there are facts"):
        quiz_of(model, tokenizer, questions=MOST_FACTS + 1)
    with pytest.raises(DocumentError, match="tasks need"):
        quiz_of(model, tokenizer, length=100)
    with pytest.raises(DocumentError, match="the document was to have 100,000"):
        quiz_of(model, tokenizer, length=100_000)
    with pytest.raises(DocumentError, match="knows 128 tokens"):
        quiz_of(tiny_model("llama"), tokenizer)
