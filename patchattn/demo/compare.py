"""Dense, patched and lossless drafts on one model and one text: answers, loss, agreement, open pairs and seconds.

The text becomes a document of an exact number of tokens with planted facts. The model reads it once, which gives text
loss and what is predicted along the text, and is then asked for every fact on the cache of the document. The right
answer is read token by token: what would have been written greedily is known from the predictions, and dense and
patched are compared after the same tokens. Drafts write, and are compared text by text. Times are taken apart from all
this.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchattn.demo import timing
from patchattn.demo.drafts import Drafted, drafting, write_both
from patchattn.demo.questions import Quiz, Turn, make_quiz
from patchattn.errors import UnsupportedModelError
from patchattn.evaluation.agreement import Agreement, Predictions
from patchattn.evaluation.documents import check_longest
from patchattn.evaluation.loss import losses_and_logits
from patchattn.hf.architecture import cache_of, with_cache
from patchattn.hf.patching import patch
from patchattn.hf.weights import input_device
from patchattn.policy import PHASES, Phase, Policy

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of all work that is behind, in [0, 1]."""

# Positions along the text whose predictions are compared: each holds the logits of a whole vocabulary.
_MOST_POSITIONS = 512
# How long it takes to read a document, in questions.
_DOCUMENT_WEIGHT = 12


@dataclass(frozen=True)
class Measured:
    """What one way of computing attention gives.

    Args:
        right: Questions answered right: every token of the answer is what is written greedily.
        text_loss: Mean cross-entropy over `Comparison.text_tokens` tokens of the text, nats per token.
        first_token_seconds: Seconds to read the document and write one token, the best of `Comparison.rounds`.
        tokens_per_second: Tokens per second when writing after the document, one sequence at a time; the best too.
        open_fraction: Open pairs of the pairs asked; by phase, `"prefill"` and `"decode"`. NaN where no pair was
            asked. Empty for dense.
        realised_density: Keys scored of the causal keys, by phase. NaN where no call was gated. Empty for dense.
    """

    right: int
    text_loss: float
    first_token_seconds: float
    tokens_per_second: float
    open_fraction: dict[str, float]
    realised_density: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Dense, patched and lossless drafts side by side.

    Args:
        dense: The model as it came, with its own attention.
        patched: The same model under the policy.
        drafts: The same model with lossless drafts of closed heads, with the window of the policy; None where the model
            can't have them.
        no_drafts: Why there are none.
        agreement: How close patched predictions stay to dense ones; of the `"text"` beyond sink and window, and of the
            right `"answers"`.
        policy: The policy, every `"auto"` resolved.
        backend: The backend that computed the patched column.
        length: Tokens in the document, questions and answers included.
        prefill_tokens: Tokens of the document before the first question.
        nearest: Tokens between the end of the latest planted fact and the first question.
        furthest: Tokens between the start of the earliest planted fact and the first question.
        questions: Number of questions.
        manner: How they are asked, in words.
        text_tokens: Tokens that text loss was averaged over.
        rounds: How often each time was taken.
        report: The report of the patched run with its timeline: document, questions and answers, without the timing
            runs.
        tokens: Ids of the tokens that the patched run read, in order: document, questions, answers.
    """

    dense: Measured
    patched: Measured
    drafts: Drafted | None
    no_drafts: str
    agreement: dict[str, Agreement]
    policy: Policy
    backend: str
    length: int
    prefill_tokens: int
    nearest: int
    furthest: int
    questions: int
    manner: str
    text_tokens: int
    rounds: int
    report: Any
    tokens: tuple[int, ...]

    @property
    def measures_answers(self) -> bool:
        """Whether dense attention answers at least half of the questions, so that they say something of the model."""
        return 2 * self.dense.right >= self.questions

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, ready for JSON; None for what is not known."""
        return {
            "length": self.length,
            "prefill_tokens": self.prefill_tokens,
            "questions": self.questions,
            "asked": self.manner,
            "questions_measure_the_model": self.measures_answers,
            "nearest_fact_tokens": self.nearest,
            "furthest_fact_tokens": self.furthest,
            "text_tokens": self.text_tokens,
            "timing_rounds": self.rounds,
            "backend": self.backend,
            "policy": self.policy.model_dump(mode="json"),
            "dense": _plain(self.dense),
            "patched": _plain(self.patched),
            "drafts": self.drafts and {name: _known(number) for name, number in vars(self.drafts).items()},
            "no_drafts": self.no_drafts,
            "agreement": {
                name: {"tokens": found.tokens, "top1": _known(found.top1), "kl": _known(found.kl)}
                for name, found in self.agreement.items()
            },
            "report": self.report.to_dict(),
        }


