"""Score a model on documents with planted questions: exact matches by kind of task, and loss of the plain text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from patchattn.evaluation.loss import losses_of
from patchattn.evaluation.statistics import wilson_interval  # noqa: F401 - for those who look for it here
from patchattn.evaluation.tasks import Document
from patchattn.hf.weights import input_device


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
def score(model: Any, documents: Iterable[Document]) -> Scores:
    """Read each document in one forward pass and score it.

    Args:
        model: A causal language model, patched or not.
        documents: Documents made with the model's tokenizer.

    Returns:
        The scores over all documents.
    """
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    loss, n_text = 0.0, 0
    for document in documents:
        tokens = torch.tensor(document.token_ids, device=input_device(model))
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        hit = logits.argmax(-1) == tokens[1:]
        plain = torch.ones_like(hit)
        for question in document.questions:
            answered = bool(hit[question.answer_start - 1 : question.answer_end - 1].all())
            right[question.kind] = right.get(question.kind, 0) + answered
            asked[question.kind] = asked.get(question.kind, 0) + 1
            plain[question.start - 1 : question.answer_end - 1] = False
        for start, end in document.planted:
            plain[start - 1 : end - 1] = False
        loss += losses_of(logits[plain], tokens[1:][plain]).sum().item()
        n_text += int(plain.sum())
    return Scores(right, asked, loss / n_text)
