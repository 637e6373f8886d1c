"""Gated attention through FlexAttention, always compiled: closed rows cost no bulk keys.

Where the kernel returns the log-sum-exp (CUDA), the call is two passes: local keys for all rows, whose log-sum-exp is
the exact local log mass that the head gate needs, then bulk keys for the open rows, merged in float32. For the second
pass of a prefill the open rows are moved together, so that its work is proportional to the number of open pairs,
however they are scattered. Long prefills go in slabs of queries, which bound the workspace.

Where the kernel does not (CPU through Inductor), a plain computation finds the local log mass and one pass does the
rest.

Lengths: on CPU, lengths are padded to static buckets, because kernels of dynamic length do not compile there (torch
2.13). Queries and keys grow in powers of two, keys from 512 on, so that decoding up to 64k tokens compiles 8 times. On
CUDA lengths are dynamic and nothing is padded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from patchattn.backends.flex.backward import forward_only
from patchattn.backends.flex.local import local_log_mass
from patchattn.backends.flex.masks import ROW_TILE, RowMasks, block_size, open_first, pinned
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.errors import BackendError
from patchattn.gates.gate import decide

Compiler = Literal["inductor", "aot_eager", "eager"]

Run = Callable[["_Call", Tensor], tuple[Tensor, Tensor, Tensor]]

_SMALLEST_KEY_BUCKET = 512
_SMALLEST_HEAD_DIM = 16  # of the Triton kernels
_SLAB = 4096  # queries of a two-pass call


def attend(inputs: AttentionInputs, bulk_log_mass: Tensor, threshold: float) -> Attended:
    """Attend to local keys, and to bulk keys where the head gate is open; see `patchattn.backends.reference.attend`.

    Args:
        inputs: The attention call, in float32, float16 or bfloat16.
        bulk_log_mass: [batch, heads, query] nats; +inf opens and -inf closes a pair for certain, NaN opens.
        threshold: Margin in nats from which a gate closes.

    Returns:
        Output, decisions, and the scored keys of all visited tiles, in both passes. The output can't be differentiated:
        its backward raises `UnsupportedCallError`.

    Raises:
        BackendError: FlexAttention can't be compiled for this device or dtype, or was compiled for too many shapes.
    """
    return attend_with(inputs, bulk_log_mass, threshold, compiler="inductor")


def attend_with(inputs: AttentionInputs, bulk_log_mass: Tensor, threshold: float, *, compiler: Compiler) -> Attended:
    """Do what `attend` does with a given compiler.

    Args:
        inputs: The attention call.
        bulk_log_mass: [batch, heads, query] nats.
        threshold: Margin in nats from which a gate closes.
        compiler: `"aot_eager"` and `"eager"` run the path of CUDA devices, two passes with log-sum-exp, on any device.
            They generate no kernels and make the queries x keys tensor: for tests.
    """
    _refuse_dtype(inputs.query.dtype)
    with torch.no_grad():
        two_passes = compiler != "inductor" or inputs.query.device.type != "cpu"
        call = _two_pass_call(inputs, bulk_log_mass) if two_passes else _one_pass_call(inputs, bulk_log_mass, threshold)
        threshold_tensor = torch.full((), threshold, device=inputs.query.device, dtype=torch.float32)
        settings = _Settings.of(inputs, two_passes=two_passes)
        queries = inputs.query.shape[2]
        if torch.compiler.is_compiling():
            # A loop over slabs would make a graph for each length.
            output, opened, scored = _attend_call(settings, call, threshold_tensor)
        elif two_passes:
            slabs = [_slab(call, begin) for begin in range(0, queries, _SLAB)] if queries > _SLAB else [call]
            output, opened, scored = _joined(
                _run_or_explain(settings, compiler, _with_dynamic_lengths(slab), threshold_tensor) for slab in slabs
            )
        else:
            output, opened, scored = _run_or_explain(settings, compiler, call, threshold_tensor)
        output, opened = output[:, :, :queries], opened[:, :, :queries]
    sources = (inputs.query, inputs.key, inputs.value, inputs.sink_logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources):
        output = forward_only(output, *sources)
    return Attended(output, opened, scored)


@dataclass(frozen=True)
class _Settings:
    """What a compiled function is specialised on."""

    sink_size: int
    window_size: int
    scale: float
    softcap: float | None
    two_passes: bool

    @classmethod
    def of(cls, inputs: AttentionInputs, *, two_passes: bool) -> _Settings:
        regions = inputs.regions
        return cls(regions.sink_size, regions.window_size, float(inputs.scale), inputs.softcap, two_passes)


_Call = dict[str, Tensor]  # without sink_logits where there are none
_QUERY_AXES = {"query": 2, "slots": 0, "asked": 1, "unasked": 1, "gate": 2}


def _two_pass_call(inputs: AttentionInputs, bulk_log_mass: Tensor) -> _Call:
    """Collect the tensors of a call whose lengths are dynamic."""
    query, key, value, regions = inputs.query, inputs.key, inputs.value, inputs.regions
    return {
        "query": query.detach(),
        "key": key.detach(),
        "value": value.detach(),
        "valid": regions.valid,
        "first": regions.first,
        "slots": regions.query_slots,
        "asked": regions.asked,
        "unasked": regions.unasked,
        "gate": bulk_log_mass.detach(),
        **_sink_logits(inputs),
    }


def _slab(call: _Call, begin: int) -> _Call:
    """Cut the queries from `begin` on out of a call, `_SLAB` of them or as many as there are."""
    length = min(_SLAB, call["query"].shape[2] - begin)
    # Contiguous, because strides that come from the whole length are part of what a graph is compiled for.
    return call | {name: call[name].narrow(axis, begin, length).contiguous() for name, axis in _QUERY_AXES.items()}


def _joined(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Put the results of slabs together."""
    outputs, opened, scored = zip(*parts, strict=True)
    if len(outputs) == 1:
        return outputs[0], opened[0], scored[0]
    return torch.cat(outputs, dim=2), torch.cat(opened, dim=2), torch.stack(scored).sum()


