"""Log mass of the local keys in plain PyTorch, for compilers whose FlexAttention does not return it."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_PER_STEP = 256


@torch.library.custom_op("patchattn::flex_local_log_mass", mutates_args=())
def local_log_mass(
    query: Tensor,
    key: Tensor,
    valid: Tensor,
    first: Tensor,
    query_slot: Tensor,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute the log mass of sink and window, sink logits left out; memory is linear in the number of queries.

    Args:
        query: [batch, heads, query, dim].
        key: [batch, kv_heads, keys, dim].
        valid: [batch, keys] bool.
        first: [batch]; slot of the first real token.
        query_slot: []; slot of the first query. Read on the host.
        sink_size: Number of first tokens that are always attended.
        window_size: Number of last tokens that are always attended.
        scale: Factor on the dot products.
        softcap: Cap on the scores; None for none.

    Returns:
        [batch, heads, query] float32 nats; -inf where there is no local key.
    """
    keys, start = key.shape[2], int(query_slot)
    sink_slots = first[:, None] + torch.arange(min(sink_size, keys), device=key.device)
    inside = sink_slots.clamp(max=keys - 1)
    sink_valid = valid.gather(1, inside) & (sink_slots < keys)
    sink_keys = key.gather(2, inside[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))

    steps = []
    for begin in range(0, query.shape[2], _ROWS_PER_STEP):
        rows = query[:, :, begin : begin + _ROWS_PER_STEP]
        slots = start + begin + torch.arange(rows.shape[2], device=key.device)[:, None]
        near = slice(max(0, start + begin - window_size + 1), min(keys, start + begin + rows.shape[2]))
        near_slots = torch.arange(near.start, near.stop, device=key.device)
        in_window = (near_slots <= slots) & (near_slots > slots - window_size) & valid[:, None, near]
        # A sink key inside the window is counted there.
        in_sink = sink_valid[:, None] & (sink_slots[:, None] <= slots - window_size)
        scores = torch.cat([_scores(rows, x, scale, softcap) for x in (key[:, :, near], sink_keys)], dim=-1)
        seen = torch.cat([in_window, in_sink], dim=-1)[:, None]
        steps.append(scores.masked_fill_(~seen, -torch.inf).logsumexp(-1))
    return torch.cat(steps, dim=2)


@local_log_mass.register_fake
def _(query, key, valid, first, query_slot, sink_size, window_size, scale, softcap):
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled and capped scores, [batch, heads, query, keys] float32."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.float()[:, :, None].mT).flatten(1, 2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
