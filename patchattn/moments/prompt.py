"""Prompt moments, those of a sequence's own bulk keys, and the bulk log mass they predict."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import host_may_read
from patchattn.moments.gaussian import (
    CHUNK,
    DEFAULT_ESTIMATE,
    Estimate,
    log_mass_of_gaussian,
    log_mass_of_log_count,
)
from patchattn.moments.running import PromptMoments, fuses_products, slabs, span


def bulk_log_mass_from_prompt(
    inputs: AttentionInputs,
    state: PromptMoments | None = None,
    *,
    estimate: Estimate = DEFAULT_ESTIMATE,
    max_chunks: int | None = None,
) -> tuple[Tensor, PromptMoments]:
    """Estimate each query's bulk log mass from the moments of its own sequence.

    Where looking is free, queries of a prefill below break-even are not evaluated.

    Args:
        inputs: The attention call; its keys are all keys so far, the queries' own included.
        state: Moments left by earlier calls on the same keys; None starts from nothing. Rows whose state covers more
            than the first query may see start from nothing too.
        estimate: See `log_mass_of_gaussian`.
        max_chunks: Upper bound on the chunks a row goes on by, known without looking at the tensors; None looks (a
            host synchronisation on an accelerator). A row that needs more opens its gates.

    Returns:
        The estimate, [batch, heads, query] nats in float32 (float64 for float64 keys): -inf without bulk keys, +inf
        (which opens the gate) before the first chunk is full, and +inf where it was not evaluated. And the state after
        the last query.
    """
    key, regions = inputs.key, inputs.regions
    free, is_decode = host_may_read(key), regions.query_length == 1
    if free and is_decode and state is not None and state.is_complete(regions):
        return _decode_step(inputs, state, estimate), state
    n_bulk = regions.n_bulk
    needed = n_bulk // CHUNK
    state = PromptMoments.empty(key) if state is None else state.rewound(needed[:, 0])
    upto = needed[:, -1]
    if max_chunks is None:
        if not is_decode and regions.break_even >= CHUNK:
            enough = upto.clamp(max=regions.break_even // CHUNK)
            state = state.advanced(key, regions, enough, int((enough - state.chunks).clamp(min=0).max()))
        max_chunks = int((upto - state.chunks).max())
    if is_decode:
        state = state.advanced(key, regions, upto, max_chunks)
        if free and state.is_complete(regions):
            return _decode_step(inputs, state, estimate), state
        if fuses_products(key):
            how = {"scale": inputs.scale, "softcap": inputs.softcap, "estimate": estimate}
            mass = evaluate_one(inputs.query[:, :, 0], state, n_bulk, **how)[..., None]
        else:
            grouped, groups = inputs.query[:, :, None], state.with_chunk_axis()
            mass = _evaluate(inputs, grouped, groups, n_bulk[:, None], estimate)[:, :, 0]
        known = (state.chunks == upto)[:, None] & (needed > 0)
    else:
        mass, state, known = _prefill(inputs, state, max_chunks, estimate)
    mass = torch.where(known[:, None], mass, torch.inf)
    return torch.where((n_bulk > 0)[:, None], mass, -torch.inf), state


def moments_before(inputs: AttentionInputs, kept: PromptMoments | None, *, reach_query: bool) -> PromptMoments:
    """Bring moments up to a call's first query; reads no tensor on the host.

    Args:
        inputs: The attention call.
        kept: Moments left by earlier calls on the same keys; None starts from nothing.
        reach_query: Whether it is known that `kept` goes up to the first query. Else calls between may have kept none,
            or keys were taken back. A single query that is further behind than a chunk opens, and catches up.
    """
    key, regions = inputs.key, inputs.regions
    if kept is not None and (reach_query or regions.query_length == 1):
        return kept
    if kept is None and regions.query_length == regions.key_length:
        return PromptMoments.empty(key)
    # A static cache does not tell how many of its slots are filled: as many chunks as it has room for.
    needed = regions.n_bulk[:, 0] // CHUNK
    moments = PromptMoments.empty(key) if kept is None else kept.rewound(needed)
    return moments.advanced(key, regions, needed, regions.key_length // CHUNK + 1)


def _decode_step(inputs: AttentionInputs, state: PromptMoments, estimate: Estimate) -> Tensor:
    """Evaluate one query per sequence where the state covers what it should: 127 of 128 steps."""
    dim, log_n = inputs.query.shape[3], inputs.regions.last_log_n_bulk
    of_scores = state.of_scores(inputs.scale)
    q = inputs.query.reshape(len(of_scores), -1, dim).to(of_scores.dtype)
    if isinstance(log_n, Tensor):
        log_n = log_n.to(q.dtype).expand(-1, inputs.key.shape[1], 1).flatten(0, 1)
    along = torch.bmm(q, of_scores)
    variance = (along[..., :dim] * q).sum(-1)
    mass = log_mass_of_log_count(log_n, along[..., dim], variance, inputs.softcap, estimate)
    return mass.view(inputs.query.shape[:3])


def _prefill(
    inputs: AttentionInputs, state: PromptMoments, max_chunks: int, estimate: Estimate
) -> tuple[Tensor, PromptMoments, Tensor]:
    """Evaluate many queries: those that share a chunk count are one group, aligned to the grid, slab by slab."""
    query, regions = inputs.query, inputs.regions
    n_bulk = regions.n_bulk
    needed = n_bulk // CHUNK
    upto = needed[:, -1]
    start_chunks = state.chunks
    # The row whose n_bulk is zero, extended below zero where the padding or the sink has not been filled yet.
    zero_row = regions.first + regions.sink_size + regions.window_size - 1 - regions.query_slot
    within = torch.arange(CHUNK, device=query.device)
    masses = []
    for begin, groups in slabs(max_chunks + 1, query):
        prefixes = state.prefixes(inputs.key, regions, upto, groups)
        grid = CHUNK * (start_chunks[:, None] + begin + torch.arange(groups, device=query.device))
        bulk_counts = grid[..., None] + within
        aligned = span(query, grid[:, 0] + zero_row, groups * CHUNK).unflatten(2, (groups, CHUNK))
        masses.append(_evaluate(inputs, aligned, prefixes.but_last(), bulk_counts, estimate).flatten(2))
        state = prefixes.last()
    column = n_bulk - CHUNK * start_chunks[:, None]
    known = (needed > 0) & (column >= 0) & (column < CHUNK * (max_chunks + 1))
    column = column.clamp(0, CHUNK * (max_chunks + 1) - 1)
    mass = torch.cat(masses, dim=2).gather(2, column[:, None].expand(-1, query.shape[1], -1))
    return mass, state, known


def evaluate_one(
    query: Tensor, moments: PromptMoments, n_bulk: Tensor, *, scale: float, softcap: float | None, estimate: Estimate
) -> Tensor:
    """Evaluate one query per sequence against its moments, without a product of matrices.

    Args:
        query: [batch, heads, dim].
        moments: Of each sequence.
        n_bulk: [batch, 1]; number of bulk keys.
        scale: Factor on the dot products.
        softcap: Cap on the scores; None for none.
        estimate: See `log_mass_of_gaussian`.

    Returns:
        [batch, heads] nats.
    """
    q = query.unflatten(1, (moments.total.shape[1], -1)).to(moments.total.dtype)
    known = moments.as_key_moments()
    along = (q[..., None, :] * known.covariance[:, :, None]).sum(-1)
    mean, variance = (
        (q * x).sum(-1) * factor for x, factor in ((known.mean[:, :, None], scale), (along, scale * scale))
    )
    mass = log_mass_of_gaussian(n_bulk[..., None], mean, variance, softcap=softcap, estimate=estimate)
    return mass.flatten(1, 2)


def _evaluate(
    inputs: AttentionInputs, query: Tensor, moments: PromptMoments, n_bulk: Tensor, estimate: Estimate
) -> Tensor:
    """Evaluate groups of queries against one set of moments each.

    Args:
        inputs: The call, for scale and softcap.
        query: [batch, heads, groups, rows, dim].
        moments: Parts with a `groups` axis, as `PromptMoments.prefixes` returns them.
        n_bulk: [batch, groups, rows].
        estimate: See `log_mass_of_gaussian`.

    Returns:
        [batch, heads, groups, rows].
    """
    (_, kv_heads, _, dim), dtype, scale = moments.total.shape, moments.total.dtype, inputs.scale
    heads_apart = query.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [batch, kv_heads, groups, group, rows, dim]
    # All rows that share a matrix side by side: one product each. The scale goes to the matrices, which are smaller.
    q = heads_apart.flatten(3, 4).to(dtype)
    divisor = moments.count.clamp(min=1)[:, None, :, None]
    shift = moments.total / divisor
    covariance = moments.outer / divisor[..., None] - shift[..., :, None] * shift[..., None, :]
    if fuses_products(q):
        along, mean = q @ covariance, (q * (moments.reference + shift)[..., None, :]).sum(-1) * scale
        variance = (along * q).sum(-1) * (scale * scale)
    else:
        both = torch.cat([covariance * (scale * scale), (moments.reference + shift).unsqueeze(-1) * scale], dim=-1)
        along = q @ both
        mean, variance = along[..., dim], along[..., :dim].mul_(q).sum(-1)
    mean, variance = (x.unflatten(3, heads_apart.shape[3:5]) for x in (mean, variance))
    mass = log_mass_of_gaussian(n_bulk[:, None, :, None], mean, variance, softcap=inputs.softcap, estimate=estimate)
    return mass.transpose(2, 3).flatten(1, 2)