def _with_dynamic_lengths(call: _Call) -> _Call:
    """Mark the lengths of a call as dynamic, on views: the marks must not stay on the caller's tensors."""
    axes = {"key": 2, "value": 2, "valid": 1} | (_QUERY_AXES if call["query"].shape[2] > 1 else {})
    marked = {name: call[name].view_as(call[name]) for name in axes}
    for name, axis in axes.items():
        torch._dynamo.maybe_mark_dynamic(marked[name], axis)
    return call | marked


def _one_pass_call(inputs: AttentionInputs, bulk_log_mass: Tensor, threshold: float) -> _Call:
    """Decide, and pad the tensors of a call to buckets of static length."""
    query, key, value, regions = inputs.query.detach(), inputs.key.detach(), inputs.value.detach(), inputs.regions
    local = local_log_mass(
        query,
        key,
        regions.valid,
        regions.first,
        regions.query_slot,
        regions.sink_size,
        regions.window_size,
        float(inputs.scale),
        inputs.softcap,
    )
    if inputs.sink_logits is not None:
        local = torch.logaddexp(local, inputs.sink_logits.detach().to(local.dtype)[:, None])
    opened = decide(local, bulk_log_mass, regions.asked, threshold)
    n_null = 1 if inputs.sink_logits is not None else 0
    more_queries = _bucket(query.shape[2], 1) - query.shape[2]
    more_keys = _bucket(key.shape[2] + n_null, _SMALLEST_KEY_BUCKET) - key.shape[2]
    return {
        # Strides are part of what a graph is compiled for.
        "query": F.pad(query, (0, 0, 0, more_queries)).contiguous(),
        "key": F.pad(key, (0, 0, 0, more_keys)).contiguous(),
        "value": F.pad(value, (0, 0, 0, more_keys)).contiguous(),
        "valid": F.pad(regions.valid, (0, more_keys)),
        "first": regions.first,
        "slots": F.pad(regions.query_slots, (0, more_queries), value=-1),
        "asked": F.pad(regions.asked, (0, more_queries)),
        "unasked": F.pad(regions.unasked, (0, more_queries)),
        "gate": F.pad(opened, (0, more_queries)),
        **_sink_logits(inputs),
    }


def _sink_logits(inputs: AttentionInputs) -> _Call:
    return {} if inputs.sink_logits is None else {"sink_logits": inputs.sink_logits.detach()}


def _bucket(length: int, smallest: int) -> int:
    bucket = smallest
    while bucket < length:
        bucket *= 2
    return bucket


