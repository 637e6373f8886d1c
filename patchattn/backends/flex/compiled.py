"""The compiled function: two passes merged by log-sum-exp, or one pass where the kernel does not return it."""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from patchattn.backends.flex.call import Call, Settings
from patchattn.backends.flex.masks import ROW_TILE, RowMasks, block_size, open_first, pinned
from patchattn.errors import BackendError
from patchattn.gates.decision import decide

Compiler = Literal["inductor", "aot_eager", "eager"]

Run = Callable[[Call, Tensor], tuple[Tensor, Tensor, Tensor]]

_SMALLEST_HEAD_DIM = 16  # of the Triton kernels
_MOST_LINES = 16  # of a compiler's message


def attend_call(  # pragma: compiled
    settings: Settings, call: Call, margin: Tensor
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
        grouped = pinned(rows_of(query, kv_heads)), pinned(key), pinned(value)
    else:
        query, key, value = (F.pad(x, (0, max(0, _SMALLEST_HEAD_DIM - x.shape[3]))) for x in (query, key, value))
        grouped = rows_of(query, kv_heads), key, value
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
    gate = rows_of(call["gate"], kv_heads)
    if settings.two_passes:
        output, opened, scored = _two_passes(settings, masks, grouped, asked, unasked, gate, margin, sink_logits)
    else:
        output, opened, scored = _one_pass(settings, masks, grouped, gate, unasked, sink_logits)

    def ungrouped(x: Tensor) -> Tensor:
        return x.unflatten(2, (queries, group)).transpose(2, 3).flatten(1, 2)

    return ungrouped(output)[..., :value_dim], ungrouped(opened), scored


def rows_of(x: Tensor, kv_heads: int) -> Tensor:
    """Turn [batch, heads, query, ...] into [batch, kv_heads, query * group, ...]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)


def _two_passes(  # pragma: compiled
    settings: Settings,
    masks: RowMasks,
    grouped: tuple[Tensor, Tensor, Tensor],
    asked: Tensor,
    unasked: Tensor,
    bulk_log_mass: Tensor,
    margin: Tensor,
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
    # A tensor, so that another margin is not another graph.
    opened = decide(log_mass, bulk_log_mass, asked, margin)
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
    settings: Settings,
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


def _kind(call: Call, *, two_passes: bool) -> tuple[object, ...]:
    """Everything a call is compiled for except its dynamic lengths."""
    query, key, value = call["query"], call["key"], call["value"]
    batch, heads, queries, dim = query.shape
    length = min(queries, 2) if two_passes else queries
    return batch, heads, key.shape[1], dim, value.shape[3], length, query.dtype, query.device, "sink_logits" in call


@functools.cache
def compiled(settings: Settings, compiler: Compiler, _kind: tuple[object, ...]) -> Run:
    """Compile for one kind of call; each has its own count towards the recompile limit.

    Args:
        settings: Constants of the graph.
        compiler: Backend of torch.compile.
        _kind: Only tells functions apart.
    """

    def run(call: Call, margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attend_call(settings, call, margin)

    # Dynamo counts compilations per code object, and closures share theirs.
    run.__code__ = run.__code__.replace(co_name=f"run_{compiled.cache_info().misses}")
    return torch.compile(run, fullgraph=True, backend=compiler, dynamic=None if settings.two_passes else False)


def run_or_explain(settings: Settings, compiler: Compiler, call: Call, margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a call compiled; what goes wrong in compiling it becomes a `BackendError`."""
    try:
        return compiled(settings, compiler, _kind(call, two_passes=settings.two_passes))(call, margin)
    except FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        raise BackendError(
            f"The compiled attention met more than {limit} kinds of shapes.",
            fix="Pad batches and lengths to fewer shapes, raise torch._dynamo.config.recompile_limit, or use "
            'backend="blockwise".',
        ) from error
    except TorchDynamoException as error:
        query, shapes = call["query"], (f"{name} {list(call[name].shape)}" for name in ("query", "key", "value"))
        raise BackendError(
            f"FlexAttention could not be compiled for {', '.join(shapes)}, {query.dtype} on {query.device.type}: "
            f"{_reason(error)}",
            fix='Use backend="blockwise".',
        ) from error


def _reason(error: TorchDynamoException) -> str:
    """Return what the compiler says: which operator or kernel, and why, without what it prints of their arguments."""
    told = re.split(r"\n\s*(?:args\[0\]: |Found from|from user code|Set TORCHDYNAMO_VERBOSE)", str(error), maxsplit=1)
    lines = told[0].strip().splitlines()
    # Triton prints the source of a kernel before what is wrong with it.
    kept = lines if len(lines) <= _MOST_LINES else [*lines[:4], "...", *lines[4 - _MOST_LINES :]]
    # Where Inductor names the kernel to its log only, the frame that compiles it knows the name.
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    return "\n".join([*(f"{frame['kernel_name']}:" for frame in frames if "kernel_name" in frame), *kept])
