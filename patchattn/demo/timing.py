"""Time to first token and tokens per second of several ways of computing attention, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from patchattn.evaluation.answers import write
from patchattn.hf.drafting import generate_plainly
from patchattn.hf.weights import input_device

FEWEST_ROUNDS = 2
_MOST_ROUNDS = 5
_ENOUGH_SECONDS = 10
# Drafts see in them what pays.
_WARM_STEPS = 8
_STEPS = 16


class Times(NamedTuple):
    """Times of one way of computing attention.

    Args:
        first_token_seconds: Seconds to read the document and write one token.
        tokens_per_second: Tokens per second when writing after that, one sequence at a time.
    """

    first_token_seconds: float
    tokens_per_second: float


def in_turn(
    model: Any,
    ways: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    tokens: Sequence[int],
    *,
    longest: int,
    done: Callable[[str], None],
) -> tuple[dict[str, Times], int]:
    """Time a model as it came and patched, in turn, for machines get faster and slower with time.

    Two rounds, and up to five while they are short. All have read the document once before, which is the warm-up.

    Args:
        model: A causal language model, not patched.
        ways: By name what patches it, until the context is left.
        tokens: Token ids to read.
        longest: Most tokens to read and write together, which is kept to by reading fewer.
        done: Called after each measurement, with what was measured.

    Returns:
        The best of all rounds for each way, and the number of rounds.
    """
    given = list(tokens[: longest - 1 - _WARM_STEPS - _STEPS])
    found: dict[str, list[Times]] = {name: [] for name in ways}
    begin, rounds = _now(model), 0
    while rounds < FEWEST_ROUNDS or (rounds < _MOST_ROUNDS and _now(model) - begin < _ENOUGH_SECONDS):
        for name, way in ways.items():
            with way():
                found[name].append(_time(model, given))
            done(name)
        rounds += 1
    best = {
        name: Times(min(each.first_token_seconds for each in times), max(each.tokens_per_second for each in times))
        for name, times in found.items()
    }
    return best, rounds


@torch.no_grad()
def _time(model: Any, given: Sequence[int]) -> Times:
    begin = _now(model)
    first, cache = write(model, given, None, 1)
    seconds, tokens = _now(model) - begin, [*given, *first]
    tokens += _go_on(model, tokens, cache, _WARM_STEPS)
    begin = _now(model)
    _go_on(model, tokens, cache, _STEPS)
    return Times(seconds, _STEPS / (_now(model) - begin))


def _go_on(model: Any, tokens: Sequence[int], cache: Any, count: int) -> list[int]:
    # With a first layer that is recurrent, caches of transformers 5.17 say that they are empty, and `generate` would
    # read the whole text once more on top of them.
    if int(cache.get_seq_length()) != len(tokens) - 1:
        return write(model, tokens[-1:], cache, count)[0]
    return generate_plainly(model, tokens, cache, count)


def _now(model: Any) -> float:
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
