"""Where a drafted text is another than the dense one: whether dense attention itself was stable there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchattn.evaluation.answers import step
from patchattn.hf.architecture import with_cache

DRAFT = 4
"""Tokens of each draft where texts are compared: always so many, so that what is found depends on no clock."""


@torch.no_grad()
def is_level(model: Any, tokens: Sequence[int], cache: Any, dense: Sequence[int], drafted: Sequence[int]) -> bool:
    """Say whether a drafted text differs first where dense attention itself is not stable; see `gaps_and_moves`.

    Args:
        model: The dense model, or a drafting one, in which all calls but drafts are dense.
        tokens: The whole text that both follow.
        cache: The dense cache of some first tokens of it, not of the last; None to read it. It is not changed.
        dense: What dense attention writes after the text.
        drafted: What was written with drafts; another text.
    """
    pairs = enumerate(zip(dense, drafted, strict=False))
    at = next((at for at, (one, other) in pairs if one != other), None)
    if at is None:
        return False
    cache = copy.deepcopy(cache)
    new = list(tokens[int(cache.get_seq_length()) if cache is not None else 0 :])
    if len(new) > 1:
        _, cache = step(model, new[:-1], cache)
    read, rows = copy.deepcopy(cache), []
    for token in (new[-1], *dense[:-1]):
        logits, cache = step(model, [token], cache)
        rows.append(logits)
    last, text = (torch.tensor(ids, device=rows[0].device) for ids in ([new[-1:]], list(dense)))
    gaps, moves = gaps_and_moves(model, read, last, text, torch.cat(rows), DRAFT + 1)
    return bool(gaps[at] <= moves.max())


def gaps_and_moves(
    model: Any, read: Any, last: Tensor, text: Tensor, one_by_one: Tensor, queries: int
) -> tuple[Tensor, Tensor]:
    """Say how far apart the two best tokens are, and by how much that changes when queries are batched.

    Rounding differs between a call over one token and one over several. Where the gap between the two best logits is no
    larger than what that moves such gaps by, dense attention itself may write either token. A gap moves by one step of
    the numbers that logits are kept in at least: in bfloat16 logits from 16 to 32 are 0.125 apart.

    Args:
        model: The dense model.
        read: The cache of all tokens before `last`; it is written to.
        last: The last token of the prompt, [1, 1].
        text: The new tokens, [new].
        one_by_one: What dense attention predicts for each, reading one token at a time; [new, vocabulary] logits.
        queries: Tokens to read at a time.

    Returns:
        The gap of each new token and by how much it moves, logits; [new] float32 each.
    """
    given = torch.cat([last, text[None, :-1]], 1)
    parts = [model(part, **with_cache(model, read), use_cache=True).logits[0] for part in given.split(queries, 1)]
    best = one_by_one.topk(2).indices
    one, several = (found.float().gather(1, best) for found in (one_by_one, torch.cat(parts)))
    gaps = one[:, 0] - one[:, 1]
    step_of_numbers = torch.finfo(parts[0].dtype).eps * 2.0 ** several[:, 0].abs().log2().floor()
    return gaps, (gaps - several[:, 0] + several[:, 1]).abs().clamp(min=step_of_numbers)
