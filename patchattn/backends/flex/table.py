"""Rows of one query each over pages of a store: one compiled function weighs and attends all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from patchattn.backends.flex.call import Settings
from patchattn.backends.flex.compiled import (
    Compiler,
    compile_alone,
    compile_beside,
    explained,
    kept,
    refuse_uncompiled,
)
from patchattn.backends.flex.owned import Layout, Owned
from patchattn.backends.flex.passes import decided, merged, one_pass, with_sink_logits
from patchattn.call.inputs import Attended
from patchattn.call.page_table import PageTable, TableInputs, on_device
from patchattn.gates.base import HeadGate, Known
from patchattn.gates.moment import MomentGate, with_offsets
from patchattn.gates.static import StaticGate
from patchattn.moments.gaussian import CHUNK, Estimate
from patchattn.moments.prompt import PromptMoments, evaluate_one


def attend_rows(  # pragma: compiled
    settings: Settings,
    layout: Layout,
    tensors: dict[str, Tensor],
    owned: Owned,
    mass: Tensor,
    margin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to local keys, decide, attend to bulk keys, merge; all rows at once.

    Args:
        settings: Sink, window, scale, softcap and whole groups.
        layout: That of the store.
        tensors: `query` [rows, kv_heads, group, dim]; `key` and `value` [1, kv_heads, places, dim]; and `sink_logits`
            [heads], where there are any.
        owned: What is whose.
        mass: [rows, heads] nats.
        margin: [] nats.

    Returns:
        Output [rows, heads, value_dim], open pairs [rows, heads] and scored keys of rows that are asked, [] int64.
    """
    refuse_uncompiled()
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    rows, kv_heads, group, _ = query.shape
    sinks = tensors.get("sink_logits")
    sinks = None if sinks is None else sinks.float().view(1, kv_heads, group).expand(rows, -1, -1)
    output, log_mass = one_pass(settings, query, key, value, owned.block_mask(settings, layout, group))
    log_mass = torch.where(owned.lengths[:rows, None, None] > 0, log_mass, -torch.inf)
    output, log_mass = with_sink_logits(output, log_mass, sinks)
    opened = decided(settings, log_mass, mass.unflatten(1, (kv_heads, group)), owned.asked[:, None], margin)
    has_bulk = (opened | ~owned.asked[:, None, None]) & (owned.n_bulk > 0)[:, None, None]
    counts = torch.where(has_bulk.any(2, keepdim=True), owned.bulk_counts, 0)
    bulk = one_pass(settings, query, key, value, owned.block_mask(settings, layout, group, counts))
    output = merged((output, log_mass), bulk, has_bulk)
    scored = torch.where(owned.asked[:, None, None], owned.local.counts + counts, 0).sum() * (layout.block * group)
    return output.to(query.dtype).flatten(1, 2), opened.flatten(1, 2), scored


