"""Dense attention under an explicit token-level mask: what a gated call has to equal.

Written from the definitions alone. It shares no code with the library's regions, gates and backends, so a mistake there
can't hide here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES_PER_SLAB = 1 << 24


@dataclass(frozen=True)
class DenseCall:
    """What dense attention under a token-level mask gives.

    Args:
        output: [batch, heads, query, value_dim] in the dtype of the computation; zeros for rows that see no key.
        local_log_mass: [batch, heads, query] nats, sink logits included.
        bulk_log_mass: [batch, heads, query] nats, exact; -inf where there are no bulk keys.
    """

    output: Tensor
    local_log_mass: Tensor
    bulk_log_mass: Tensor


def token_masks(
    real: Tensor, begin: int, rows: range, *, sink_size: int, window_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Say which keys are local and which are bulk, from the definitions.

    Args:
        real: [batch, keys] bool; False is padding.
        begin: Slot of the first query row of the call.
        rows: Query rows wanted.
        sink_size: Tokens of the sink, from the first real token on.
        window_size: Tokens of the window, the query's own included.

    Returns:
        local [batch, rows, keys] bool, bulk [batch, rows, keys] bool, and the number of bulk slots [batch, rows].
    """
    key = torch.arange(real.shape[1], device=real.device)
    query = torch.tensor([begin + row for row in rows], device=real.device)
    first = torch.where(real.any(1), real.int().argmax(1), real.shape[1])
    causal = real[:, None, :] & (key[None, None, :] <= query[None, :, None])
    in_sink = key[None, None, :] < (first + sink_size)[:, None, None]
    in_window = query[None, :, None] - key[None, None, :] < window_size
    local = causal & (in_sink | in_window)
    n_bulk = (query[None, :] - first[:, None] + 1 - sink_size - window_size).clamp(min=0)
    return local, causal & ~local, n_bulk


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    opened: Tensor,
    real: Tensor,
    begin: int,
    *,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> DenseCall:
    """Attend densely under the mask that the decisions of a gate amount to.

    Takes as long as dense attention in `dtype`; the scores are made for a slab of query rows at a time.

    Args:
        query: [batch, heads, query, dim].
        key: [batch, kv_heads, keys, dim]; query head `h` reads KV head `h // (heads // kv_heads)`.
        value: [batch, kv_heads, keys, value_dim].
        opened: [batch, heads, query] bool; True attends to local and bulk keys, False to local keys.
        real: [batch, keys] bool; False is padding.
        begin: Slot of the first query row.
        sink_size: See `token_masks`.
        window_size: See `token_masks`.
        scale: Factor on the dot products.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None for none.
        sink_logits: [heads]; joins the softmax without a value. None for none.
        dtype: dtype of the whole computation.
    """
    batch, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (key, value))
    slab = max(1, _SCORES_PER_SLAB // (batch * heads * key.shape[2]))
    parts = []
    for start in range(0, length, slab):
        rows = range(start, min(start + slab, length))
        local, bulk, _ = token_masks(real, begin, rows, sink_size=sink_size, window_size=window_size)
        local, bulk = local[:, None], bulk[:, None]
        at = slice(rows.start, rows.stop)
        scores = query[:, :, at].to(dtype) @ key.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        local_mass = scores.masked_fill(~local, -torch.inf).logsumexp(-1)
        bulk_mass = scores.masked_fill(~bulk, -torch.inf).logsumexp(-1)
        seen = local | (bulk & opened[:, :, at, None])
        mass = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        if sink_logits is not None:
            extra = sink_logits.to(dtype)[None, :, None]
            local_mass, mass = torch.logaddexp(local_mass, extra), torch.logaddexp(mass, extra)
        weights = torch.where(seen, (scores - mass[..., None]).exp(), 0)
        # A key that no row of the slab sees may hold anything, and 0 * NaN is NaN.
        visible = seen.any(2)[..., None]
        parts.append((weights @ torch.where(visible, value, 0), local_mass, bulk_mass))
    return DenseCall(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))
