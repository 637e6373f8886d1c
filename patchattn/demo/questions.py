"""What a model is asked about a text: facts in plain English, or keys for the model that ships along."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from patchattn.demo import is_shipped
from patchattn.evaluation.documents import DocumentError, make_document
from patchattn.evaluation.facts import MOST_FACTS, draw_facts
from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import check_answers
from patchattn.evaluation.units import cut, n_shared, take, weave
from patchattn.hf.architecture import vocabulary_of
from patchattn.hf.loading import first_line

# Facts near the end would lie in the window, where every head sees them.
_DEPTH = (0.0, 0.9)
_TEXT, _QUESTION = "the-text-goes-here", "the-question-goes-here"


@dataclass(frozen=True)
class Turn:
    """One question.

    Args:
        given: Tokens from the end of what is in the cache to where the answer begins; at least 2.
        answer: Tokens of the right answer.
    """

    given: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Quiz:
    """A document with planted facts, and a question for each of them.

    Args:
        document: Tokens to read before the first question.
        text_start: Index of the document's first token that belongs to the text.
        planted: `(start, end)` of each planted line in the document, `end` exclusive.
        turns: The questions.
        alone: True: each question follows the document alone. False: they follow each other in one conversation, with
            the right answer after each.
        manner: How is asked, in words.
    """

    document: tuple[int, ...]
    text_start: int
    planted: tuple[tuple[int, int], ...]
    turns: tuple[Turn, ...]
    alone: bool
    manner: str

    def text_positions(self) -> list[int]:
        """Return the positions after which a token of the text follows, not one of a planted line."""
        planted = {at for start, end in self.planted for at in range(start, end)}
        return [at for at in range(self.text_start, len(self.document) - 1) if at + 1 not in planted]

    def tokens(self) -> tuple[int, ...]:
        """Return all tokens that are read, in order; the last of each answer is not, unless a question follows it."""
        return self.document + tuple(token for turn in self.turns for token in turn.given + turn.answer[:-1])


@dataclass(frozen=True)
class Frame:
    """The words around a text and a question about it.

    Args:
        before: Before the text; empty without a chat template.
        between: Between the text and the question.
        after: Between the question and the answer.
        manner: What it is, in words.
    """

    before: str
    between: str
    after: str
    manner: str

    @property
    def is_chat(self) -> bool:
        """Whether a chat template made it."""
        return bool(self.before)


def make_quiz(model: Any, tokenizer: Any, text: str, *, length: int, questions: int, seed: int | str) -> Quiz:
    """Hide facts in a text and ask for all of them, in the way that suits the model.

    The shipped model is asked for keys, as it was trained to be. Any other is asked in plain English: with a chat
    template each question alone, which instruct models are better at than at long chats; without one all in one
    conversation, in which the first answers show a base model what is wanted.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: Real text of at least `length` tokens.
        length: Tokens in the document with the questions and answers that follow it at a time.
        questions: Number of facts.
        seed: Chooses the stretch of text, the facts and their places.

    Raises:
        DocumentError: The text is shorter than the document, the questions do not fit into it, there are more than
            `MOST_FACTS`, the tokenizer can't write the answers, or it is not the model's.
    """
    material = Material(text, tokenizer)
    if material.n_tokens < length:
        raise DocumentError(
            f"The text has {material.n_tokens:,} tokens and the document was to have {length:,}.",
            fix=f"Give a longer text, or choose a length of at most {material.n_tokens}.",
        )
    make = _keys if is_shipped(model) else _facts
    quiz = make(material, length=length, questions=questions, seed=seed)
    highest, known = max(quiz.tokens()), vocabulary_of(model)
    if highest >= known:
        raise DocumentError(
            f"The tokenizer made token {highest:,} and the model knows {known:,} tokens.",
            fix="Load the tokenizer that belongs to the model.",
        )
    return quiz


def frame_of(tokenizer: Any) -> Frame:
    """Return the words that a tokenizer's chat template puts around a text and a question, or plain ones without it."""
    plain = Frame("", "\nQuestion: ", "\nAnswer: ", "as question and answer in one conversation, without chat template")
    if getattr(tokenizer, "chat_template", None) is None:
        return plain
    request = [{"role": "user", "content": f"Read this text.\n\n{_TEXT}\nQuestion: {_QUESTION}"}]
    try:
        whole = tokenizer.apply_chat_template(request, tokenize=False, add_generation_prompt=True)
        before, rest = whole.split(_TEXT)
        between, after = rest.split(_QUESTION)
    # A template is a program of somebody else and may raise anything.
    except Exception as error:
        return replace(plain, manner=f"{plain.manner}, for that is broken ({first_line(error)})")
    return Frame(before, between, after, "each alone after the text, in the model's chat template")


