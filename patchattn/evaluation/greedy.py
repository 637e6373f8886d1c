"""Write with a model, the most likely token each time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

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
    written: list[int] = []
    for _ in range(count):
        result = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **with_cache(model, cache))
        cache = cache_of(result)
        tokens = result.logits[:, -1].argmax(-1, keepdim=True)
        written.append(int(tokens))
        if written[-1] in stop:
            break
    return written, cache


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, as the model and its tokenizer name them."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return found
