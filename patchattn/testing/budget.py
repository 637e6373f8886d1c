"""The error budget: how far two ways of computing the same may differ."""

from __future__ import annotations

import torch
from torch import Tensor


def error_budget(plain: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Return the largest error allowed: `2 * (err_of_plain + eps * max|truth|)`, with eps that of `dtype`.

    Args:
        plain: The plain computation, in `dtype`.
        truth: The reference, in a wider dtype.
        dtype: dtype of what is tested.
    """
    plain_error = (plain.double() - truth.double()).abs().max().item()
    return 2 * (plain_error + torch.finfo(dtype).eps * truth.double().abs().max().item())


def assert_within_budget(got: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """Compare with a float64 truth, allowing twice the error of the plain computation in the same dtype.

    The budget is that of `error_budget`, with the dtype of `got`.

    Args:
        got: What is tested.
        plain: The plain computation in the same dtype.
        truth: The float64 reference.
        what: Name for the message.

    Raises:
        AssertionError: Not finite, or beyond the budget.
    """
    if not torch.isfinite(got).all():
        raise AssertionError(f"{what} is not finite")
    error = (got.double() - truth.double()).abs().max().item()
    budget = error_budget(plain, truth, got.dtype)
    if not error <= budget:
        plain_error = (plain.double() - truth.double()).abs().max().item()
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain {plain_error:.3e})")
