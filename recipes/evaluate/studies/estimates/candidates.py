"""Estimates of the bulk log mass that were tried: what each one knows of the far keys.

Prototypes for one sequence without padding; the library's own estimates are in `patchattn.moments.gaussian`. All see
far keys in whole chunks only, as the library does, and scale up to the true number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from patchattn.backends.blockwise.prefill import attend_local
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.moments.gaussian import CHUNK, Estimate, KeyMoments, log_mass_of_gaussian


class Call:
    """The pairs of one attention call that are asked.

    Attributes:
        query: [kv_heads, group, asked, dim], times the scale.
        key: [kv_heads, keys, dim]; the keys after the sink, of which query `i` has the first `n[i]` in its bulk.
        value: [kv_heads, keys, dim].
        n: [asked] number of bulk keys; `log_n` is its logarithm.
        local: [kv_heads, group, asked] log mass of the local keys, nats.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        self._inputs, sink = inputs, inputs.regions.sink_size
        self.query = self._asked(inputs.query) * inputs.scale
        self.key, self.value = inputs.key[0, :, sink:].float(), inputs.value[0, :, sink:].float()
        self.n = inputs.regions.n_bulk[0][inputs.regions.asked[0]]
        self.log_n = self.n.float().log()
        self.local = self._asked(attend_local(inputs, slice(0, inputs.query.shape[2]))[0].log_mass)

    def _asked(self, x: Tensor) -> Tensor:
        """Take the pairs that are asked, [1, heads, query, ...] -> [kv_heads, group, asked, ...]."""
        return x[0][:, self._inputs.regions.asked[0]].float().unflatten(0, (len(self._inputs.key[0]), -1))

    @cached_property
    def bulk(self) -> Tensor:
        """Exact log mass of the bulk keys, [kv_heads, group, asked] nats."""
        return self._asked(exact_masses(self._inputs)[0].bulk)

    @property
    def share(self) -> Tensor:
        """Exact share of the bulk keys, [heads, asked]."""
        return torch.sigmoid(self.bulk - self.local).flatten(0, 1)


Candidate = Callable[[Call], Tensor]
"""Estimates [kv_heads, group, asked] nats; NaN, which opens, where nothing is known yet."""


def exact(call: Call) -> Tensor:
    """The oracle."""
    return call.bulk


