"""Seconds to read a text, and tokens per second to write after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from patchattn.evaluation.answers import write
from patchattn.hf.weights import input_device

_PREFILLS = 3
_WARM_STEPS = 4
_STEPS = 32

TIMED = 1 + _PREFILLS + 1
"""How often `times` says that something is done."""


def times(model: Any, tokens: Sequence[int], *, longest: int, done: Callable[[], None]) -> tuple[float, float]:
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
