"""The head gate: for each (batch row, query head, query), does this head need the bulk keys?

Every kind of gate is expressed as a log mass of the bulk keys: exact (oracle), estimated (moments), or +inf / -inf for
decisions made beforehand. A gate closes where `local_log_mass - bulk_log_mass` reaches the margin threshold, and opens
where that can't be said - also where the comparison is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt
from patchattn.moments.text import RotaryMoments, bulk_log_mass_from_text, counted_from
from patchattn.policy import ClosedGate, Estimate, Gate, MomentGate, OpenGate, OracleGate, Policy, StaticGate, phase_of

_PARTS = ("mean", "covariance", "frequencies", "order")


@dataclass(frozen=True)
class Measured:
    """What a calibration measured for the heads of one layer.

    Args:
        margins: [heads] nats; the margin from which each head closes. -inf never opens it, +inf never closes it. None
            leaves the one threshold of the policy.
        moments: Moments of the keys of other text; None for none.
    """

    margins: Tensor | None = None
    moments: RotaryMoments | None = None

    def of_heads(self, heads: slice, kv_heads: slice) -> Measured:
        """Return what concerns some of the query heads and KV heads."""
        margins = None if self.margins is None else self.margins[heads]
        return Measured(margins, None if self.moments is None else self.moments.of_heads(kv_heads))

    def bits(self) -> dict[str, Tensor]:
        """Return the tensors as the bits of float32 in int32, which casting a module to another dtype leaves alone."""
        found = {"margins": self.margins}
        if self.moments is not None:
            found |= {name: getattr(self.moments, name) for name in _PARTS}
        return {
            f"measured_{name}": tensor.float().contiguous().view(torch.int32)
            for name, tensor in found.items()
            if tensor is not None
        }

    @classmethod
    def of_bits(cls, bits: Mapping[str, Tensor | None]) -> Measured:
        """Make it again from what `bits` returned; other names are passed over."""
        margins, mean, covariance, frequencies, order = (
            None if (kept := bits.get(f"measured_{name}")) is None else kept.view(torch.float32)
            for name in ("margins", *_PARTS)
        )
        if mean is None or covariance is None or frequencies is None:
            return cls(margins)
        return cls(margins, RotaryMoments(mean, covariance, frequencies, None if order is None else order.long()))


def margin_threshold(gate: Gate) -> float:
    """Margin in nats from which a gate closes: the logit of its threshold.

    0 for gates without one, and for thresholds per head: those are folded into the bulk log mass.
    """
    if isinstance(gate, MomentGate | OracleGate) and isinstance(gate.threshold, float):
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
        [batch, heads, query] bool; True means open. A margin that is not finite opens, except where the bulk log mass
        is -inf, which closes for certain.
    """
    # A local mass that is not finite says nothing about the bulk keys: only a bulk mass of -inf is closed then.
    # Written so that NaN opens.
    most = local_log_mass.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf) - threshold
    return asked[:, None] & ~(bulk_log_mass <= most)


def is_open(local_log_mass: float, bulk_log_mass: float, threshold: float) -> bool:
    """Decide one pair that is asked, as `decide` does."""
    closed = local_log_mass != math.inf and bulk_log_mass <= local_log_mass - threshold
    return not (closed or bulk_log_mass == -math.inf)


def bulk_log_mass(
    policy: Policy,
    layer: int,
    inputs: AttentionInputs,
    state: PromptMoments | None = None,
    *,
    max_chunks: int | None = None,
    measured: Measured | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, PromptMoments | None]:
    """Find the bulk log mass that a policy's gate compares with the exact local log mass.

    Args:
        policy: The policy, `min_bulk` resolved.
        layer: Index of the layer, for static gates.
        inputs: The attention call.
        state: Running prompt moments of the cache; None if there are none yet.
        max_chunks: See `bulk_log_mass_from_prompt`.
        measured: What a calibration says about this layer; with margins per head, the result is to be compared with
            threshold 0.
        positions: [batch or 1, query] int64; positions that the model gives the queries, for moments of a calibration.
            None where they are not known.

    Returns:
        [batch, heads, query] nats, and the prompt moments after this call (the given state for gates without any).
        Queries below break-even get +inf: they open without being asked.
    """
    gate, regions = policy.gate, inputs.regions
    break_even = policy.break_even(phase_of(regions.query_length))
    match gate:
        case MomentGate(moments="calibration"):
            mass = bulk_log_mass_from_calibration(inputs, measured, positions, estimate=gate.estimate)
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
                least_bulk=break_even,
            )
        case OracleGate():
            mass = exact_masses(inputs)[0].bulk
        case OpenGate() | ClosedGate() | StaticGate():
            mass = forced(_statically_open(gate, layer, inputs)[None, :, None].expand(inputs.query.shape[:3]), inputs)
    if measured is not None and measured.margins is not None:
        mass = with_margins(mass, measured.margins)
    if break_even and not regions.surely_reach(break_even):
        mass = torch.where((regions.n_bulk < break_even)[:, None], torch.inf, mass)
    return mass, state


def with_margins(mass: Tensor, margins: Tensor) -> Tensor:
    """Fold a threshold per head into a bulk log mass, so that comparing with 0 decides.

    Args:
        mass: [batch, heads, query] nats.
        margins: [heads] nats; -inf closes a head whatever the mass, also where the mass opens in doubt.
    """
    margins = margins.to(mass.dtype)[:, None]
    return torch.where(margins == -torch.inf, -torch.inf, mass + margins)


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


def bulk_log_mass_from_calibration(
    inputs: AttentionInputs, measured: Measured | None, positions: Tensor | None = None, *, estimate: Estimate
) -> Tensor:
    """Estimate each query's bulk log mass from the key moments of a calibration, [batch, heads, query] nats.

    Without moments it is NaN, which opens, and so it is where positions do not count on from the first real token of a
    sequence, or are not known behind padding; -inf without bulk keys.
    """
    if measured is None or measured.moments is None:
        return torch.full(inputs.query.shape[:3], torch.nan, dtype=inputs.compute_dtype, device=inputs.query.device)
    regions = inputs.regions
    if positions is None or positions.dim() != 2:
        begin, known = None, (regions.first == 0)[:, None]
    else:
        begin, known = counted_from(positions, regions)
    mass = bulk_log_mass_from_text(
        inputs.query,
        regions,
        measured.moments,
        scale=inputs.scale,
        softcap=inputs.softcap,
        estimate=estimate,
        begin=begin,
    )
    known = known | (regions.n_bulk == 0)
    return torch.where(known[:, None], mass, torch.nan).to(inputs.compute_dtype)


def _statically_open(gate: Gate, layer: int, inputs: AttentionInputs) -> Tensor:
    heads = inputs.query.shape[1]
    if isinstance(gate, StaticGate):
        listed = {head for at, head in gate.open_heads if at == layer}
    else:
        listed = set(range(heads)) if isinstance(gate, OpenGate) else set()
    return torch.tensor([head in listed for head in range(heads)], device=inputs.query.device)
