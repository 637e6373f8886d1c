"""How a model answers: written greedily, or judged token by token with the true tokens before each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchattn.evaluation.documents import Document
from patchattn.evaluation.loss import losses_of
from patchattn.evaluation.sample import Sample
from patchattn.hf.architecture import cache_of, with_cache
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
    tokens = torch.tensor([list(given)], device=input_device(model))
    found: list[int] = []
    for _ in range(count):
        result = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **with_cache(model, cache))
        cache = cache_of(result)
        tokens = result.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(tokens))
        if found[-1] in stop:
            break
    return found, cache


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, as the model and its tokenizer name them."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return found


def written(model: Any, tokenizer: Any, sample: Sample) -> float:
    """Have a model write after a prompt, up to its budget or the end of a text, and score it, 0 to 1."""
    found, _ = write(model, sample.prompt, None, sample.budget, stop=stop_tokens(model, tokenizer))
    return sample.score(found, tokenizer)


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
