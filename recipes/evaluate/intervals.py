"""Summaries of rows with intervals: bootstrap over documents, paired with dense attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Args:
        value: The estimate.
        low: 2.5% point.
        high: 97.5% point.
    """

    value: float
    low: float
    high: float


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
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
    low, high = np.nanpercentile(statistic(draws), (2.5, 97.5))
    return Interval(float(statistic(np.full(n, 1 / n))), float(low), float(high))


def ratio_of_sums(top: Sequence[float], bottom: Sequence[float]) -> Interval:
    """Bootstrap sum(top) / sum(bottom) over documents."""
    pairs = np.stack([np.asarray(top, float), np.asarray(bottom, float)], axis=1)
    return bootstrap(pairs, lambda weights: (weights @ pairs[:, 0]) / (weights @ pairs[:, 1]))


def mean_over_log(x: np.ndarray, y: np.ndarray, low: float, high: float) -> np.ndarray:
    """Average curves over the logarithm of `x` between two limits: the area under them over the width.

    Args:
        x: [points] ascending and positive.
        y: [..., points].
        low: Lower limit, inside the range of `x`.
        high: Upper limit, inside the range of `x`.

    Returns:
        [...]; straight lines in log x between points.
    """
    inside = (x > low) & (x < high)
    at = np.concatenate([[low], x[inside], [high]])
    weights = np.stack([np.interp(np.log(at), np.log(x), unit) for unit in np.eye(len(x))], axis=-1)
    steps = np.diff(np.log(at))
    trapezium = ((weights[1:] + weights[:-1]) / 2 * steps[:, None]).sum(0) / steps.sum()
    return np.asarray(y) @ trapezium
