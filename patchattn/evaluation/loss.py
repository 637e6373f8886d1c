"""Loss of a text by position: how well a model predicts tokens that have little or much text before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from patchattn.evaluation.samples import DocumentError
from patchattn.hf.architecture import cache_of, vocabulary_of, with_cache
from patchattn.hf.context import check_context
from patchattn.hf.weights import input_device

BINS = 8
"""Equal parts of a document whose loss is told apart."""

# Logits of one call, in numbers; as float32 they take a gibibyte.
_MOST_LOGITS = 2**28
_SHORTEST_CALL = 256
_ROWS_AT_A_TIME = 1024


@torch.no_grad()
def loss_by_position(model: Any, tokens: Sequence[int]) -> list[float]:
    """Read a document and return its mean loss in `BINS` equal parts, nats per token.

    Long documents are read in several calls on one cache, so that the logits fit into memory.

    Args:
        model: A causal language model, patched or not.
        tokens: Token ids, more than `BINS`; the first one is not predicted.

    Raises:
        DocumentError: The document is longer than the model's context.
    """
    check_context(model, [len(tokens)], DocumentError)
    ids = torch.tensor([list(tokens)], device=input_device(model))
    size = max(_MOST_LOGITS // vocabulary_of(model), _SHORTEST_CALL)
    losses, cache = [], None
    for begin in range(0, ids.shape[1], size):
        part = ids[:, begin : begin + size]
        result = model(input_ids=part, use_cache=True, **with_cache(model, cache))
        cache = cache_of(result)
        targets = ids[0, begin + 1 : begin + 1 + part.shape[1]].to(result.logits.device)
        pairs = zip(
            result.logits[0, : len(targets)].split(_ROWS_AT_A_TIME), targets.split(_ROWS_AT_A_TIME), strict=True
        )
        losses += [functional.cross_entropy(logits.float(), right, reduction="none") for logits, right in pairs]
    return [part.mean().item() for part in torch.cat(losses).tensor_split(BINS)]
