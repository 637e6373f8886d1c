"""What a gate should have decided, computed again in float64 and from nothing but the call's own keys."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates.base import Known
from patchattn.policy import Policy
from patchattn.testing.dense import DenseCall

_FREEZING = 1e-3
"""Share of the scale within which the guarded estimate may stand on either side of its freezing point."""


def wrong_decisions(
    policy: Policy,
    layer: int,
    inputs: AttentionInputs,
    regions: Regions,
    opened: Tensor,
    truth: DenseCall,
    plain: DenseCall,
) -> tuple[Tensor, Tensor, float] | None:
    """Find the pairs whose decision differs from float64 by more than rounding explains.

    A decision may differ where the float64 margin lies within twice the plain computation's error of the threshold,
    and, for the guarded estimate, within 0.1% of the freezing point. Where groups open as a whole, so they do here.
    Moments are taken from all keys at once: what a cache has kept from earlier calls plays no part.

    Args:
        policy: The policy, `min_bulk` resolved.
        layer: Index of the layer.
        inputs: The attention call.
        regions: Its regions, known independently of the call.
        opened: [batch, heads, query] bool; what was decided.
        truth: Dense attention in float64.
        plain: Dense attention in the dtype in which the library computes log masses.

    Returns:
        [batch, heads, query] bool, True where the decision is wrong; the float64 margins in nats, same shape; and the
        error allowed on a margin. None for gates that can't be computed from the call alone.
    """
    gate = policy.gate
    if gate.needs_calibration:
        return None

    def weighed(factor: float, dtype: torch.dtype) -> Tensor:
        tensors = {name: getattr(inputs, name).to(dtype) for name in ("query", "key", "value")}
        call = replace(inputs, **tensors, regions=regions, scale=inputs.scale * factor)
        return gate.weigh(call, Known(layer))[0]

    # From the definition: a proof that asks the gate for its margin believes whatever it says.
    share = getattr(gate, "threshold", 0.5)
    threshold = math.log(share / (1 - share))
    masses = [weighed(factor, torch.float64) for factor in (1.0, 1 - _FREEZING, 1 + _FREEZING)]
    margin = truth.local_log_mass - masses[0]
    rounded = plain.local_log_mass.double() - weighed(1.0, inputs.query.dtype).double()
    both = margin.isfinite() & rounded.isfinite() & regions.asked[:, None]
    tolerance = 0.0
    if both.any():
        size = torch.maximum(truth.local_log_mass.abs(), masses[0].abs())[both].max().item()
        error = (margin - rounded)[both].abs().max().item()
        tolerance = 2 * (error + torch.finfo(plain.output.dtype).eps * size)
    should_open = regions.asked[:, None] & ~(margin >= threshold)
    unsure = (margin - threshold).abs() <= tolerance
    for mass in masses[1:]:
        unsure |= mass.isfinite() != masses[0].isfinite()
    least, most = should_open & ~unsure, should_open | unsure
    if policy.whole_groups and inputs.query.shape[2] == 1:
        kv_heads = inputs.key.shape[1]
        least, most = (_with_their_groups(pairs, masses[0], kv_heads) for pairs in (least, most))
    return (least & ~opened) | (opened & ~most), margin, tolerance


def _with_their_groups(opened: Tensor, mass: Tensor, kv_heads: int) -> Tensor:
    """Open, beside the open heads of a group, those that are not closed for certain."""
    group = opened.shape[1] // kv_heads
    any_open = opened.view(len(opened), kv_heads, group).any(2).repeat_interleave(group, 1)[..., None]
    return opened | (any_open & ~mass.isneginf())