def _attend_call(  # pragma: compiled
    settings: _Settings, call: _Call, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend inside a compiled graph; returns output, open pairs and scored keys."""
    if not torch.compiler.is_compiling():
        # Uncompiled FlexAttention makes the queries x keys tensor.
        raise BackendError(
            "FlexAttention was about to run uncompiled: torch.compile is switched off.",
            fix='Unset TORCHDYNAMO_DISABLE and torch.compiler.set_stance, or use backend="blockwise".',
        )
    query, key, value = call["query"], call["key"], call["value"]
    batch, heads, queries, _ = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    group = heads // kv_heads
    if query.device.type == "cpu":
        # Views, of a linear layer's output for instance, give failures or wrong numbers on CPU (torch 2.13).
        grouped = pinned(_rows(query, kv_heads)), pinned(key), pinned(value)
    else:
        query, key, value = (F.pad(x, (0, max(0, _SMALLEST_HEAD_DIM - x.shape[3]))) for x in (query, key, value))
        grouped = _rows(query, kv_heads), key, value
    masks = RowMasks.of(
        call["valid"],
        call["first"],
        call["slots"],
        group=group,
        sink_size=settings.sink_size,
        window_size=settings.window_size,
    )
    asked, unasked = (call[name][:, :, None].expand(-1, -1, group).flatten(1) for name in ("asked", "unasked"))
    sink_logits = None
    if "sink_logits" in call:
        sinks = call["sink_logits"].float().view(1, kv_heads, 1, group)
        sink_logits = sinks.expand(batch, -1, queries, -1).flatten(2)
    gate = _rows(call["gate"], kv_heads)
    if settings.two_passes:
        output, opened, scored = _two_passes(settings, masks, grouped, asked, unasked, gate, threshold, sink_logits)
    else:
        output, opened, scored = _one_pass(settings, masks, grouped, gate, unasked, sink_logits)

    def ungrouped(x: Tensor) -> Tensor:
        return x.unflatten(2, (queries, group)).transpose(2, 3).flatten(1, 2)

    return ungrouped(output)[..., :value_dim], ungrouped(opened), scored


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """Turn [batch, heads, query, ...] into [batch, kv_heads, query * group, ...]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)


