"""The error budget: how far two ways of computing the same may differ."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(got: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """Compare with a float64 truth, allowing twice the error of the plain computation in the same dtype.

    The budget is `2 * (err_of_plain + eps * max|truth|)`, with eps that of `got`'s dtype.

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
    plain_error = (plain.double() - truth.double()).abs().max().item()
    budget = 2 * (plain_error + torch.finfo(got.dtype).eps * truth.abs().max().item())
    if error > budget:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain {plain_error:.3e})")
