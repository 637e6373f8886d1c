"""Exact log masses of local and bulk keys: what a gate wants to know and estimates tell cheaply.

All but `attention_scores` goes slab by slab, so that memory is linear in the number of keys; time is that of dense
attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions, host_may_read

# Slabs that fit a processor's cache take half of the time of large ones.
_SCORES_PER_SLAB_ON_HOST = 1 << 20
_SCORES_PER_SLAB = 1 << 25


@dataclass(frozen=True)
class Masses:
    """Exact log masses of a call, each [batch, heads, query] nats; -inf where there are no such keys.

    A mass that vanishes beside the largest score of its query, by 87 nats or more in float32, is -inf too.

    Args:
        local: Log mass of the local keys, sink logits included.
        bulk: Log mass of the bulk keys.
        largest_bulk: The largest score of a bulk key.
    """

    local: Tensor
    bulk: Tensor
    largest_bulk: Tensor


def attention_scores(inputs: AttentionInputs) -> Tensor:
    """Compute scaled and capped scores, [batch, heads, query, keys], in `inputs.compute_dtype`."""
    return scores_of(inputs.query.to(inputs.compute_dtype), inputs.key.to(inputs.compute_dtype), inputs)


def scores_of(query: Tensor, key: Tensor, inputs: AttentionInputs) -> Tensor:
    """Compute the scores of some queries and keys, with the scale and the softcap of a call."""
    scores = (by_kv_head(query, key.shape[1]) @ key.mT).view(*query.shape[:3], -1) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    return scores


def by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Put the rows of all query heads of a group one after another, [batch, kv_heads, group * query, ...].

    A product with keys or values then needs no copy of them for each query head.
    """
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def masked_log_mass(scores: Tensor, mask: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Log of the summed exponentials of the scores under a mask.

    Args:
        scores: [batch, heads, query, keys] nats.
        mask: Broadcasts against the scores; True keeps a key.
        sink_logits: [heads]; joins the sum once. None for none.

    Returns:
        [batch, heads, query] nats; -inf where nothing is kept.
    """
    return _with_sink_logits(scores.masked_fill(~mask, -torch.inf).logsumexp(-1), sink_logits)


def exact_masses(inputs: AttentionInputs, windows: Sequence[int] | None = None) -> list[Masses]:
    """Compute the exact log masses of a call.

    Args:
        inputs: The attention call.
        windows: Window sizes, all for one reading of the keys; None means the call's own.

    Returns:
        One for each window.
    """
    windows = [inputs.regions.window_size] if windows is None else windows
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in windows]
    for slab in _slabs(inputs):
        scores, terms, largest = _terms(slab)
        for window, of_window in zip(windows, found, strict=True):
            apart = _Split.of(replace(slab.regions, window_size=window))
            local, bulk = apart.sums(terms)
            local = _with_sink_logits(local.log() + largest, slab.sink_logits)
            of_window.append((local, bulk.log() + largest, apart.largest_bulk(scores)))
    return [Masses(*(torch.cat(parts, dim=2) for parts in zip(*slabs, strict=True))) for slabs in found]


def exact_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to every causal key, and tell the exact log masses that came by.

    Args:
        inputs: The attention call.

    Returns:
        Output [batch, heads, query, value_dim] in the query's dtype, zero where a query sees no key; log mass of the
        local and of the bulk keys, each [batch, heads, query] nats, see `Masses`.
    """
    parts = []
    for slab in _slabs(inputs):
        _, terms, largest = _terms(slab)
        local, bulk = (part.log() + largest for part in _Split.of(slab.regions).sums(terms))
        local = _with_sink_logits(local, slab.sink_logits)
        value = slab.value.to(terms.dtype)
        output = (by_kv_head(terms, value.shape[1]) @ value).view(*terms.shape[:3], -1)
        whole = torch.logaddexp(local, bulk)
        output = output * torch.where(whole == -torch.inf, 0, (largest - whole).exp())[..., None]
        parts.append((output.to(inputs.query.dtype), local, bulk))
    output, local, bulk = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return output, local, bulk


def _slabs(inputs: AttentionInputs) -> Iterator[AttentionInputs]:
    """Cut a call along its queries; where looking is free, without the keys that no query of the slab sees."""
    batch, heads, length, _ = inputs.query.shape
    regions, free = inputs.regions, host_may_read(inputs.query)
    most = _SCORES_PER_SLAB_ON_HOST if inputs.query.device.type == "cpu" else _SCORES_PER_SLAB
    rows = max(most // max(batch * heads * regions.key_length, 1), 16)
    for begin in range(0, max(length, 1), rows):
        end = min(begin + rows, length)
        last = min(regions.host.query_slot + end, regions.key_length) if free else regions.key_length
        yield replace(
            inputs,
            query=inputs.query[:, :, begin:end],
            key=inputs.key[:, :, :last],
            value=inputs.value[:, :, :last],
            regions=regions.cut(begin, end, last),
        )


def _terms(slab: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, their exponentials relative to the largest of each query, and that [batch, heads, query]."""
    scores = attention_scores(slab).masked_fill_(~slab.regions.causal_mask()[:, None], -torch.inf)
    largest = scores.amax(-1).clamp(min=torch.finfo(scores.dtype).min)
    return scores, (scores - largest[..., None]).exp_(), largest


@dataclass(frozen=True)
class _Split:
    """Keys that are bulk for every query, which need no mask, and the others.

    Args:
        certain: Slots that are bulk for every query.
        is_bulk: [batch, 1, query, others] bool; which of the other keys are bulk, those that no query sees aside.
    """

    certain: slice
    is_bulk: Tensor

    @classmethod
    def of(cls, regions: Regions) -> _Split:
        begin = end = 0
        if host_may_read(regions.valid):
            begin = regions.host.last_first + regions.sink_size
            end = regions.host.query_slot - regions.window_size + 1
            begin, end = (begin, end) if begin < end else (0, 0)
        slots = torch.arange(regions.key_length, device=regions.valid.device)
        certain = slice(begin, end)
        return cls(certain, regions.beyond_local(cls._others(slots, certain))[:, None])

    @staticmethod
    def _others(x: Tensor, certain: slice) -> Tensor:
        return torch.cat([x[..., : certain.start], x[..., certain.stop :]], dim=-1) if certain.stop else x

    def sums(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Sum terms, [batch, heads, query, keys], over the local and over the bulk keys."""
        others = self._others(terms, self.certain)
        bulk = terms[..., self.certain].sum(-1) + (others * self.is_bulk).sum(-1)
        return (others * ~self.is_bulk).sum(-1), bulk

    def largest_bulk(self, scores: Tensor) -> Tensor:
        """Return the largest score of a bulk key, [batch, heads, query]."""
        others = self._others(scores, self.certain).masked_fill(~self.is_bulk, -torch.inf)
        nothing = torch.full_like(scores[..., :1], -torch.inf)
        return torch.cat([nothing, scores[..., self.certain], others], dim=-1).amax(-1)


def _with_sink_logits(mass: Tensor, sink_logits: Tensor | None) -> Tensor:
    return mass if sink_logits is None else torch.logaddexp(mass, sink_logits.to(mass.dtype)[:, None])
