"""Gated attention in plain PyTorch: no compiler, memory linear in the length. The backend of choice on CPU.

Pass 1 attends every query to its local keys, in chunks of neighbouring queries: such a chunk needs one slice of the
keys and the sink. Its log mass decides the gates. Pass 2 attends only the open pairs to the bulk keys: per batch row
and KV head the open (position, head-in-group) rows are gathered in position order, so that a chunk of them needs one
slice of the keys too, from the first bulk slot to the chunk's last. Both results are merged by log-sum-exp.

On CPU the chunks go through the fused attention kernel, elsewhere and with a softcap through two matrix products.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from patchattn.errors import UnsupportedCallError
from patchattn.gate import decide
from patchattn.inputs import Attended, AttentionInputs
from patchattn.regions import Regions

# Queries per chunk of pass 1: more score more keys beyond their windows, fewer make the kernel calls small.
_LOCAL_ROWS = 128
# Open rows per chunk of pass 2: more score more keys beyond their bulk, fewer make the kernel calls small.
_BULK_ROWS = 256


def attend(inputs: AttentionInputs, bulk_log_mass: Tensor, threshold: float) -> Attended:
    """Attend to local keys, and to bulk keys where the head gate is open.

    Computes what `patchattn.reference.attend` defines, with memory linear in the number of keys. Forward only. One
    opaque operator, so that `torch.compile(fullgraph=True)` of a caller works; on an accelerator it synchronises with
    the host.

    Args:
        inputs: The attention call.
        bulk_log_mass: [batch, heads, query] nats, as `patchattn.gate.bulk_log_mass` finds it; +inf opens and -inf
            closes a pair for certain.
        threshold: Margin in nats from which a gate closes.

    Returns:
        Output, decisions and the number of keys in the chunks handed to the kernels.

    Raises:
        UnsupportedCallError: In the backward pass. Run under `torch.no_grad()`, or call `patchattn.unpatch(model)`
            before training.
    """
    regions = inputs.regions
    return Attended(
        *_blockwise(
            inputs.query,
            inputs.key,
            inputs.value,
            regions.valid,
            regions.first,
            regions.query_slot,
            bulk_log_mass,
            inputs.sink_logits,
            inputs.scale,
            inputs.softcap,
            threshold,
            regions.sink_size,
            regions.window_size,
        )
    )


@torch.library.custom_op("patchattn::blockwise", mutates_args=())
def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    first: Tensor,
    query_slot: Tensor,
    bulk_log_mass: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    threshold: float,
    sink_size: int,
    window_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    regions = Regions(sink_size, window_size, query.shape[2], valid, first, query_slot)
    query, key, value = (_with_unit_stride(x) for x in (query, key, value))
    inputs = AttentionInputs(query, key, value, regions, scale, softcap, sink_logits)
    output, local_log_mass, scored = _attend_local(inputs)
    opened = decide(local_log_mass, bulk_log_mass, regions.asked, threshold)
    if opened.any():
        scored += _add_bulk(inputs, opened, output, local_log_mass)
    return output, opened, torch.tensor(scored, device=query.device)


@torch.library.register_fake("patchattn::blockwise")
def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty(rows, dtype=torch.bool),
        query.new_empty((), dtype=torch.int64),
    )


def _refuse_backward(ctx: object, *gradients: object) -> NoReturn:
    raise UnsupportedCallError(
        "The blockwise backend of patchattn has no backward pass.",
        fix="Run the model under torch.no_grad(), or call patchattn.unpatch(model) before training.",
    )


torch.library.register_autograd("patchattn::blockwise", _refuse_backward)


def _attend_local(inputs: AttentionInputs) -> tuple[Tensor, Tensor, int]:
    """Pass 1: every query against sink and window.

    Returns:
        Output [batch, heads, query, value_dim] in the query's dtype, local log mass [batch, heads, query] with the
        sink logits, and the number of (head, query, key) triples scored.
    """
    regions, key, value = inputs.regions, inputs.key, inputs.value
    batch, heads, length, _ = inputs.query.shape
    output = inputs.query.new_zeros(batch, heads, length, value.shape[3])
    log_mass = inputs.query.new_full((batch, heads, length), -torch.inf, dtype=inputs.compute_dtype)
    query_slot = int(regions.query_slot)
    filled = min(query_slot + length, regions.key_length)

    # A cache may hold anything in the slots after the last query: they are not read, not even to be masked.
    sink_slots = regions.first[:, None] + torch.arange(regions.sink_size, device=key.device)
    sink_index = sink_slots.clamp(max=filled - 1)
    sink_key, sink_value = _at_slots(key, sink_index), _at_slots(value, sink_index)
    sink_valid = (sink_slots < filled) & regions.valid.gather(1, sink_index)

    scored = 0
    for begin in range(0, length, _LOCAL_ROWS):
        rows = slice(begin, min(begin + _LOCAL_ROWS, length))
        slots = query_slot + torch.arange(rows.start, rows.stop, device=key.device)[:, None]
        window = slice(max(query_slot + rows.start - regions.window_size + 1, 0), min(query_slot + rows.stop, filled))
        window_slots = torch.arange(window.start, window.stop, device=key.device)
        in_window = (window_slots <= slots) & (window_slots > slots - regions.window_size)
        in_window = in_window & regions.valid[:, None, window]
        # A sink key that the window holds too must count once.
        in_sink = (sink_slots[:, None] <= slots - regions.window_size) & sink_valid[:, None]
        seen = torch.cat([in_sink, in_window], dim=2)
        part, mass = _softmax_attention(
            inputs,
            inputs.query[:, :, rows],
            torch.cat([sink_key, key[:, :, window]], dim=2),
            torch.cat([sink_value, value[:, :, window]], dim=2),
            _bias(seen, inputs.query.dtype)[:, None],
        )
        # The kernel gives a row that sees no key the log mass 0.
        blind = ~seen.any(2)[:, None]
        output[:, :, rows] = part.masked_fill(blind[..., None], 0)
        log_mass[:, :, rows] = mass.masked_fill(blind, -torch.inf)
        scored += batch * heads * seen.shape[1] * seen.shape[2]

    if inputs.sink_logits is not None:
        with_sinks = torch.logaddexp(log_mass, inputs.sink_logits.to(log_mass.dtype)[:, None])
        output.mul_((log_mass - with_sinks).exp()[..., None])
        log_mass = with_sinks
    return output, log_mass, scored


def _add_bulk(inputs: AttentionInputs, opened: Tensor, output: Tensor, local_log_mass: Tensor) -> int:
    """Pass 2: open pairs against their bulk keys, merged into the output of pass 1 in place.

    Returns:
        Number of (head, query, key) triples scored.
    """
    regions, group = inputs.regions, inputs.group_size
    bias = _bias(regions.valid, inputs.query.dtype)
    bulk_begins = regions.first + regions.sink_size
    bulk_ends = (regions.query_slots - regions.window_size + 1).clamp(0, regions.key_length)
    # An open pair whose bulk slots are all padding has nothing to add.
    n_real = pad(regions.valid.cumsum(1), (1, 0))
    n_real_before_bulk = n_real.gather(1, bulk_begins[:, None].clamp(max=regions.key_length))
    wanted = opened & (n_real[:, bulk_ends] > n_real_before_bulk)[:, None]

    scored = 0
    for row, bulk_begin in enumerate(bulk_begins.tolist()):
        for kv_head in range(inputs.key.shape[1]):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            positions, in_group = wanted[row, heads].T.nonzero(as_tuple=True)
            for chunk in zip(positions.split(_BULK_ROWS), in_group.split(_BULK_ROWS), strict=True):
                position, head = chunk[0], chunk[1] + heads.start
                if not len(position):
                    continue
                ends = bulk_ends[position]
                shortest, longest = int(ends[0]), int(ends[-1])
                chunk_bias = bias[row, bulk_begin:longest].repeat(len(position), 1)
                ragged = torch.arange(shortest, longest, device=ends.device) >= ends[:, None]
                chunk_bias[:, shortest - bulk_begin :].masked_fill_(ragged, -torch.inf)
                part, bulk_log_mass = _softmax_attention(
                    inputs,
                    inputs.query[row, head, position][None, None],
                    inputs.key[row, kv_head, bulk_begin:longest][None, None],
                    inputs.value[row, kv_head, bulk_begin:longest][None, None],
                    chunk_bias[None, None],
                )
                bulk_weight = torch.sigmoid(bulk_log_mass[0, 0] - local_log_mass[row, head, position])[:, None]
                local_part = output[row, head, position].to(bulk_weight.dtype)
                merged = (1 - bulk_weight) * local_part + bulk_weight * part[0, 0]
                output[row, head, position] = merged.to(output.dtype)
                scored += chunk_bias.numel()
    return scored


def _softmax_attention(
    inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend a chunk of queries to a chunk of keys.

    Args:
        inputs: The call, for scale, softcap and dtype.
        query: [batch, heads, rows, dim].
        key: [batch, kv_heads, keys, dim].
        value: [batch, kv_heads, keys, value_dim].
        bias: [batch or 1, 1, rows, keys]; 0 or -inf. Rows that are -inf throughout give undefined results.

    Returns:
        Output [batch, heads, rows, value_dim] and log mass [batch, heads, rows] in nats.
    """
    if query.device.type == "cpu" and inputs.softcap is None:
        dim, value_dim = query.shape[3], value.shape[3]
        # The kernel takes one head size; zeros change neither scores nor the real part of the output.
        output, log_mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            pad(query, (0, max(value_dim - dim, 0))),
            pad(key, (0, max(value_dim - dim, 0))),
            pad(value, (0, max(dim - value_dim, 0))),
            attn_mask=bias,
            scale=inputs.scale,
        )
        # The kernel adds the bias to the score, so a key that is not finite spoils rows that mask it: only then are
        # the scores computed again, and masked by selection.
        if not (output.isnan().any() or log_mass.isnan().any()):
            return output[..., :value_dim], log_mass
    grouped = query.to(inputs.compute_dtype).unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.to(inputs.compute_dtype)[:, :, None].mT).flatten(1, 2) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    scores = scores.masked_fill(bias == -torch.inf, -torch.inf)
    weights = scores.softmax(-1).unflatten(1, (key.shape[1], -1))
    output = (weights @ value.to(inputs.compute_dtype)[:, :, None]).flatten(1, 2)
    return output, scores.logsumexp(-1)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: 0 where a key is seen, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _at_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Gather [batch, heads, slots, dim] at [batch, n] slots."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _with_unit_stride(x: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous: the CPU kernel assumes it, and is silently wrong if not."""
    return x if x.stride(-1) == 1 else x.contiguous()
