"""Dense against patched on one model and one text: answers, text loss, open pairs and seconds.

The text becomes a document of an exact number of tokens with planted facts. The model reads it once and is then asked
for every fact in turn, in one conversation on one cache; it writes the answers itself, greedily. Text loss is measured
on another stretch of the text, without planted lines. Times are taken apart from both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

import patchattn
from patchattn.evaluation.answers import write
from patchattn.evaluation.documents import (
    Document,
    DocumentError,
    TokenizedText,
    check_longest,
    make_document,
    tokenize_text,
)
from patchattn.hf.weights import input_device
from patchattn.policy import Phase, Policy

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of all work that is behind, in [0, 1]."""

# Facts near the end would lie in the window, where every head sees them.
_DEPTH = (0.0, 0.9)
_TIMED_PREFILLS = 3
_WARM_DECODE_STEPS = 4
_TIMED_DECODE_STEPS = 32
# Logits of more positions than this would take more memory than the model.
_MOST_LOSS_TOKENS = 8192
_SHARE_OF_WORK = {"answering": 0.6, "reading plain text": 0.1, "timing": 0.3}


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
    work = _Work(progress or (lambda _, __: None))
    check_longest(model, length)
    lines = tokenize_text(text, tokenizer)
    check_length(model, lines, length)
    document = _document(lines, tokenizer, length, questions, seed)
    plain = _document(lines, tokenizer, length, 0, seed + 1)

    with patchattn.patch(model, policy, backend=backend):
        pass  # What can't be patched is refused before the dense run, not after it.
    dense = _measure(model, tokenizer, document, plain, work.named("dense"))
    tokens: list[int] = []
    with patchattn.patch(model, policy, backend=backend, record="timeline") as handle:
        answers, loss = _quality(model, tokenizer, document, plain, work.named("patched"), tokens)
    report = handle.report()
    with patchattn.patch(model, policy, backend=backend):
        seconds, speed = _times(model, document, work.named("patched"))
    both: tuple[Phase, ...] = ("prefill", "decode")
    phases: list[Phase] = [phase for phase in both if phase in handle.policy.phases]
    patched = Measured(
        right=answers,
        text_loss=loss,
        prefill_seconds=seconds,
        decode_tokens_per_second=speed,
        open_fraction={phase: report.open_fraction(phase) for phase in phases},
        realised_density={phase: report.realised_density(phase) for phase in phases},
    )
    first_question = document.questions[0].start
    return Comparison(
        dense=dense,
        patched=patched,
        policy=handle.policy,
        backend=handle.backend,
        length=length,
        prefill_tokens=first_question,
        nearest=first_question - max(end for _, end in document.planted),
        furthest=first_question - min(start for start, _ in document.planted),
        questions=questions,
        text_tokens=_loss_tokens(plain),
        report=report,
        tokens=tuple(tokens),
    )


def check_length(model: Any, text: TokenizedText, length: int) -> None:
    """Refuse a document that the model can't read or the text can't fill.

    Raises:
        DocumentError: See above.
    """
    check_longest(model, length)
    available = sum(map(len, text.tokens))
    if available < length:
        raise DocumentError(
            f"The text has {available:,} tokens and the document was to have {length:,}.",
            fix=f"Give a longer text, or choose a length of at most {available}.",
        )


def _document(text: TokenizedText, tokenizer: Any, length: int, questions: int, seed: int) -> Document:
    try:
        return make_document(text, tokenizer, length=length, kinds=("fact",) * questions, seed=seed, depth=_DEPTH)
    except ValueError as error:
        raise DocumentError(str(error), fix="Ask fewer questions or choose a greater length.") from error


class _Work:
    """Turns steps done into a fraction of all work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._column = "dense"

    def named(self, column: str) -> _Work:
        self._column = column
        return self

    def done(self, part: str, fraction: float) -> None:
        parts = list(_SHARE_OF_WORK)
        before = sum(_SHARE_OF_WORK[name] for name in parts[: parts.index(part)])
        column = 0.0 if self._column == "dense" else 0.5
        self._progress(f"{self._column}: {part}", column + 0.5 * (before + fraction * _SHARE_OF_WORK[part]))


def _measure(model: Any, tokenizer: Any, document: Document, plain: Document, work: _Work) -> Measured:
    right, loss = _quality(model, tokenizer, document, plain, work, [])
    seconds, speed = _times(model, document, work)
    return Measured(right, loss, seconds, speed, {}, {})


@torch.no_grad()
def _quality(
    model: Any, tokenizer: Any, document: Document, plain: Document, work: _Work, read: list[int]
) -> tuple[int, float]:
    """Count right answers and measure the text loss; the tokens the model reads are added to `read`."""
    right = 0
    ids = document.token_ids
    cache, given = None, list(ids[: document.questions[0].start])
    for index, question in enumerate(document.questions):
        given += ids[question.start : question.answer_start]
        answer = list(ids[question.answer_start : question.answer_end])
        written, cache = write(model, given, cache, len(answer))
        right += written == answer
        read += given + written[:-1]
        # What comes next in the conversation: the token that is not in the cache yet, and the line break.
        after = document.questions[index + 1].start if index + 1 < len(document.questions) else len(ids)
        given = written[-1:] + list(ids[question.answer_end : after])
        work.done("answering", (index + 1) / len(document.questions))
    loss = _text_loss(model, plain)
    read += plain.token_ids
    work.done("reading plain text", 1.0)
    return right, loss


def _loss_tokens(plain: Document) -> int:
    return min(len(plain.token_ids) - 1, _MOST_LOSS_TOKENS)


def _text_loss(model: Any, plain: Document) -> float:
    """Mean cross-entropy of the last tokens of a text, nats per token."""
    tokens = torch.tensor([plain.token_ids], device=input_device(model))
    count = _loss_tokens(plain)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    targets = tokens[0, -count:].to(logits.device)
    parts = zip(logits.split(1024), targets.split(1024), strict=True)
    return sum(functional.cross_entropy(x.float(), y, reduction="sum").item() for x, y in parts) / count


@torch.no_grad()
def _times(model: Any, document: Document, work: _Work) -> tuple[float, float]:
    """Time prefill (seconds) and decode (tokens per second) after one warm-up of each."""
    # Decoding must not run past the model's context.
    room = len(document.token_ids) - _WARM_DECODE_STEPS - _TIMED_DECODE_STEPS
    given = list(document.token_ids[: min(document.questions[0].start, room)])
    seconds = []
    cache, written = None, []
    for repeat in range(1 + _TIMED_PREFILLS):
        begin = _now(model)
        written, cache = write(model, given, None, 1)
        seconds.append(_now(model) - begin)
        work.done("timing", 0.7 * (repeat + 1) / (1 + _TIMED_PREFILLS))
    written, cache = write(model, written, cache, _WARM_DECODE_STEPS)
    begin = _now(model)
    write(model, written[-1:], cache, _TIMED_DECODE_STEPS)
    speed = _TIMED_DECODE_STEPS / (_now(model) - begin)
    work.done("timing", 1.0)
    return statistics.median(seconds[1:]), speed


def _now(model: Any) -> float:
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
