"""Lossless drafts beside dense attention: the same texts, written after each question of a quiz."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from patchattn.demo.questions import Quiz
from patchattn.demo.timing import Times
from patchattn.evaluation.answers import step, write
from patchattn.evaluation.drafted import DRAFT, is_level
from patchattn.gates import ClosedGate
from patchattn.hf.drafting import draft, generate_plainly
from patchattn.hf.patching import PatchHandle
from patchattn.policy import Policy
from patchattn.report.drafts import DraftCounts

# Tokens written after a right answer, for most answers are over before there is anything to draft.
_BEYOND = 4


@dataclass(frozen=True)
class Drafted:
    """What lossless drafts give.

    Args:
        right: Questions answered right.
        texts: Texts written, one after each question: as many tokens as the right answer has, and four more.
        same: Texts that are those of dense attention, token for token.
        level: Texts that are not, and differ first where dense attention itself is not stable.
        drafted: Tokens drafted, always in drafts of `DRAFT` tokens.
        kept: Drafted tokens that dense attention kept.
        realised_density: Keys scored of the causal keys, in drafts.
        first_token_seconds: As in `Measured`.
        tokens_per_second: As in `Measured`, with drafts whose length adapts.
    """

    right: int
    texts: int
    same: int
    level: int
    drafted: int
    kept: int
    realised_density: float
    first_token_seconds: float
    tokens_per_second: float


def drafting(model: Any, policy: Policy, backend: str, tokens: Any) -> PatchHandle:
    """Make closed heads draft, with sink, window and layers of a policy."""
    changes = {"gate": ClosedGate(), "phases": frozenset({"decode"}), "min_bulk": 0}
    return draft(model, policy.model_copy(update=changes), backend=backend, tokens=tokens)


def write_both(
    model: Any,
    drafts: Callable[..., AbstractContextManager[PatchHandle]],
    quiz: Quiz,
    done: Callable[[int], None],
    *,
    longest: int,
    document_weight: int,
) -> Callable[[Times], Drafted]:
    """Write after each question, densely and with drafts, from copies of one dense cache of the document.

    Args:
        model: A causal language model, not patched.
        drafts: Called with the tokens of each draft, makes it draft until the context is left.
        quiz: Document and questions.
        done: Called after the document and after each text, with how much work it was.
        longest: Most tokens to read and write together.
        document_weight: The work of reading the document; that of a text is 1.

    Returns:
        What makes the result, given the times.
    """
    _, cache = step(model, quiz.document, None)
    done(document_weight)
    prompts, read = [], list(quiz.document)
    for turn in quiz.turns:
        prompts.append([*(quiz.document if quiz.alone else read), *turn.given])
        read = [*prompts[-1], *turn.answer[:-1]]
    wanted = [len(turn.answer) + _BEYOND for turn in quiz.turns]
    counts = [min(count, longest - len(tokens)) for count, tokens in zip(wanted, prompts, strict=True)]
    dense = []
    for tokens, count in zip(prompts, counts, strict=True):
        dense.append(write(model, tokens[len(quiz.document) :], copy.deepcopy(cache), count)[0])
        done(1)
    with drafts(DRAFT) as handle:
        found = []
        for tokens, count in zip(prompts, counts, strict=True):
            found.append(generate_plainly(model, tokens, copy.deepcopy(cache), count))
            done(1)
    others = [of for of in zip(prompts, dense, found, strict=True) if of[1] != of[2]]
    report = handle.report()
    right = sum(text[: len(turn.answer)] == list(turn.answer) for text, turn in zip(found, quiz.turns, strict=True))
    level = sum(is_level(model, tokens, cache, *texts) for tokens, *texts in others)
    made = report.drafts or DraftCounts()
    shares = made.drafted, made.accepted, report.realised_density("decode")
    return lambda times: Drafted(right, len(found), len(found) - len(others), level, *shares, *times)
