"""Count, mean and covariance of keys, and the softmax mass they predict.

With bulk keys distributed as N(mu, Sigma), a score `scale * q . k` has mean `m = scale * q . mu` and variance
`v = scale^2 * q^T Sigma q`. The log of the summed exponentials of `n` such scores has a closed form in (n, m, v).

Source: arXiv 2502.09647, section 3 (QAdA: log-normal mean of a Gaussian score); Derrida, Phys. Rev. Lett. 45, 79 (1980)
(random energy model: the sum freezes where the spread outgrows the number of terms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimate = Literal["guarded", "saturating", "lognormal"]

DEFAULT_ESTIMATE: Estimate = "lognormal"
"""Why: docs/decisions/0005-the-default-estimate.md."""

CHUNK = 128
"""Keys per chunk of the grid on which prompt moments are taken."""


def log_mass_of_gaussian(
    n: Tensor, mean: Tensor, variance: Tensor, *, softcap: float | None = None, estimate: Estimate = DEFAULT_ESTIMATE
) -> Tensor:
    """Predict the log of the summed exponentials of `n` Gaussian scores.

    Args:
        n: Number of scores; broadcasts against `mean`.
        mean: Mean of the scores, nats.
        variance: Variance of the scores; rounding below zero is taken as zero.
        softcap: Scores become `softcap * tanh(score / softcap)`; the moments are carried through to first order.
        estimate: `"lognormal"` is `log n + m + v / 2`. The others are the same up to the freezing point
            `v = 2 log n`, beyond which the largest term rules the sum: `"saturating"` is `m + sqrt(2 v log n)` there,
            what Gaussian scores would give; `"guarded"` is +inf, for a key that matches its query is further out
            than any Gaussian draw.

    Returns:
        Log mass in nats, dtype of `mean`; -inf where `n` is zero, NaN where the moments are not finite.
    """
    mass = log_mass_of_log_count(n.to(mean.dtype).log(), mean, variance, softcap, estimate)
    return torch.where(n > 0, mass, -torch.inf)


def log_mass_of_log_count(
    log_n: Tensor | float, mean: Tensor, variance: Tensor, softcap: float | None, estimate: Estimate
) -> Tensor:
    """Do the work of `log_mass_of_gaussian` where no `n` is zero."""
    variance = variance.clamp(min=0)
    if softcap is not None:
        squashed = torch.tanh(mean / softcap)
        mean, variance = softcap * squashed, variance * (1 - squashed.square()).square()
    mass = torch.add(mean + log_n, variance, alpha=0.5)
    if estimate == "lognormal":
        return mass
    freezing = 2 * log_n
    if estimate == "guarded":
        return mass.masked_fill(variance > freezing, torch.inf)
    return torch.where(variance > freezing, mean + (variance * freezing).sqrt(), mass)


@dataclass(frozen=True)
class KeyMoments:
    """Count, mean and covariance of a set of keys.

    Args:
        count: [...] number of keys.
        mean: [..., dim].
        covariance: [..., dim, dim], divided by the count (not by count - 1).
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, keys: Tensor, valid: Tensor | None = None) -> KeyMoments:
        """Measure the moments of keys.

        Args:
            keys: [..., keys, dim]; accumulated in float32, or in float64 if the keys are float64.
            valid: [..., keys] bool, broadcast against the keys; None means all.

        Returns:
            Moments over the key axis. A set without keys has count, mean and covariance zero.
        """
        x = keys.to(accumulator(keys))
        weight = torch.ones_like(x[..., 0]) if valid is None else valid.expand(x.shape[:-1]).to(x.dtype)
        x = torch.where(weight[..., None] > 0, x, 0)
        count = weight.sum(-1)
        divisor = count.clamp(min=1)
        mean = x.sum(-2) / divisor[..., None]
        centred = (x - mean[..., None, :]) * weight[..., None]
        return cls(count, mean, centred.mT @ centred / divisor[..., None, None])

    def merge(self, other: KeyMoments) -> KeyMoments:
        """Return the moments of the union of two disjoint sets of keys.

        Source: Chan, Golub & LeVeque (1979), parallel update of mean and sum of squares.
        """
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[..., None]
        delta = other.mean - self.mean
        between = (share * (1 - share))[..., None] * delta[..., :, None] * delta[..., None, :]
        covariance = self.covariance.lerp(other.covariance, share[..., None]) + between
        return KeyMoments(count, self.mean + share * delta, covariance)

    def log_mass(
        self,
        query: Tensor,
        n: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        estimate: Estimate = DEFAULT_ESTIMATE,
    ) -> Tensor:
        """Predict the log mass of `n` keys with these moments.

        Args:
            query: [..., query, dim].
            n: Number of keys, broadcast against [..., query].
            scale: Factor on the dot products.
            softcap: See `log_mass_of_gaussian`.
            estimate: See `log_mass_of_gaussian`.

        Returns:
            [..., query] nats.
        """
        q = query.to(self.mean.dtype) * scale
        mean = (q @ self.mean[..., None])[..., 0]
        variance = ((q @ self.covariance) * q).sum(-1)
        return log_mass_of_gaussian(n, mean, variance, softcap=softcap, estimate=estimate)


def accumulator(keys: Tensor) -> torch.dtype:
    """Return the dtype in which sums over keys are taken: float64 for float64 keys, float32 otherwise."""
    return torch.float64 if keys.dtype == torch.float64 else torch.float32
