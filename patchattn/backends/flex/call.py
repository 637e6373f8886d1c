"""The tensors of one call as a compiled function takes them: cut into slabs, or padded to buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchattn.backends.flex.local import local_log_mass
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates.decision import decide

_SMALLEST_KEY_BUCKET = 512
SLAB = 4096
"""Queries of a two-pass call."""


@dataclass(frozen=True)
class Settings:
    """What a compiled function is specialised on."""

    sink_size: int
    window_size: int
    scale: float
    softcap: float | None
    two_passes: bool
    opens_groups: bool

    @classmethod
    def of(cls, inputs: AttentionInputs, *, two_passes: bool) -> Settings:
        """Take the settings of a call."""
        regions = inputs.regions
        sizes, opens_groups = (regions.sink_size, regions.window_size), inputs.opens_groups is not None
        return cls(*sizes, float(inputs.scale), inputs.softcap, two_passes, opens_groups)


Call = dict[str, Tensor]  # without sink_logits where there are none, and without gates that are not weighed yet
_OF_QUERIES = ("query", "gate")


def two_pass_call(inputs: AttentionInputs, bulk_log_mass: Tensor | None) -> Call:
    """Collect the tensors of a call whose lengths are dynamic; None leaves the gates to be found."""
    gate = {} if bulk_log_mass is None else {"gate": bulk_log_mass.detach()}
    tensors = {"query": inputs.query.detach(), "key": inputs.key.detach(), "value": inputs.value.detach()}
    return {**tensors, **gate, **_sink_logits(inputs)}


def places_of(regions: Regions, begin: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `valid` and `first` of regions, and the slot of query `begin`, with a dynamic number of keys."""
    valid = regions.valid.view_as(regions.valid)  # the mark must not stay on the caller's tensor
    torch._dynamo.maybe_mark_dynamic(valid, 1)
    return valid, regions.first, regions.query_slot + begin


def slabs_of(call: Call) -> Iterator[tuple[slice, Call]]:
    """Cut a call along its queries, `SLAB` of them at a time; the queries of each part, and the part."""
    length = call["query"].shape[2]
    if length <= SLAB:
        yield slice(0, length), call
        return
    for begin in range(0, length, SLAB):
        rows = slice(begin, min(begin + SLAB, length))
        # Contiguous, because strides that come from the whole length are part of what a graph is compiled for.
        yield rows, call | {name: call[name][:, :, rows].contiguous() for name in _OF_QUERIES if name in call}


def joined(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Put the results of slabs together."""
    outputs, opened, scored = zip(*parts, strict=True)
    if len(outputs) == 1:
        return outputs[0], opened[0], scored[0]
    output = torch.cat([part.transpose(1, 2) for part in outputs], dim=1).transpose(1, 2)  # each part is laid out so
    return output, torch.cat(opened, dim=2), torch.stack(scored).sum()


def with_dynamic_lengths(call: Call) -> Call:
    """Mark the lengths of a call as dynamic, on views: the marks must not stay on the caller's tensors."""
    names = ("key", "value", *_OF_QUERIES) if call["query"].shape[2] > 1 else ("key", "value")
    marked = {name: call[name].view_as(call[name]) for name in names if name in call}
    for x in marked.values():
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return call | marked


def one_pass_call(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float) -> Call:
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
    opened = decide(local, bulk_log_mass, regions.asked, margin, inputs.opens_groups)
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


def _sink_logits(inputs: AttentionInputs) -> Call:
    return {} if inputs.sink_logits is None else {"sink_logits": inputs.sink_logits.detach()}


def _bucket(length: int, smallest: int) -> int:
    bucket = smallest
    while bucket < length:
        bucket *= 2
    return bucket
