"""Dense against patched on one model and one text: answers, text loss, open pairs and seconds.

The text becomes a document of an exact number of tokens with planted facts. The model reads it once and is then asked
for every fact in turn, in one conversation on one cache; it writes the answers itself, greedily. Text loss is measured
on another stretch of the text, without planted lines. Times are taken apart from both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from patchattn.evaluation.answers import write
from patchattn.evaluation.documents import Document, DocumentError, check_longest, make_document, tokenize_text
from patchattn.evaluation.loss import losses
from patchattn.hf.patching import patch
from patchattn.hf.weights import input_device
from patchattn.policy import PHASES, Phase, Policy

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of all work that is behind, in [0, 1]."""

# Facts near the end would lie in the window, where every head sees them.
_DEPTH = (0.0, 0.9)
_MOST_LOSS_TOKENS = 8192
_PREFILLS = 3
_WARM_STEPS = 4
_STEPS = 32


@dataclass(frozen=True)
class Measured:
    """What one way of computing attention gives.

    Args:
        right: Questions answered right: every token of the answer was written.
        text_loss: Mean cross-entropy over `Comparison.text_tokens` tokens of plain text, nats per token.
        prefill_seconds: Seconds to read the document, median of three.
        decode_tokens_per_second: Tokens per second when writing after the document, one sequence at a time.
        open_fraction: Open pairs of the pairs asked; by phase, `"prefill"` and `"decode"`. NaN where no pair was
            asked. Empty for dense.
        realised_density: Keys scored of the causal keys, by phase. NaN where no call was gated. Empty for dense.
    """

    right: int
    text_loss: float
    prefill_seconds: float
    decode_tokens_per_second: float
    open_fraction: dict[str, float]
    realised_density: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Dense and patched side by side.

    Args:
        dense: The model as it came, with its own attention.
        patched: The same model under the policy.
        policy: The policy, every `"auto"` resolved.
        backend: The backend that computed the patched column.
        length: Tokens in the document, questions and answers included.
        prefill_tokens: Tokens of the document before the first question.
        nearest: Tokens between the end of the latest planted fact and the first question.
        furthest: Tokens between the start of the earliest planted fact and the first question.
        questions: Number of questions.
        text_tokens: Tokens that text loss was averaged over.
        report: The report of the patched run with its timeline: document, answers and plain text, without the timing
            runs.
        tokens: Ids of the tokens that the patched run read, in order: document, answers as written, plain text.
    """

    dense: Measured
    patched: Measured
    policy: Policy
    backend: str
    length: int
    prefill_tokens: int
    nearest: int
    furthest: int
    questions: int
    text_tokens: int
    report: Any
    tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, ready for JSON; None for what is not known."""
        return {
            "length": self.length,
            "prefill_tokens": self.prefill_tokens,
            "questions": self.questions,
            "nearest_fact_tokens": self.nearest,
            "furthest_fact_tokens": self.furthest,
            "text_tokens": self.text_tokens,
            "backend": self.backend,
            "policy": self.policy.model_dump(mode="json"),
            "dense": _plain(self.dense),
            "patched": _plain(self.patched),
            "report": self.report.to_dict(),
        }


def _plain(measured: Measured) -> dict[str, Any]:
    by_phase = {
        name: {phase: None if math.isnan(number) else number for phase, number in getattr(measured, name).items()}
        for name in ("open_fraction", "realised_density")
    }
    return vars(measured) | by_phase


