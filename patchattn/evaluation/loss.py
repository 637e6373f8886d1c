"""Loss of a text: how well a model predicts each token from those before it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from patchattn.evaluation.documents import check_longest
from patchattn.hf.architecture import cache_of, vocabulary_of, with_cache
from patchattn.hf.weights import input_device

BINS = 8
"""Equal parts of a document whose loss is told apart."""

# Logits of one call, in numbers; as float32 they take a gibibyte.
_MOST_LOGITS = 2**28
_SHORTEST_CALL = 256
_ROWS_AT_A_TIME = 1024


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, [tokens] float32 nats.

    Args:
        logits: [tokens, vocabulary], any dtype; taken to float32 some rows at a time.
        targets: [tokens] ids of the tokens that follow.
    """
    pairs = zip(logits.split(_ROWS_AT_A_TIME), targets.to(logits.device).split(_ROWS_AT_A_TIME), strict=True)
    return torch.cat([functional.cross_entropy(rows.float(), right, reduction="none") for rows, right in pairs])


def losses(model: Any, tokens: Sequence[int]) -> Tensor:
    """Read a document and return the loss of each token but the first, [tokens - 1] float32 nats.

    Args:
        model: A causal language model, patched or not.
        tokens: Token ids, at least 2.

    Raises:
        DocumentError: The document is longer than the model's context.
    """
    return losses_and_logits(model, tokens, ())[0]


@torch.no_grad()
def losses_and_logits(model: Any, tokens: Sequence[int], after: Collection[int]) -> tuple[Tensor, Tensor, Any]:
    """Read a document once for the loss of each token, for what is predicted after some, and into a cache.

    It is read in calls on one cache, so that the logits of a long one fit into memory.

    Args:
        model: A causal language model, patched or not.
        tokens: Token ids, at least 2.
        after: Positions of tokens, ascending.

    Returns:
        The loss of each token but the first, [tokens - 1] float32 nats, [after, vocabulary] logits, and the cache.

    Raises:
        DocumentError: The document is longer than the model's context.
    """
    check_longest(model, len(tokens))
    ids, targets = torch.tensor([list(tokens)], device=input_device(model)), torch.tensor(list(tokens[1:]))
    size = max(_MOST_LOGITS // vocabulary_of(model), _SHORTEST_CALL)
    found, kept, cache = [], [], None
    for begin in range(0, ids.shape[1], size):
        result = model(input_ids=ids[:, begin : begin + size], use_cache=True, **with_cache(model, cache))
        cache, logits = cache_of(result), result.logits[0]
        follow = targets[begin : begin + len(logits)]
        found.append(losses_of(logits[: len(follow)], follow))
        kept.append(logits[[at - begin for at in after if begin <= at < begin + len(logits)]])
    return torch.cat(found), torch.cat(kept), cache


def by_position(found: Tensor) -> list[float]:
    """Mean of a document's losses in `BINS` equal parts, nats per token.

    Args:
        found: The losses, at least `BINS`.
    """
    return [part.mean().item() for part in found.tensor_split(BINS)]
