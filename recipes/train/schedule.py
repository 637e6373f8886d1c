"""What to train on, and how fast to learn, as functions of progress from 0 to 1."""

from __future__ import annotations

import math

from batches import Mix

# From this progress on, train on this mix.
_STAGES = (
    (0.00, Mix(length=128, repeated=0.5, text=0.15, task_fill=0.7, jumps=0.0)),
    (0.10, Mix(length=256, repeated=0.3, text=0.2, task_fill=0.6, jumps=0.2)),
    (0.20, Mix(length=512, repeated=0.1, text=0.25, task_fill=0.6, jumps=0.5)),
    (0.42, Mix(length=1024, repeated=0.0, text=0.3, task_fill=0.5, jumps=0.5)),
    (0.62, Mix(length=2048, repeated=0.0, text=0.3, task_fill=0.4, jumps=0.5)),
    (0.74, Mix(length=4096, repeated=0.0, text=0.12, task_fill=0.65, jumps=0.0)),
)
_PEAK_RATE = 3e-3
_LAST_RATE = 1e-4
_WARM_UP_STEPS = 150


def mix_at(progress: float) -> Mix:
    """Return what to train on."""
    return [mix for start, mix in _STAGES if start <= progress][-1]


def learning_rate_at(progress: float, step: int) -> float:
    """Return the learning rate: a linear rise, then half a cosine, and at last a straight line.

    The line keeps the rate of the last, longest rows from being too small to learn from.
    """
    progress = min(progress, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    rate = _PEAK_RATE * max(cosine, 1 - progress) if progress > 0.5 else _PEAK_RATE * cosine
    return max(_LAST_RATE, rate) * min(1.0, (step + 1) / _WARM_UP_STEPS)
