"""The compiled function: two passes merged by log-sum-exp, or one pass where the kernel does not return it."""

from __future__ import annotations

import functools
import itertools
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import flex_attention

from patchattn.backends.flex.call import SLAB, Call, Settings
from patchattn.backends.flex.masks import RowMasks, block_size, bulk_end, open_first, pinned
from patchattn.backends.flex.passes import decided, merged, modified, one_pass, with_sink_logits
from patchattn.backends.flex.shared import Shared, has_full_list
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.errors import BackendError
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.moment import with_offsets
from patchattn.moments.gaussian import CHUNK, Estimate
from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt

Compiler = Literal["inductor", "aot_eager", "eager"]

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]

_SMALLEST_HEAD_DIM = 16  # of the Triton kernels
_MOST_LINES = 16  # of a compiler's message


def attend_call(  # pragma: compiled
    settings: Settings, call: Call, shared: Shared, margin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend in two passes inside a compiled graph; returns output, open pairs and scored keys."""
    refuse_uncompiled()
    heads, kv_heads, value_dim = call["query"].shape[1], call["key"].shape[1], call["value"].shape[3]
    gate, sink_logits = rows_of(call["gate"], kv_heads), _sink_rows(call)
    output, opened, scored = _two_passes(settings, shared, _grouped(call), gate, margin, sink_logits)
    # Laid out as the model's next layer reads it: [batch, query, heads, value_dim].
    output = output[..., :value_dim].unflatten(2, (-1, heads // kv_heads)).transpose(1, 2).flatten(2, 3).transpose(1, 2)
    return output, ungrouped(opened, heads), scored


def weighed_call(  # pragma: compiled
    settings: Settings,
    estimate: Estimate,
    call: Call,
    shared: Shared,
    margin: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    moments: tuple[Tensor, ...],
    heads: tuple[Tensor | None, Tensor | None] | None,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Weigh the queries of a slab by the prompt moments before them, and attend.

    Args:
        settings: Constants of the graph.
        estimate: See `MomentGate`.
        call: The tensors of the slab; its gates are what this finds.
        shared: What the layers share.
        margin: [] nats.
        places: What `Regions` has of `valid`, `first` and `query_slot`.
        moments: The parts of `PromptMoments`.
        heads: Margins and probe of `MeasuredHeads`; None for none.
        hidden: Of the slab's queries, see `MeasuredHeads.offsets`; None where it is not known.

    Returns:
        Output, open pairs, scored keys, and the parts of the moments after the last query.
    """
    queries = call["query"].shape[2]
    regions = Regions(settings.sink_size, settings.window_size, queries, *places)
    inputs = AttentionInputs(call["query"], call["key"], call["value"], regions, settings.scale, settings.softcap)
    bound = 1 if queries == 1 else SLAB // CHUNK + 1
    mass, after = bulk_log_mass_from_prompt(inputs, PromptMoments(*moments), estimate=estimate, max_chunks=bound)
    offsets = None if heads is None else MeasuredHeads(heads[0], probe=heads[1]).offsets(hidden, mass.dtype)
    mass = mass if offsets is None else with_offsets(mass, offsets)
    return *attend_call(settings, call | {"gate": mass}, shared, margin), after.parts


def attend_at_once(settings: Settings, call: Call) -> tuple[Tensor, Tensor, Tensor]:  # pragma: compiled
    """Do the same in one pass, for a call whose decisions are made."""
    refuse_uncompiled()
    kv_heads, heads = call["key"].shape[1], call["query"].shape[1]
    masks = RowMasks.of(
        call["valid"],
        call["first"],
        call["slots"],
        group=heads // kv_heads,
        sink_size=settings.sink_size,
        window_size=settings.window_size,
    )
    query, key, value = _grouped(call)
    opened = rows_of(call["gate"], kv_heads)
    reads_bulk = rows_of((call["gate"] | call["unasked"][:, None]), kv_heads)
    batch, _, rows, _ = query.shape
    size, sinks = block_size(batch, kv_heads, rows, key.shape[2]), _sink_rows(call)
    ends = bulk_end(reads_bulk, masks.slots, settings.window_size)
    block_mask, count = masks.both(ends, block=size, null_key=sinks is not None)
    null = None
    if sinks is not None:
        null = key.shape[2] - 1, pinned(F.pad(sinks, (0, masks.slots.shape[0] - rows)))
    score_mod = modified(settings.softcap, null)
    # Nothing pointwise may follow the kernel: it takes no epilogue on CPU (torch 2.13).
    output = flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=settings.scale)
    return ungrouped(output, heads), ungrouped(opened, heads), count.expand(-1, kv_heads).sum()


