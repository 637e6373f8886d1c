"""One prompt with the answers that are expected: the shape that all tasks share, and how it gets its exact length."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.material import Material
from patchattn.evaluation.units import Units, cut, n_shared, weave

# Where planted lines may stand, as shares of the depths allowed: 0%, 2.6%, ... 100%.
_DEPTHS = tuple(at / 39 for at in range(40))
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Sample:
    """One prompt of a task.

    Args:
        task: Name of the task.
        prompt: Token ids; the first is what the tokenizer puts before a text, if anything.
        answers: What the right continuation holds.
        target: Token ids of the right continuation.
        budget: Tokens that the model may write; prompt and budget together have the length that was asked for.
        exact: True: right means that the first tokens written are `target`, which is the same as every token of it
            being the most likely one given the true tokens before it. False: the share of `answers` that occur
            anywhere in what was written.
        planted: `(start, end)` of each planted piece in tokens of the prompt, `end` exclusive.
    """

    task: str
    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    target: tuple[int, ...]
    budget: int
    exact: bool
    planted: tuple[tuple[int, int], ...]

    def score(self, written: Sequence[int], tokenizer: Any) -> float:
        """Score what a model wrote after the prompt.

        Args:
            written: Token ids.
            tokenizer: Decodes them, unless the sample is scored by exact tokens.

        Returns:
            A number from 0 to 1.
        """
        if self.exact:
            return float(tuple(written[: len(self.target)]) == self.target)
        return recall(tokenizer.decode(list(written), skip_special_tokens=True), self.answers)


def recall(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in a text; upper and lower case are the same.

    Source: RULER, arXiv 2404.06654, string match of all references.

    Example:
        >>> recall("They are 12 and Ab.", ["12", "ab", "34", "xy"])
        0.5
    """
    text = _CONTROL_CHARACTERS.sub("\n", text).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


@dataclass(frozen=True)
class Draft:
    """A task in words, before it has its length.

    Args:
        before: Text before the haystack.
        after: Text after it, up to where the answer begins.
        continuation: The right continuation, with the space or line break that it begins with.
        answers: As in `Sample`.
        haystack: Gives units of at least as many tokens as it is asked for; the first one may be cut.
        planted: Pieces that go into the haystack in this order, at random depths.
        exact: As in `Sample`.
        depths: Where planted pieces may stand, the least and the greatest depth as fractions of the haystack.
    """

    before: str
    after: str
    continuation: str
    answers: tuple[str, ...]
    haystack: Callable[[int], Units]
    planted: tuple[str, ...] = ()
    exact: bool = False
    depths: tuple[float, float] = (0.0, 1.0)


Draw = Callable[[Material, int, random.Random], Draft]
"""Draws a task in words, for a length in tokens."""


def finish(task: str, draft: Draft, material: Material, *, length: int, rng: random.Random) -> Sample:
    """Give a draft its exact length.

    Args:
        task: Name of the task.
        draft: The task in words.
        material: What it was drawn from.
        length: Tokens in the prompt and the budget together.
        rng: Chooses the depths of what is planted.

    Raises:
        DocumentError: The length is too small, or the tokenizer can't write the answers.
    """
    before, after, whole = material.encode([draft.before, draft.after, draft.after + draft.continuation])
    shared = n_shared(after, whole)
    after, target = whole[:shared], whole[shared:]
    check_answers(target, draft.continuation, draft.answers, material.tokenizer)
    # Models put words around an answer, and separate several in their own way.
    budget = len(target) if draft.exact else 2 * len(target) + 8
    planted = material.encode(draft.planted)
    fixed = sum(map(len, (material.begin, before, *planted, after))) + budget
    if fixed > length:
        raise DocumentError(
            f"The task {task} needs {fixed} tokens without any haystack, and the length is {length}.",
            fix="Choose a greater length, or leave this task out.",
        )
    haystack = cut(draft.haystack(length - fixed), length - fixed)
    prompt = [*material.begin, *before]
    enough = len(planted) <= len(_DEPTHS)
    depths = sorted(rng.sample(_DEPTHS, len(planted)) if enough else [rng.random() for _ in planted])
    first, last = draft.depths
    depths = [first + depth * (last - first) for depth in depths]
    # Between two units, as close to the depth as they allow.
    spans = weave(prompt, haystack, zip(depths, planted, strict=True), share=0.5)
    return Sample(task, (*prompt, *after), draft.answers, target, budget, draft.exact, spans)


def check_answers(target: Sequence[int], continuation: str, answers: Sequence[str], tokenizer: Any) -> None:
    """Refuse a tokenizer that has no tokens for an answer: every model would be wrong.

    Args:
        target: What the tokenizer makes of the continuation.
        continuation: The right continuation.
        answers: What it holds.
        tokenizer: The tokenizer.

    Raises:
        DocumentError: See above.
    """
    back = tokenizer.decode(list(target), skip_special_tokens=True)
    if recall(back, answers) < 1:
        raise DocumentError(
            f"The tokenizer can't write the answer: it makes {back!r} of {continuation!r}.",
            fix="Choose tasks whose answers are made of what the tokenizer knows.",
        )
