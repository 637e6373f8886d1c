"""Trying a backend on a small problem before a model is given to it."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends import BackendName, load
from patchattn.backends.backend import Attend
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.errors import BackendError
from patchattn.gates.decision import forced


def self_check(
    name: BackendName,
    *,
    dtype: torch.dtype,
    head_dim: int,
    group_size: int,
    device: torch.device,
    value_dim: int | None = None,
    softcap: float | None = None,
    sink_logits: bool = False,
) -> float:
    """Compare a backend with the reference on a small mixed problem, prefill and decode.

    Args:
        name: The backend.
        dtype: The model's dtype.
        head_dim: Dimension of queries and keys.
        group_size: Query heads per KV head.
        device: Where the model runs.
        value_dim: Dimension of values; None means `head_dim`.
        softcap: The model's softcap.
        sink_logits: Whether the model has learned sink logits.

    Returns:
        The largest error as a share of the error budget; at most 1.

    Raises:
        BackendError: The backend does not run here or disagrees with the reference.
    """
    if name == "reference":
        return 0.0
    worst = 0.0
    try:
        attend = load(name).attend
        for query_length in (300, 1):
            problem = _problem(
                query_length, head_dim, value_dim or head_dim, group_size, softcap, device, sink_logits=sink_logits
            )
            worst = max(worst, _error_share(attend, problem, dtype))
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(
            f"The backend {name!r} does not run here with {dtype}, head_dim {head_dim} and group size {group_size}: "
            f"{type(error).__name__}: {error}",
            fix='choose another backend, for instance backend="blockwise"',
        ) from error
    if not worst <= 1.0:
        raise BackendError(
            f"The backend {name!r} disagrees with the reference for {dtype}, head_dim {head_dim} and group size "
            f"{group_size} on {device}: its error is {worst:.3g} times the error budget.",
            fix='choose another backend, for instance backend="blockwise", and report the versions of torch and GPU',
        )
    return worst


def _problem(
    query_length: int,
    head_dim: int,
    value_dim: int,
    group_size: int,
    softcap: float | None,
    device: torch.device,
    *,
    sink_logits: bool,
) -> tuple[AttentionInputs, Tensor]:
    """Make a mixed problem in float64: two sequences, one padded, about a third of the pairs open."""
    generator = torch.Generator().manual_seed(0)
    batch, kv_heads, keys = 2, 2, 300
    heads = kv_heads * group_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    valid = torch.ones(batch, keys, dtype=torch.bool, device=device)
    valid[1, :37] = False
    regions = Regions.of(valid, query_length=query_length, sink_size=4, window_size=32)
    inputs = AttentionInputs(
        normal(batch, heads, query_length, head_dim),
        normal(batch, kv_heads, keys, head_dim),
        normal(batch, kv_heads, keys, value_dim),
        regions,
        head_dim**-0.5,
        softcap,
        normal(heads) if sink_logits else None,
    )
    opened = normal(batch, heads, query_length) > 0.4
    # Decode has few pairs: make sure that some are open and some are closed.
    opened[0, 0], opened[0, -1] = True, False
    return inputs, opened


def _error_share(attend: Attend, problem: tuple[AttentionInputs, Tensor], dtype: torch.dtype) -> float:
    exact, opened = problem
    rounded = AttentionInputs(
        exact.query.to(dtype),
        exact.key.to(dtype),
        exact.value.to(dtype),
        exact.regions,
        exact.scale,
        exact.softcap,
        None if exact.sink_logits is None else exact.sink_logits.to(dtype),
    )
    reference = load("reference").attend
    with torch.no_grad():
        truth = reference(exact, forced(opened, exact), 0.0).output
        plain = reference(rounded, forced(opened, rounded), 0.0).output.double()
        got = attend(rounded, forced(opened, rounded), 0.0).output.double()
    # The truth is itself a float64 sum over the keys, so it is known to that many roundings only.
    of_truth = exact.regions.key_length * torch.finfo(torch.float64).eps
    budget = 2 * ((plain - truth).abs().max() + (torch.finfo(dtype).eps + of_truth) * truth.abs().max())
    share = ((got - truth).abs().max() / budget).item()
    return share if share == share else float("inf")