def refuse_uncompiled() -> None:
    """Refuse to run FlexAttention outside of a graph."""
    if not torch.compiler.is_compiling():
        # Uncompiled FlexAttention makes the queries x keys tensor.
        raise BackendError(
            "FlexAttention was about to run uncompiled: torch.compile is switched off.",
            fix='Unset TORCHDYNAMO_DISABLE and torch.compiler.set_stance, or use backend="blockwise".',
        )


def _grouped(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the query, keys and values as kernels take them."""
    query, key, value = call["query"], call["key"], call["value"]
    kv_heads = key.shape[1]
    if query.device.type == "cpu":
        # Views, of a linear layer's output for instance, give failures or wrong numbers on CPU (torch 2.13).
        return pinned(rows_of(query, kv_heads)), pinned(key), pinned(value)
    query, key, value = (F.pad(x, (0, max(0, _SMALLEST_HEAD_DIM - x.shape[3]))) for x in (query, key, value))
    return rows_of(query, kv_heads), key, value


def _sink_rows(call: Call) -> Tensor | None:
    """Return the sink logits by row, [batch, kv_heads, rows] float32."""
    if "sink_logits" not in call:
        return None
    batch, _, queries, _ = call["query"].shape
    return call["sink_logits"].float().view(1, call["key"].shape[1], 1, -1).expand(batch, -1, queries, -1).flatten(2)


def rows_of(x: Tensor, kv_heads: int) -> Tensor:
    """Turn [batch, heads, query, ...] into [batch, kv_heads, query * group, ...]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)


