"""The truth: gated attention written out in plain PyTorch, exact and slow.

Every backend is tested against this function. It makes the full queries x keys score tensor, in float32, or in float64
for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends.backend import Backend, CallShape
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import attention_scores, masked_log_mass
from patchattn.gates.decision import decide
from patchattn.policy import Phase


def attend(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float) -> Attended:
    """Attend to local keys, and to bulk keys where the head gate is open.

    Args:
        inputs: The attention call.
        bulk_log_mass: [batch, heads, query] nats, as a gate weighs it; +inf opens and -inf
            closes a pair for certain.
        margin: Margin in nats from which a gate closes.

    Returns:
        Output, decisions and the number of keys under the token-level mask.
    """
    regions = inputs.regions
    scores = attention_scores(inputs)
    local = regions.local_mask()[:, None]
    local_log_mass = masked_log_mass(scores, local, inputs.sink_logits)
    opened = decide(local_log_mass, bulk_log_mass, regions.asked, margin, inputs.opens_groups)
    reads_bulk = opened | regions.unasked[:, None]
    attended = local | (regions.bulk_mask()[:, None] & reads_bulk[..., None])
    log_mass = masked_log_mass(scores, attended, inputs.sink_logits)
    weights = (scores.masked_fill(~attended, -torch.inf) - log_mass[..., None]).exp()
    # A row that sees no key has log mass -inf; its weights would be NaN and its output is defined as zero.
    weights = torch.where(attended.any(-1, keepdim=True), weights, 0)
    value = inputs.value.to(weights.dtype)[:, :, None]
    output = (weights.unflatten(1, (value.shape[1], -1)) @ value).flatten(1, 2)
    return Attended(output.to(inputs.query.dtype), opened, attended.sum())


def break_even(shape: CallShape, phase: Phase) -> int:
    """Have every query asked: what is right does not depend on what is fast."""
    return 0


BACKEND = Backend(attend, break_even=break_even)