def _plain(measured: Measured) -> dict[str, Any]:
    by_phase = {
        name: {phase: _known(number) for phase, number in getattr(measured, name).items()}
        for name in ("open_fraction", "realised_density")
    }
    return vars(measured) | by_phase


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def compare(
    model: Any,
    tokenizer: Any,
    text: str,
    policy: Policy,
    *,
    length: int,
    questions: int = 16,
    backend: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Measure a model on a text, with its own attention, patched, and with lossless drafts.

    Args:
        model: A causal language model of transformers, not patched.
        tokenizer: Its tokenizer; a chat template that it has is used.
        text: Real text to hide the facts in; at least `length` tokens.
        policy: The policy of the patched run.
        length: Tokens in the document, questions and answers included.
        questions: Number of facts to plant and ask for.
        backend: Backend of the patched run, as in `patchattn.patch`.
        seed: Chooses the stretch of text, the facts and their places.
        progress: Told about progress.

    Returns:
        The measurements. The model is as it was before.

    Raises:
        DocumentError: The document is longer than the model's context, or as `make_quiz` raises it.
        PatchAttnError: As `patchattn.patch` raises it.
    """
    check_longest(model, length)
    quiz = make_quiz(model, tokenizer, text, length=length, questions=questions, seed=seed)
    patched = partial(patch, model, policy, backend=backend)
    drafts = partial(drafting, model, policy, backend)
    no_drafts = _why_no_drafts(drafts)
    # Of each column: the document, the questions, and the rounds of timing; for drafts the questions twice.
    columns = 2 if no_drafts else 3
    behind = 0
    work = columns * (questions + _DOCUMENT_WEIGHT * (1 + timing.FEWEST_ROUNDS)) + (columns - 2) * questions

    def tell(what: str, weight: int) -> None:
        nonlocal behind
        behind = min(behind + weight, work)
        if progress is not None:
            progress(what, behind / work)

    with patched() as handle:
        resolved = handle.policy  # What can't be patched is refused before the dense run, not after it.
    local = resolved.sink_size + resolved.window_size
    far = [at for at in quiz.text_positions() if at >= local]
    far = far[:: -(-len(far) // _MOST_POSITIONS) or 1]
    dense = look(model, quiz, far, partial(tell, "dense: reading and answering"))
    with patched(record="timeline") as handle:
        other = look(model, quiz, far, partial(tell, "patched: reading and answering"))
    report = handle.report()
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"dense": nullcontext, "patched": patched}
    drafted = None
    if not no_drafts:
        done = partial(tell, "drafts: writing")
        drafted = write_both(model, drafts, quiz, done, longest=length, document_weight=_DOCUMENT_WEIGHT)
        ways["drafts"] = partial(drafts, "auto")
    times, rounds = timing.in_turn(
        model, ways, quiz.document, longest=length, done=lambda name: tell(f"{name}: timing", _DOCUMENT_WEIGHT)
    )
    phases: list[Phase] = [phase for phase in PHASES if phase in resolved.phases]
    opened = {phase: report.open_fraction(phase) for phase in phases}
    density = {phase: report.realised_density(phase) for phase in phases}
    return Comparison(
        dense=Measured(dense.right, dense.text_loss, *times["dense"], {}, {}),
        patched=Measured(other.right, other.text_loss, *times["patched"], opened, density),
        drafts=drafted and drafted(times["drafts"]),
        no_drafts=no_drafts,
        agreement={
            "text": Predictions.of(dense.text).agreement(other.text),
            "answers": Predictions.of(dense.answers).agreement(other.answers),
        },
        policy=resolved,
        backend=handle.backend,
        length=length,
        prefill_tokens=len(quiz.document),
        nearest=len(quiz.document) - max(end for _, end in quiz.planted),
        furthest=len(quiz.document) - min(start for start, _ in quiz.planted),
        questions=questions,
        manner=quiz.manner,
        text_tokens=len(quiz.text_positions()),
        rounds=rounds,
        report=report,
        tokens=quiz.tokens(),
    )


def _why_no_drafts(drafts: Callable[..., AbstractContextManager[Any]]) -> str:
    """Say why a model can't draft, before anything is measured; nothing if it can."""
    try:
        with drafts("auto"):
            return ""
    except UnsupportedModelError as error:
        return error.message


@dataclass(frozen=True)
class Look:
    """Answers and text loss, and the logits [tokens, vocabulary] along the text and the right answers."""

    right: int
    text_loss: float
    text: Tensor
    answers: Tensor


def look(model: Any, quiz: Quiz, far: Sequence[int], done: Callable[[int], None]) -> Look:
    """Read the document, predicting its text, and ask all questions on its cache.

    Args:
        model: A causal language model, patched or not.
        quiz: Document and questions.
        far: Positions along the text whose logits are kept.
        done: Called after the document and after each question, with how much work it was.
    """
    losses, text, cache = losses_and_logits(model, quiz.document, far)
    done(_DOCUMENT_WEIGHT)
    right, answers = 0, []
    for turn in quiz.turns:
        # A copy, for not every cache can forget its last tokens.
        found, cache_after = _answer(model, turn, copy.deepcopy(cache) if quiz.alone else cache)
        cache = cache if quiz.alone else cache_after
        right += found.argmax(-1).tolist() == list(turn.answer)
        answers.append(found)
        done(1)
    return Look(right, losses[quiz.text_positions()].double().mean().item(), text, torch.cat(answers))


@torch.no_grad()
def _answer(model: Any, turn: Turn, cache: Any) -> tuple[Tensor, Any]:
    """Read a question, then the right answer token by token.

    Returns:
        What is predicted for each token of the answer, [tokens, vocabulary], and the cache, which lacks the last one.
    """
    rows = []
    for tokens in (turn.given[:-1], *((token,) for token in (turn.given[-1], *turn.answer[:-1]))):
        ids = torch.tensor([tokens], device=input_device(model))
        result = model(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(model, cache))
        cache = cache_of(result)
        rows.append(result.logits[0, -1:])
    return torch.cat(rows[1:]), cache