def ungrouped(x: Tensor, heads: int) -> Tensor:
    """Undo `rows_of`."""
    return x.unflatten(2, (-1, heads // x.shape[1])).transpose(2, 3).flatten(1, 2)


def _two_passes(  # pragma: compiled
    settings: Settings,
    shared: Shared,
    grouped: tuple[Tensor, Tensor, Tensor],
    bulk_log_mass: Tensor,
    margin: Tensor,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to local keys, decide, attend to bulk keys, merge."""
    query, key, value = grouped
    keys = key.shape[2]

    output, log_mass = one_pass(settings, query, key, value, shared.local_mask(settings.window_size, keys))
    # What the kernels return for a row without keys differs between devices.
    log_mass = torch.where(shared.has_local[:, None], log_mass, -torch.inf)
    output, log_mass = with_sink_logits(output, log_mass, sink_logits)
    opened = decided(settings, log_mass, bulk_log_mass, shared.asked, margin)
    reads_bulk = opened | shared.unasked[:, None]

    order, place = open_first(reads_bulk) if has_full_list(query.shape[2]) else (None, None)
    if order is not None:  # a decode call has a single tile
        query = query.gather(2, order[..., None].expand_as(query))
    block_mask, scored = shared.bulk_mask(reads_bulk, order, settings.window_size, keys)
    bulk_output, bulk_log_mass = one_pass(settings, query, key, value, block_mask)
    if place is not None:
        bulk_output = bulk_output.gather(2, place[..., None].expand_as(bulk_output))
        bulk_log_mass = bulk_log_mass.gather(2, place)
    has_bulk = reads_bulk & shared.has_bulk[:, None]
    output = merged((output, log_mass), (bulk_output, bulk_log_mass), has_bulk)
    return output.to(query.dtype), opened, shared.local_scored + scored


def kind_of(call: Call, *, two_passes: bool) -> tuple[object, ...]:
    """Everything a call is compiled for except its dynamic lengths."""
    query, key, value = call["query"], call["key"], call["value"]
    batch, heads, queries, dim = query.shape
    length = min(queries, 2) if two_passes else queries
    return batch, heads, key.shape[1], dim, value.shape[3], length, query.dtype, query.device, "sink_logits" in call


_MADE: list[Any] = []
_Made = TypeVar("_Made", bound=Callable[..., Any])


def kept(make: _Made) -> _Made:
    """Make each compiled function once, until `forget`."""
    made = functools.cache(make)
    _MADE.append(made)
    return made  # pyright: ignore[reportReturnType]


@kept
def compiled_call(settings: Settings, compiler: Compiler, _kind: tuple[object, ...]) -> Run:
    """Compile for one kind of call; each has its own count towards the recompile limit.

    Args:
        settings: Constants of the graph.
        compiler: Backend of torch.compile.
        _kind: Only tells functions apart.
    """

    def run(call: Call, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attend_call(settings, call, *more) if settings.two_passes else attend_at_once(settings, call)

    return compile_alone(run, compiler, dynamic=None if settings.two_passes else False)


@kept
def compiled_weighed(settings: Settings, compiler: Compiler, estimate: Estimate, _kind: tuple[object, ...]) -> Any:
    """Compile `weighed_call` for one kind of call; see `compiled_call`."""

    def weigh(call: Call, *more: Any) -> Any:
        return weighed_call(settings, estimate, call, *more)

    return compile_alone(weigh, compiler, dynamic=None)


@kept
def compiled_shared(
    settings: Settings, compiler: Compiler, heads: int, kv_heads: int, _kind: tuple[object, ...]
) -> Callable[..., Shared]:
    """Compile what layers share for one kind of call, whatever scale and softcap; see `compiled_call`."""

    def share(*tensors: Tensor) -> Shared:
        return Shared.of(settings, *tensors, heads=heads, kv_heads=kv_heads)

    return compile_beside(share, compiler)


def compile_alone(run: Callable[..., Any], compiler: Compiler, *, dynamic: bool | None) -> Callable[..., Any]:
    """Compile a function into whole graphs, with a count of its own towards the recompile limit."""
    # Dynamo counts compilations per code object, and closures share theirs.
    run.__code__ = run.__code__.replace(co_name=f"{run.__name__}_{next(_NUMBERS)}")
    # What these functions return is kept from call to call, and a CUDA graph of their own would overwrite it.
    options: Any = {"triton.cudagraphs": False} if compiler == "inductor" else None
    return torch.compile(run, fullgraph=True, backend=compiler, dynamic=dynamic, options=options)


def compile_beside(run: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    """Compile what has no kernel that has to be compiled, so that the compilers for tests leave it as it is."""
    return compile_alone(run, compiler, dynamic=None) if compiler == "inductor" else run


_NUMBERS = itertools.count()


def forget() -> None:
    """Forget every compiled function: after `torch.compiler.reset()` they would be compiled under old counts."""
    for made in _MADE:
        made.cache_clear()


def shared_of(settings: Settings, compiler: Compiler, call: Call, regions: Regions, rows: slice) -> Shared:
    """Compute what the layers share of a slab: once, outside of a graph.

    Args:
        settings: Sink and window.
        compiler: Backend of torch.compile.
        call: The slab, for its sizes.
        regions: Those of the whole call.
        rows: Which of its queries the slab has.
    """
    (_, heads, queries, _), kv_heads = call["query"].shape, call["key"].shape[1]

    def compute() -> Shared:
        of_rows = regions.query_slots[rows], regions.asked[:, rows], regions.unasked[:, rows]
        tensors = regions.valid, regions.first, *of_rows
        if torch.compiler.is_compiling():
            return Shared.of(settings, *tensors, heads=heads, kv_heads=kv_heads)
        views = [x.view_as(x) for x in tensors]  # the marks must not stay on the caller's tensors
        for x, axis in zip(views, (1, None, 0, 1, 1), strict=True):
            if axis is not None and (queries > 1 or x is views[0]):
                torch._dynamo.maybe_mark_dynamic(x, axis)
        kind = len(regions.first), min(queries, 2), regions.valid.device
        local = replace(settings, scale=1.0, softcap=None, opens_groups=False)
        shared = compiled_shared(local, compiler, heads, kv_heads, kind)(*views)
        return shared.mark_dynamic(queries=queries > 1)

    return regions.once((Shared, heads, kv_heads, rows.start, rows.stop), compute)


@contextmanager
def explained(call: Call) -> Iterator[None]:
    """Turn what goes wrong in compiling a call into a `BackendError`."""
    try:
        yield
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
