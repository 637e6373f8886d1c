"""Intervals: of shares, and of what is measured on documents."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with its 95% interval.

    Args:
        value: The estimate.
        low: 2.5% point.
        high: 97.5% point.
    """

    value: float
    low: float
    high: float


def wilson_interval(right: float, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share, 95% unless `z` says otherwise."""
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return centre - half, centre + half


def share(right: float, asked: int) -> Interval:
    """Share of right answers with its Wilson interval."""
    return Interval(right / asked, *wilson_interval(right, asked))


def bootstrap(documents: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> Interval:
    """Resample documents with replacement.

    Args:
        documents: [documents, ...] one entry for each document.
        statistic: From weights that sum to 1, [..., documents], to numbers, [...].
        seed: Of the resampling.

    Returns:
        The statistic of all documents, with percentiles of the resampled ones.
    """
    n = len(documents)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    low, high = np.nanpercentile(statistic(draws), (2.5, 97.5))
    return Interval(float(statistic(np.full(n, 1 / n))), float(low), float(high))


def ratio_of_sums(top: Sequence[float], bottom: Sequence[float]) -> Interval:
    """Bootstrap sum(top) / sum(bottom) over documents."""
    pairs = np.stack([np.asarray(top, float), np.asarray(bottom, float)], axis=1)
    return bootstrap(pairs, lambda weights: (weights @ pairs[:, 0]) / (weights @ pairs[:, 1]))


def mean_of_means(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Mean over groups of their means; bootstrap within each group."""
    random_state = np.random.default_rng(seed)
    arrays = [np.asarray(group, float) for group in groups]
    means = [random_state.choice(array, (_RESAMPLES, len(array))).mean(axis=1) for array in arrays]
    low, high = np.percentile(np.mean(means, axis=0), (2.5, 97.5))
    return Interval(float(np.mean([array.mean() for array in arrays])), float(low), float(high))


def relative_change(losses: Sequence[float], dense: Sequence[float]) -> Interval:
    """Relative change of a loss against dense attention's on the same documents, which are drawn one by one."""
    chosen, every = random.Random(0), range(len(dense))

    def change(documents: Sequence[int]) -> float:
        return sum(losses[at] for at in documents) / sum(dense[at] for at in documents) - 1

    found = sorted(change(chosen.choices(every, k=len(every))) for _ in range(_RESAMPLES))
    return Interval(change(every), found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES)])
