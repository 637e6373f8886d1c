"""How a model answers: written greedily, or judged token by token with the true tokens before each."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchattn.evaluation.documents import Document
from patchattn.evaluation.loss import losses_of
from patchattn.evaluation.sample import Sample
from patchattn.hf.architecture import cache_of, with_cache
from patchattn.hf.drafting import generate_plainly
from patchattn.hf.weights import input_device


@torch.no_grad()
def write(
    model: Any, given: Sequence[int], cache: Any, count: int, *, stop: Collection[int] = ()
) -> tuple[list[int], Any]:
    """Write greedily after the given tokens.

    Unlike `model.generate`, it takes nothing from the model's generation settings, such as a penalty on repetition.

    Args:
        model: A causal language model, patched or not.
        given: Tokens to read first, after those in the cache.
        cache: A cache of transformers, or None for a new one.
        count: Most tokens to write; at least 1.
        stop: Token ids after which to stop.

    Returns:
        What was written, and the cache, which lacks the last token of it.
    """
    found: list[int] = []
    for _ in range(count):
        logits, cache = step(model, given, cache)
        found.append(int(logits.argmax(-1)))
        given = found[-1:]
        if found[-1] in stop:
            break
    return found, cache


@torch.no_grad()
def step(model: Any, given: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
    """Read tokens after those in the cache, None for a new one; returns what is predicted next and the cache.

    The predictions are [1, vocabulary] logits.
    """
    tokens = torch.tensor([list(given)], device=input_device(model))
    result = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **with_cache(model, cache))
    return result.logits[:, -1], cache_of(result)


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, as the model and its tokenizer name them."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return found


class Answered(NamedTuple):
    """How a model answers a question.

    Args:
        score: The score of what was written, 0 to 1.
        predicted: What the model predicts for each token of the right answer, given the true ones before it: [target,
            vocabulary] logits.
        written: What was written.
    """

    score: float
    predicted: Tensor
    written: list[int]


@torch.no_grad()
def answered(model: Any, tokenizer: Any, sample: Sample, *, drafts: bool = False) -> Answered:
    """Have a model write after a prompt, then read the right answer there token by token; the prompt is read once.

    Args:
        model: A causal language model, patched or not.
        tokenizer: Its tokenizer.
        sample: The prompt; writing stops at its budget or the end of a text.
        drafts: Write with the model's own `generate`, in which it drafts.
    """
    logits, cache = step(model, sample.prompt, None)
    first, predicted = int(logits.argmax(-1)), [logits]
    # A copy, because not every cache can take back what was written to it.
    forced = copy.deepcopy(cache)
    for token in sample.target[:-1]:
        logits, forced = step(model, [token], forced)
        predicted.append(logits)
    del forced
    found, stop = [first], stop_tokens(model, tokenizer)
    if sample.budget > 1 and first not in stop:
        if drafts:
            found += generate_plainly(model, [*sample.prompt, first], cache, sample.budget - 1, stop=stop)
        else:
            found += write(model, found, cache, sample.budget - 1, stop=stop)[0]
    return Answered(sample.score(found, tokenizer), torch.cat(predicted), found)


@dataclass(frozen=True)
class Scores:
    """Scores of a model over some documents.

    Args:
        right: Questions by kind of which every answer token was the most likely one, given the true tokens before it.
        asked: Questions by kind.
        text_loss: Mean loss of the tokens that are neither planted nor part of a question, nats per token.
    """

    right: dict[str, int]
    asked: dict[str, int]
    text_loss: float

    def exact_match(self, *kinds: str) -> float:
        """Share of the questions of some kinds, or of all, that were answered exactly."""
        chosen = kinds or tuple(self.asked)
        return sum(self.right.get(kind, 0) for kind in chosen) / sum(self.asked.get(kind, 0) for kind in chosen)


@torch.no_grad()
def teacher_forced(model: Any, documents: Iterable[Document]) -> Scores:
    """Read each document in one forward pass and score it.

    Args:
        model: A causal language model, patched or not.
        documents: Documents made with the model's tokenizer.

    Returns:
        The scores over all documents.
    """
    right, asked = Counter[str](), Counter[str]()
    loss, n_text = 0.0, 0
    for document in documents:
        tokens = torch.tensor(document.token_ids, device=input_device(model))
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        hit = logits.argmax(-1) == tokens[1:]
        plain = torch.ones_like(hit)
        for question in document.questions:
            right[question.kind] += bool(hit[question.answer_start - 1 : question.answer_end - 1].all())
            asked[question.kind] += 1
            plain[question.start - 1 : question.answer_end - 1] = False
        for start, end in document.planted:
            plain[start - 1 : end - 1] = False
        loss += losses_of(logits[plain], tokens[1:][plain]).sum().item()
        n_text += int(plain.sum())
    return Scores(dict(right), dict(asked), loss / n_text)