def weigh_rows(  # pragma: compiled
    settings: Settings,
    layout: Layout,
    estimate: Estimate,
    tensors: dict[str, Tensor],
    owned: Owned,
    moments: tuple[Tensor, ...],
    offsets: Tensor | None,
    margin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh all rows by the moments of the prompt of each, and attend; see `attend_rows`.

    Args:
        settings: See `attend_rows`.
        layout: See `attend_rows`.
        estimate: See `MomentGate`.
        tensors: See `attend_rows`.
        owned: See `attend_rows`.
        moments: The parts of `PromptMoments`, with a row for each; of no matter where a row is not asked.
        offsets: [heads, 1] or [rows, heads, 1], see `MeasuredHeads.offsets`; None for none.
        margin: See `attend_rows`.
    """
    n_bulk, how = owned.n_bulk[:, None], {"scale": settings.scale, "softcap": settings.softcap, "estimate": estimate}
    mass = evaluate_one(tensors["query"].flatten(1, 2), PromptMoments(*moments), n_bulk, **how)
    # There are no moments before the first chunk is full.
    mass = torch.where(n_bulk >= CHUNK, mass, torch.inf)
    mass = mass if offsets is None else with_offsets(mass[..., None], offsets)[..., 0]
    return attend_rows(settings, layout, tensors, owned, mass, margin)


Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


@kept
def compiled_rows(
    settings: Settings, layout: Layout, compiler: Compiler, estimate: Estimate | None, _kind: tuple[object, ...]
) -> Run:
    """Compile `weigh_rows`, or without an estimate `attend_rows`, for one kind of call; see `compiled_call`."""

    def rows(tensors: dict[str, Tensor], owned: Owned, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = tensors["key"].shape[1]
        query = tensors["query"][0].index_select(1, owned.rows).transpose(0, 1).unflatten(1, (kv_heads, -1))
        ordered = {name: tensors[name].transpose(0, 1)[None] for name in ("key", "value")}
        given = tensors | ordered | {"query": query}
        if estimate is None:
            return attend_rows(settings, layout, given, owned, *rest)
        return weigh_rows(settings, layout, estimate, given, owned, *rest)

    return compile_alone(rows, compiler, dynamic=None)


@kept
def compiled_owned(
    settings: Settings, layout: Layout, compiler: Compiler, kv_heads: int, _kind: tuple[object, ...]
) -> Callable[..., Owned]:
    """Compile what is whose for one kind of call; see `compiled_call`."""

    def own(numbers: Tensor, places: Tensor, steps: Tensor) -> Owned:
        return Owned.of(settings, layout, numbers, places, steps, kv_heads)

    return compile_beside(own, compiler)


def attend_table_with(inputs: TableInputs, gate: HeadGate, known: Known, *, compiler: Compiler) -> Attended:
    """Weigh and attend the rows of a table, in one compiled function that waits for nothing.

    Args:
        inputs: The call.
        gate: The gate; one that reads no keys.
        known: What the gate may use. Of moments, positions and hidden states, a row for each of `PageTable.numbers`.
        compiler: As in `attend_with`.

    Returns:
        Output and decisions for the rows of the table, [rows, heads, 1, ...]; scored keys of those that are asked.

    Raises:
        BackendError: FlexAttention can't be compiled for this.
    """
    table, store = inputs.table, inputs.store
    count, device = len(table.rows), inputs.query.device
    sizes = table.sink_size, table.window_size
    settings = Settings(*sizes, float(inputs.scale), inputs.softcap, two_passes=True, opens_groups=inputs.whole_groups)
    layout = Layout(table.page_size, table.stride, len(store.key))
    tensors = {"query": inputs.query.detach(), "key": store.key, "value": store.value}
    if inputs.sink_logits is not None:
        tensors["sink_logits"] = inputs.sink_logits.detach()
    margin = table.once(("margin", gate.margin), lambda: torch.full((), gate.margin, device=device))
    estimate = gate.estimate if _weighs_here(gate, table) else None
    kind = _kind_of(tensors, table)
    with torch.no_grad(), explained(tensors):
        owned = _owned(settings, layout, table, store.key.shape[1], compiler)
        run = compiled_rows(settings, layout, compiler, estimate, kind)
        if estimate is None:
            rest = _mass_of(inputs, gate, known), margin
        else:
            assert known.moments is not None
            measured = known.measured
            offsets = None if measured is None else measured.offsets(known.hidden, torch.float32)
            rest = known.moments.parts, offsets, margin
        output, opened, scored = run(_with_dynamic_rows(tensors), owned, *rest)
    return Attended(output[:count].unsqueeze(2), opened[:count].unsqueeze(2), scored)


def attend_table(inputs: TableInputs, gate: HeadGate, known: Known) -> Attended:
    """Do what `attend_table_with` does, through Inductor."""
    return attend_table_with(inputs, gate, known, compiler="inductor")


def _weighs_here(gate: HeadGate, table: PageTable) -> TypeGuard[MomentGate]:
    is_moment = isinstance(gate, MomentGate) and type(gate).weigh is MomentGate.weigh and gate.keeps_moments
    return is_moment and any(one.is_asked for one in table.rows)


def _mass_of(inputs: TableInputs, gate: HeadGate, known: Known) -> Tensor:
    """Return what a gate says of the rows, [rows, heads] nats; nothing is asked of those that fill up."""
    table, heads = inputs.table, inputs.query.shape[1]
    count, rows = len(table.rows), table.numbers.shape[1]
    if not any(one.is_asked for one in table.rows):
        return table.once(("mass", heads), lambda: torch.zeros(rows, heads, device=inputs.query.device))
    if isinstance(gate, StaticGate) and type(gate).weigh is StaticGate.weigh:
        # Told to the device for all layers at once: in `weigh` each layer would wait for its own.
        told = table.once((gate, heads), lambda: on_device(gate.of_layers(heads), inputs.query.device))
        return told[min(known.layer, len(told) - 1)].repeat(rows, 1)
    positions, hidden = (None if x is None else x[:count] for x in (known.positions, known.hidden))
    mass, _ = gate.weigh(inputs.without_keys(), replace(known, positions=positions, hidden=hidden))
    return F.pad(mass[..., 0], (0, 0, 0, rows - count))


def _owned(settings: Settings, layout: Layout, table: PageTable, kv_heads: int, compiler: Compiler) -> Owned:
    settings = replace(settings, scale=1.0, softcap=None, opens_groups=False)

    def compute() -> Owned:
        longest = max(one.length for one in table.rows)
        steps = torch.arange(-(-longest // layout.block), device=table.places.device)
        places = table.places.view_as(table.places)  # the marks must not stay on the caller's tensors
        for x in (steps, places):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        kind = table.numbers.shape[1], places.device
        return compiled_owned(settings, layout, compiler, kv_heads, kind)(table.numbers, places, steps).mark_dynamic()

    return table.once((settings, layout, kv_heads), compute)


def _kind_of(tensors: dict[str, Tensor], table: PageTable) -> tuple[object, ...]:
    """Everything a call is compiled for, but for settings and layout."""
    query, key = tensors["query"], tensors["key"]
    sizes = table.numbers.shape[1], query.shape[1], min(query.shape[2], 2), query.shape[3], key.shape[1]
    return *sizes, query.dtype, query.device, "sink_logits" in tensors


def _with_dynamic_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    query = tensors["query"].view_as(tensors["query"])
    if query.shape[2] > 1:
        torch._dynamo.maybe_mark_dynamic(query, 2)
    return tensors | {"query": query}


def why_not(device: torch.device, page_size: int, dim: int) -> str | None:
    """Say what keeps rows from being attended over pages; None if nothing does."""
    if device.type == "cpu":
        return "FlexAttention returns no log-sum-exp on a CPU"
    if Layout(page_size, page_size, 0).block < 16 or dim < 16:
        return f"it takes pages of a multiple of 16 tokens and heads of 16 or more; these are {page_size} and {dim}"
    return None
