"""The head gate: for each (batch row, query head, query), does this head need the bulk keys?

Every kind of gate is expressed as a log mass of the bulk keys: exact (oracle), estimated (moments), or +inf / -inf for
decisions made beforehand. A gate closes where `local_log_mass - bulk_log_mass` reaches the margin threshold, and opens
where that can't be said - also where the comparison is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchattn.inputs import AttentionInputs
from patchattn.moments import PromptMoments, bulk_log_mass_from_prompt
from patchattn.policy import ClosedGate, Gate, MomentGate, OpenGate, OracleGate, Policy, StaticGate

_ROWS_PER_SLAB = 256


def margin_threshold(gate: Gate) -> float:
    """Margin in nats from which a gate closes: the logit of its threshold; 0 for gates without one."""
    if isinstance(gate, MomentGate | OracleGate):
        return math.log(gate.threshold) - math.log1p(-gate.threshold)
    return 0.0


def decide(local_log_mass: Tensor, bulk_log_mass: Tensor, asked: Tensor, threshold: float | Tensor) -> Tensor:
    """Decide which pairs open.

    Args:
        local_log_mass: [batch, heads, query] nats, sink logits included.
        bulk_log_mass: [batch, heads, query] nats, exact or estimated.
        asked: [batch, query] bool; real queries with bulk keys.
        threshold: Margin in nats from which a gate closes.

    Returns:
        [batch, heads, query] bool; True means open. NaN opens.
    """
    return asked[:, None] & ~(local_log_mass - bulk_log_mass >= threshold)


def bulk_log_mass(
    policy: Policy,
    layer: int,
    inputs: AttentionInputs,
    state: PromptMoments | None = None,
    *,
    max_chunks: int | None = None,
) -> tuple[Tensor, PromptMoments | None]:
    """Find the bulk log mass that a policy's gate compares with the exact local log mass.

    Args:
        policy: The policy, `min_bulk` resolved.
        layer: Index of the layer, for static gates.
        inputs: The attention call.
        state: Running prompt moments of the cache; None if there are none yet.
        max_chunks: See `bulk_log_mass_from_prompt`.

    Returns:
        [batch, heads, query] nats, and the prompt moments after this call (the given state for gates without any).
        Queries below break-even get +inf: they open without being asked.
    """
    gate, regions = policy.gate, inputs.regions
    match gate:
        case MomentGate():
            mass, state = bulk_log_mass_from_prompt(
                inputs.query,
                inputs.key,
                regions,
                state,
                scale=inputs.scale,
                softcap=inputs.softcap,
                estimate=gate.estimate,
                max_chunks=max_chunks,
            )
        case OracleGate():
            mass = exact_bulk_log_mass(inputs)
        case OpenGate() | ClosedGate() | StaticGate():
            mass = forced(_statically_open(gate, layer, inputs)[None, :, None].expand(inputs.query.shape[:3]), inputs)
    if policy.break_even:
        mass = torch.where((regions.n_bulk < policy.break_even)[:, None], torch.inf, mass)
    return mass, state


def forced(open_pairs: Tensor, inputs: AttentionInputs) -> Tensor:
    """Turn decisions made beforehand into a bulk log mass, +inf where open and -inf where closed.

    Args:
        open_pairs: [batch, heads, query] bool, for instance the recorded decisions of another run.
        inputs: The attention call, for its dtype.

    Returns:
        [batch, heads, query] nats.
    """
    inf = torch.tensor(torch.inf, dtype=inputs.compute_dtype, device=open_pairs.device)
    return torch.where(open_pairs, inf, -inf)


def exact_bulk_log_mass(inputs: AttentionInputs) -> Tensor:
    """Compute the exact log mass of the bulk keys, [batch, heads, query] nats; -inf where there are none.

    Takes as long as dense attention; memory is linear in the number of keys.
    """
    slabs = []
    for begin in range(0, inputs.query.shape[2], _ROWS_PER_SLAB):
        rows = slice(begin, begin + _ROWS_PER_SLAB)
        scores = attention_scores(inputs, rows).masked_fill(~inputs.regions.bulk_mask(rows)[:, None], -torch.inf)
        slabs.append(scores.logsumexp(-1))
    return torch.cat(slabs, dim=2)


def attention_scores(inputs: AttentionInputs, rows: slice = slice(None)) -> Tensor:
    """Compute scaled and capped scores, [batch, heads, rows, keys], in `inputs.compute_dtype`."""
    query = inputs.query[:, :, rows].to(inputs.compute_dtype).unflatten(1, (inputs.key.shape[1], -1))
    scores = (query @ inputs.key.to(inputs.compute_dtype)[:, :, None].mT).flatten(1, 2) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    return scores


def _statically_open(gate: Gate, layer: int, inputs: AttentionInputs) -> Tensor:
    heads = inputs.query.shape[1]
    if isinstance(gate, StaticGate):
        listed = {head for at, head in gate.open_heads if at == layer}
    else:
        listed = set(range(heads)) if isinstance(gate, OpenGate) else set()
    return torch.tensor([head in listed for head in range(heads)], device=inputs.query.device)