def _two_passes(  # pragma: compiled
    settings: _Settings,
    masks: RowMasks,
    grouped: tuple[Tensor, Tensor, Tensor],
    asked: Tensor,
    unasked: Tensor,
    bulk_log_mass: Tensor,
    threshold: Tensor,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to local keys, decide, attend to bulk keys, merge."""
    query, key, value = grouped
    batch, kv_heads, rows, _ = query.shape
    # Flex decoding splits a full list by the length of all keys and a partial list by its own.
    with_full = rows >= ROW_TILE

    def one(query: Tensor, mask_and_count: tuple[BlockMask, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        block_mask, count = mask_and_count
        output, aux = flex_attention(
            query,
            key,
            value,
            score_mod=_score_mod(settings.softcap),
            block_mask=block_mask,
            scale=settings.scale,
            return_aux=AuxRequest(lse=True),
        )
        return output.float(), cast(Tensor, aux.lse), count.expand(-1, kv_heads).sum()

    size = block_size(batch, 1, rows, key.shape[2])
    output, log_mass, scored = one(query, masks.local(block=size, with_full=with_full))
    # What the kernels return for a row without keys differs between devices.
    log_mass = torch.where(masks.n_local_keys()[:, None] > 0, log_mass, -torch.inf)
    if sink_logits is not None:
        output = output * torch.sigmoid(log_mass - sink_logits)[..., None]
        log_mass = torch.logaddexp(log_mass, sink_logits)
    # A tensor, so that another threshold is not another graph.
    opened = decide(log_mass, bulk_log_mass, asked, threshold)
    reads_bulk = opened | unasked[:, None]

    size = block_size(batch, kv_heads, rows, key.shape[2])
    order, place = open_first(reads_bulk) if with_full else (None, None)
    if order is not None:  # a decode call has a single tile
        query = query.gather(2, order[..., None].expand_as(query))
    reach = masks.bulk_end(reads_bulk, order)
    bulk_output, bulk_log_mass, bulk_scored = one(query, masks.bulk(reach, block=size, with_full=with_full))
    if place is not None:
        bulk_output = bulk_output.gather(2, place[..., None].expand_as(bulk_output))
        bulk_log_mass = bulk_log_mass.gather(2, place)
    has_bulk = reads_bulk & (masks.n_bulk_keys()[:, None] > 0)
    share = torch.where(has_bulk, torch.sigmoid(bulk_log_mass - log_mass), 0)[..., None]
    has_local = (log_mass > -torch.inf) | log_mass.isnan()
    output = torch.where(has_local[..., None], output * (1 - share), 0)
    output = output + torch.where(has_bulk[..., None], bulk_output * share, 0)
    return output.to(query.dtype), opened, scored + bulk_scored


def _one_pass(  # pragma: compiled
    settings: _Settings,
    masks: RowMasks,
    grouped: tuple[Tensor, Tensor, Tensor],
    opened: Tensor,
    unasked: Tensor,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to local and open bulk keys at once; the sink logits are the scores of a last key without a value."""
    query, key, _ = grouped
    batch, kv_heads, rows, _ = query.shape
    size = block_size(batch, kv_heads, rows, key.shape[2])
    block_mask, count = masks.both(
        masks.bulk_end(opened | unasked[:, None]), block=size, null_key=sink_logits is not None
    )
    null = None
    if sink_logits is not None:
        null = key.shape[2] - 1, pinned(F.pad(sink_logits, (0, masks.slots.shape[0] - rows)))
    score_mod = _score_mod(settings.softcap, null)
    # Nothing pointwise may follow the kernel: it takes no epilogue on CPU (torch 2.13).
    output = flex_attention(*grouped, score_mod=score_mod, block_mask=block_mask, scale=settings.scale)
    return output, opened, count.expand(-1, kv_heads).sum()


def _score_mod(softcap: float | None, null: tuple[int, Tensor] | None = None) -> Callable[..., Tensor] | None:
    """Cap the scores, and give the null key its own.

    Args:
        softcap: Cap; None for none.
        null: Slot of the null key and its scores, [batch, kv_heads, rows]; None for none.
    """
    if softcap is None and null is None:
        return None

    def modify(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:  # pragma: compiled
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if null is not None:
            score = torch.where(key == null[0], null[1][b, h, row], score)
        return score

    return modify


def _kind(call: _Call, *, two_passes: bool) -> tuple[object, ...]:
    """Everything a call is compiled for except its dynamic lengths."""
    query, key, value = call["query"], call["key"], call["value"]
    batch, heads, queries, dim = query.shape
    length = min(queries, 2) if two_passes else queries
    return batch, heads, key.shape[1], dim, value.shape[3], length, query.dtype, query.device, "sink_logits" in call


@functools.cache
def _compiled(settings: _Settings, compiler: Compiler, _kind: tuple[object, ...]) -> Run:
    """Compile for one kind of call; each has its own count towards the recompile limit.

    Args:
        settings: Constants of the graph.
        compiler: Backend of torch.compile.
        _kind: Only tells functions apart.
    """

    def run(call: _Call, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _attend_call(settings, call, threshold)

    # Dynamo counts compilations per code object, and closures share theirs.
    run.__code__ = run.__code__.replace(co_name=f"run_{_compiled.cache_info().misses}")
    return torch.compile(run, fullgraph=True, backend=compiler, dynamic=None if settings.two_passes else False)


def _run_or_explain(
    settings: _Settings, compiler: Compiler, call: _Call, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a call compiled; what goes wrong in compiling it becomes a `BackendError`."""
    try:
        return _compiled(settings, compiler, _kind(call, two_passes=settings.two_passes))(call, threshold)
    except FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        raise BackendError(
            f"The compiled attention met more than {limit} kinds of shapes.",
            fix="Pad batches and lengths to fewer shapes, raise torch._dynamo.config.recompile_limit, or use "
            'backend="blockwise".',
        ) from error
    except TorchDynamoException as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise BackendError(
            f"FlexAttention could not be compiled for {call['query'].dtype} on {call['query'].device.type}: {reason}",
            fix='Use backend="blockwise".',
        ) from error


def _refuse_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BackendError(
            f"FlexAttention computes float32, float16 and bfloat16; got {dtype}.",
            fix='Use backend="blockwise" or backend="reference".',
        )
