"""Key moments as a calibration stores them: covariances as triangular factors in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.calibration.files import damaged
from patchattn.moments.text import RotaryMoments

_SPREAD_OF_ROUNDING = 2e-3


def pack_covariance(covariance: Tensor) -> tuple[Tensor, Tensor, float]:
    """Store covariances as deviations and the triangular factor of the correlations, in half precision.

    A product of a factor with itself can't lose positive semi-definiteness to rounding.

    Args:
        covariance: [..., dim, dim] float64.

    Returns:
        Deviations [..., dim] float32, factors [..., dim * (dim + 1) / 2] float16 by rows, and the largest relative
        error (Frobenius norm) of what `unpack_covariance` gives back.

    Raises:
        CalibrationFormatError: A covariance that is not finite, symmetric and positive semi-definite.
    """
    covariance = covariance.double()
    if not covariance.isfinite().all():
        raise damaged("a covariance has NaN or Inf")
    scale = covariance.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None].clamp(min=1e-30)
    if ((covariance - covariance.mT).abs() > 1e-6 * scale).any():
        raise damaged("a covariance is not symmetric")
    if (torch.linalg.eigvalsh(covariance / scale).amin(-1) < -1e-6).any():
        raise damaged("a covariance is not positive semi-definite")
    deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(deviation > 0, 1 / deviation.clamp(min=1e-150), 0)
    correlation = covariance * inverse[..., :, None] * inverse[..., None, :]
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    # A root that is not triangular, made triangular: exact for singular matrices too, where Cholesky fails.
    root = vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]
    factor = torch.linalg.qr(root.mT).R.mT
    factor = factor * torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
    rows, columns = torch.tril_indices(covariance.shape[-1], covariance.shape[-1])
    packed, kept = factor[..., rows, columns].half(), deviation.float()
    back = unpack_covariance(kept, packed).double()
    size = covariance.flatten(-2).norm(dim=-1)
    error = (back - covariance).flatten(-2).norm(dim=-1) / size.clamp(min=1e-30)
    return kept, packed, float(torch.where(size > 0, error, 0).max())


def unpack_covariance(deviation: Tensor, factor: Tensor) -> Tensor:
    """Return covariances [..., dim, dim] float32 from what `pack_covariance` stored."""
    dim = deviation.shape[-1]
    rows, columns = torch.tril_indices(dim, dim)
    triangle = torch.zeros(*deviation.shape, dim)
    triangle[..., rows, columns] = factor.float()
    triangle = triangle * deviation[..., None]
    return triangle @ triangle.mT


def unpack_moments(tensors: dict[str, Tensor], at: int, order: list[int]) -> RotaryMoments:
    """Return the key moments of the layer at an index of the tensors; `order` as `Rotary.order` gives it."""
    covariance = unpack_covariance(tensors["key_deviation"][at], tensors["key_factor"][at])
    same = order == sorted(order)
    turning = None if same else torch.tensor(order)
    return RotaryMoments(tensors["key_mean"][at], covariance, tensors["key_frequencies"][at], turning)


def check_factors(deviation: Tensor, factor: Tensor, dim: int) -> None:
    """A factor of a correlation matrix has rows of length one, or zero where the key never varies."""
    if (deviation < 0).any():
        raise damaged("key_deviation is negative")
    rows, _ = torch.tril_indices(dim, dim)
    lengths = torch.zeros(*factor.shape[:-1], dim).index_add_(-1, rows, factor.float().square())
    if (torch.where(deviation > 0, lengths - 1, 0).abs() > _SPREAD_OF_ROUNDING).any():
        raise damaged("key_factor is not the factor of a correlation matrix, so the covariance would not be right")
