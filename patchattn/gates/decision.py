"""Opening and closing: the one rule by which masses become decisions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs


def decide(
    local_log_mass: Tensor,
    bulk_log_mass: Tensor,
    asked: Tensor,
    margin: float | Tensor,
    whole_groups: int | None = None,
) -> Tensor:
    """Decide which pairs open.

    Args:
        local_log_mass: [batch, heads, query] nats, sink logits included.
        bulk_log_mass: [batch, heads, query] nats, exact or estimated.
        asked: [batch, query] bool; real queries with bulk keys.
        margin: Margin in nats from which a gate closes.
        whole_groups: Number of KV heads, where the query heads of each open together, see `with_groups`; None decides
            each on its own.

    Returns:
        [batch, heads, query] bool; True means open. A margin that is not finite opens, except where the bulk log mass
        is -inf, which closes for certain.
    """
    # A local mass that is not finite says nothing about the bulk keys: only a bulk mass of -inf is closed then.
    # Written so that NaN opens.
    most = local_log_mass.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf) - margin
    opened = asked[:, None] & ~(bulk_log_mass <= most)
    if whole_groups is None:
        return opened
    return with_groups(*(x.unflatten(1, (whole_groups, -1)) for x in (opened, bulk_log_mass)), axis=2).flatten(1, 2)


def with_groups(opened: Tensor, bulk_log_mass: Tensor, axis: int) -> Tensor:
    """Open the heads beside an open one, whose keys are read anyway, but for those that are closed for certain.

    Args:
        opened: [..., group, ...] bool; decisions of the query heads of a KV group.
        bulk_log_mass: The same shape, nats.
        axis: That of the group.
    """
    return opened | (opened.any(axis, keepdim=True) & (bulk_log_mass != -torch.inf))


def is_open(local_log_mass: float, bulk_log_mass: float, margin: float) -> bool:
    """Decide one pair that is asked, as `decide` does."""
    closed = local_log_mass != math.inf and bulk_log_mass <= local_log_mass - margin
    return not (closed or bulk_log_mass == -math.inf)


def forced(open_pairs: Tensor, inputs: AttentionInputs) -> Tensor:
    """Turn decisions made beforehand into a bulk log mass, +inf where open and -inf where closed.

    Args:
        open_pairs: Bool, broadcast against [batch, heads, query]; for instance the recorded decisions of another run.
        inputs: The attention call, for its sizes and dtype.

    Returns:
        [batch, heads, query] nats.
    """
    inf = torch.full((), torch.inf, dtype=inputs.compute_dtype, device=open_pairs.device)
    return torch.where(open_pairs.expand(inputs.query.shape[:3]), inf, -inf)


def all_open(inputs: AttentionInputs) -> Tensor:
    """Return the bulk log mass that opens every gate, [batch, heads, query] nats."""
    return torch.full(inputs.query.shape[:3], torch.inf, dtype=inputs.compute_dtype, device=inputs.query.device)