def _keys(material: Material, *, length: int, questions: int, seed: int | str) -> Quiz:
    kinds = ("fact",) * questions
    made = make_document(material.text, material.tokenizer, length=length, kinds=kinds, depth=_DEPTH, seed=seed)
    ids, asked = made.token_ids, made.questions
    begins = (asked[0].start, *(question.answer_end - 1 for question in asked))
    turns = tuple(
        Turn(ids[begin : question.answer_start], ids[question.answer_start : question.answer_end])
        for begin, question in zip(begins, asked, strict=False)
    )
    document, manner = ids[: asked[0].start], "in the form that the shipped model knows, in one conversation"
    return Quiz(document, min(len(material.begin), 1), made.planted, turns, alone=False, manner=manner)


def _facts(material: Material, *, length: int, questions: int, seed: int | str) -> Quiz:
    if questions > MOST_FACTS:
        raise DocumentError(
            f"{questions} questions are more than there are facts to tell apart.", fix=f"Ask at most {MOST_FACTS}."
        )
    rng, frame = random.Random(f"{seed}/{length}"), frame_of(material.tokenizer)
    facts = draw_facts(rng, questions)
    planted = material.encode([f"{fact.statement}\n" for fact in facts])
    prompts = [f"{frame.between}{fact.question}{frame.after}{fact.lead}" for fact in facts]
    wholes = material.encode([f"{prompt} {fact.answer}" for prompt, fact in zip(prompts, facts, strict=True)])
    turns = []
    for fact, prompt, whole in zip(facts, material.encode(prompts), wholes, strict=True):
        shared = n_shared(prompt, whole)
        check_answers(whole[shared:], f" {fact.answer}", (fact.answer,), material.tokenizer)
        turns.append(Turn(whole[:shared], whole[shared:]))
    rng.shuffle(turns)
    asked = [len(turn.given) + len(turn.answer) for turn in turns]
    if not frame.is_chat:
        # The last token of an answer is not read before the next question comes.
        turns[1:] = [Turn((earlier.answer[-1], *turn.given), turn.answer) for earlier, turn in pairwise(turns)]
    # A template has all special tokens in it already.
    before = material.tokenizer([frame.before], add_special_tokens=False)["input_ids"][0]
    tokens = list(before if frame.is_chat else material.begin)
    start = len(tokens)
    fixed = start + sum(map(len, planted)) + (max(asked) if frame.is_chat else sum(asked))
    if fixed >= length:
        raise DocumentError(
            f"{questions} tasks need {fixed} tokens and length is {length}.",
            fix="Ask fewer questions, or choose a greater length.",
        )
    lines = material.text
    filling = cut(take(lines.tokens_from(rng.randrange(len(lines.lines))), length - fixed), length - fixed)
    depths = sorted(rng.uniform(*_DEPTH) for _ in planted)
    spans = weave(tokens, filling, zip(depths, planted, strict=True), share=1)
    return Quiz(tuple(tokens), start, spans, tuple(turns), alone=frame.is_chat, manner=frame.manner)