def compare(
    model: Any,
    tokenizer: Any,
    text: str,
    policy: Policy,
    *,
    length: int,
    questions: int = 24,
    backend: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Measure a model on a text, first with its own attention, then patched.

    Args:
        model: A causal language model of transformers, not patched.
        tokenizer: Its tokenizer.
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
        DocumentError: The text is shorter than the document, the document is longer than the model's context, or the
            questions do not fit into it.
        PatchAttnError: As `patchattn.patch` raises it.
    """
    check_longest(model, length)
    lines = tokenize_text(text, tokenizer)
    available = sum(map(len, lines.tokens))
    if available < length:
        raise DocumentError(
            f"The text has {available:,} tokens and the document was to have {length:,}.",
            fix=f"Give a longer text, or choose a length of at most {available}.",
        )
    made = partial(make_document, lines, tokenizer, length=length, depth=_DEPTH)
    document = made(kinds=("fact",) * questions, seed=seed)
    plain = made(kinds=(), seed=seed + 1).token_ids
    context = document.token_ids[: document.questions[0].start]
    # Of each column: the questions, the plain text, a prefill to warm up, those that are timed, and decode.
    steps, n_steps = count(1), 2 * (questions + 1 + 1 + _PREFILLS + 1)
    patched = partial(patch, model, policy, backend=backend)

    def tell(what: str) -> None:
        if progress is not None:
            progress(what, next(steps) / n_steps)

    def quality(column: str) -> tuple[int, float, list[int]]:
        right, read = conversation(model, document, partial(tell, f"{column}: answering"))
        loss = losses(model, plain)[-_MOST_LOSS_TOKENS:].double().mean().item()
        tell(f"{column}: reading plain text")
        return right, loss, [*read, *plain]

    def speed(column: str) -> tuple[float, float]:
        return _times(model, context, longest=length, done=partial(tell, f"{column}: timing"))

    with patched():
        pass  # What can't be patched is refused before the dense run, not after it.
    right, loss, _ = quality("dense")
    dense = Measured(right, loss, *speed("dense"), {}, {})
    with patched(record="timeline") as handle:
        right, loss, tokens = quality("patched")
    report = handle.report()
    phases: list[Phase] = [phase for phase in PHASES if phase in handle.policy.phases]
    opened = {phase: report.open_fraction(phase) for phase in phases}
    density = {phase: report.realised_density(phase) for phase in phases}
    with patched():
        seconds = speed("patched")
    return Comparison(
        dense=dense,
        patched=Measured(right, loss, *seconds, opened, density),
        policy=handle.policy,
        backend=handle.backend,
        length=length,
        prefill_tokens=len(context),
        nearest=len(context) - max(end for _, end in document.planted),
        furthest=len(context) - min(start for start, _ in document.planted),
        questions=questions,
        text_tokens=min(len(plain) - 1, _MOST_LOSS_TOKENS),
        report=report,
        tokens=tuple(tokens),
    )


def conversation(model: Any, document: Document, done: Callable[[], None]) -> tuple[int, list[int]]:
    """Ask a model for every fact of a document in turn, in one conversation on one cache.

    Args:
        model: A causal language model, patched or not.
        document: A document with all questions at its end.
        done: Called after each question.

    Returns:
        Answers of which every token was written; the tokens that the model read, in order.
    """
    right, read, cache = 0, [], None
    ids, questions = list(document.token_ids), document.questions
    given = ids[: questions[0].start]
    for question, after in zip(questions, (*(later.start for later in questions[1:]), len(ids)), strict=True):
        given += ids[question.start : question.answer_start]
        answer = ids[question.answer_start : question.answer_end]
        found, cache = write(model, given, cache, len(answer))
        right += found == answer
        read += given + found[:-1]
        # What comes next in the conversation: the token that is not in the cache yet, and the line break.
        given = found[-1:] + ids[question.answer_end : after]
        done()
    return right, read


def _times(model: Any, tokens: Sequence[int], *, longest: int, done: Callable[[], None]) -> tuple[float, float]:
    """Time prefill and decode after one warm-up of each, one sequence at a time.

    Args:
        model: A causal language model, patched or not.
        tokens: Token ids to read.
        longest: Most tokens to read and write together, which is kept to by reading fewer.
        done: Called after each prefill and after decode.

    Returns:
        Seconds to read, the median of three; tokens per second when writing after that.
    """
    given = list(tokens[: longest - _WARM_STEPS - _STEPS])
    seconds = []
    cache, found = None, []
    for _ in range(1 + _PREFILLS):
        begin = _now(model)
        found, cache = write(model, given, None, 1)
        seconds.append(_now(model) - begin)
        done()
    found, cache = write(model, found, cache, _WARM_STEPS)
    begin = _now(model)
    write(model, found[-1:], cache, _STEPS)
    speed = _STEPS / (_now(model) - begin)
    done()
    return statistics.median(seconds[1:]), speed


def _now(model: Any) -> float:
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