def _prefixes(call: Call) -> Iterator[tuple[Tensor, int]]:
    """Go through the numbers of keys in full chunks; say whose bulk has just so many, [asked]."""
    for chunks in range(1, int(call.n.max()) // CHUNK + 1):
        yield call.n // CHUNK == chunks, chunks * CHUNK


def prefix_moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores over the full chunks of each query's bulk, NaN before the first one is full."""
    mean = torch.full(call.query.shape[:3], torch.nan)
    variance = mean.clone()
    for rows, count in _prefixes(call):
        query, moments = call.query[:, :, rows], KeyMoments.of(call.key[:, :count])
        mean[:, :, rows] = torch.einsum("hgtd,hd->hgt", query, moments.mean)
        variance[:, :, rows] = (torch.einsum("hgtd,hde->hgte", query, moments.covariance) * query).sum(-1)
    return mean, variance


def gaussian(estimate: Estimate, *, freezing: float = torch.inf) -> Candidate:
    """One Gaussian for all far keys, as the library has it; opens above a multiple of the theory's freezing point."""

    def mass(call: Call) -> Tensor:
        mean, variance = prefix_moments(call)
        found = log_mass_of_gaussian(call.n, mean, variance, estimate=estimate)
        return torch.where(variance > 2 * freezing * call.log_n, torch.inf, found)

    return mass


def expected_bulk(call: Call) -> tuple[Tensor, Tensor]:
    """Estimate what closed heads miss: output of the bulk keys under one Gaussian of keys and values.

    Exponential tilting moves the mean of the values by their covariance with the score.

    Returns:
        Log mass [kv_heads, group, asked] nats, -inf above the freezing point, where the tilt is far off; and output
        [kv_heads, group, asked, dim].
    """
    mean, variance = prefix_moments(call)
    output = torch.zeros(*call.query.shape[:3], call.value.shape[-1])
    for rows, count in _prefixes(call):
        keys, values = call.key[:, :count], call.value[:, :count]
        centre = values.mean(1)
        cross = (keys - keys.mean(1, keepdim=True)).mT @ (values - centre[:, None]) / count
        output[:, :, rows] = centre[:, None, None] + torch.einsum("hgtd,hdv->hgtv", call.query[:, :, rows], cross)
    known = (variance <= 2 * call.log_n) & mean.isfinite()
    mass = torch.where(known, call.log_n + mean + variance / 2, -torch.inf)
    return mass, torch.where(known[..., None], output, 0)


def _chunked(size: int, masses_of: Callable[[Tensor, Tensor], Tensor]) -> Candidate:
    """Sum over full chunks of keys.

    Args:
        size: Keys in a chunk.
        masses_of: From query and keys, [kv_heads, chunks, size, dim], to log masses, [kv_heads, group, asked, chunks].
    """

    def mass(call: Call) -> Tensor:
        chunks = call.key.shape[1] // size
        masses = masses_of(call.query, call.key[:, : chunks * size].unflatten(1, (chunks, size)))
        full = call.n // size
        masses = masses.masked_fill(torch.arange(chunks) >= full[:, None], -torch.inf)
        return torch.where(full > 0, masses.logsumexp(-1) + (call.n / (full * size)).log(), torch.nan)

    return mass


def mixture(size: int, *, diagonal: bool = False) -> Candidate:
    """One Gaussian for each chunk of keys, each saturating by itself."""

    def masses(query: Tensor, chunks: Tensor) -> Tensor:
        found = []
        for keys in chunks.unbind(1):
            moments = KeyMoments.of(keys[:, None])
            if diagonal:
                moments = replace(moments, covariance=moments.covariance * torch.eye(keys.shape[-1]))
            found.append(moments.log_mass(query, torch.tensor(size), scale=1, estimate="saturating"))
        return torch.stack(found, -1)

    return _chunked(size, masses)


def boxes(size: int) -> Candidate:
    """The largest score that a chunk's box of keys allows (Quest, arXiv 2406.10774), summed over chunks."""

    def masses(query: Tensor, chunks: Tensor) -> Tensor:
        above = torch.einsum("hgtd,hcd->hgtc", query.clamp(min=0), chunks.amax(2))
        return above + torch.einsum("hgtd,hcd->hgtc", query.clamp(max=0), chunks.amin(2))

    return _chunked(size, masses)


def low_rank(rank: int) -> Candidate:
    """Score every key on the few directions that carry most of the scores' variance, a Gaussian for the rest.

    The directions are those of the whole document, queries and keys, which a running model would not know yet.
    """

    def mass(call: Call) -> Tensor:
        found = []
        for query, key in zip(call.query, call.key, strict=True):
            centre = key.mean(0)
            centred, rows = key - centre, query.flatten(0, 1)
            root = torch.linalg.cholesky(rows.mT @ rows / len(rows) + 1e-6 * torch.eye(rows.shape[1]))
            _, directions = torch.linalg.eigh(root.mT @ (centred.mT @ centred / len(key)) @ root)
            directions = directions[:, -rank:]
            rotated = torch.linalg.solve_triangular(root, rows.mT, upper=False).mT
            keys = centred @ root
            short = keys @ directions
            rest = keys - short @ directions.mT
            rest = ((rotated @ (rest.mT @ rest / len(key))) * rotated).sum(-1)
            scores = (rotated @ directions @ short.mT).unflatten(0, query.shape[:2])
            scores = scores.masked_fill_(torch.arange(len(key)) >= call.n[:, None], -torch.inf)
            found.append(scores.logsumexp(-1) + (rows @ centre + rest / 2).unflatten(0, query.shape[:2]))
        return torch.stack(found)

    return mass
