"""Estimates of the bulk log mass that were tried: what each one knows of the far keys, and thresholds for them.

Prototypes for one sequence without padding; the library's own estimates are in `patchattn.moments.gaussian`. All see
far keys in whole chunks only, as the library does, and scale up to the true number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from patchattn.backends.blockwise.prefill import attend_local
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.moments.gaussian import CHUNK, Estimate, KeyMoments, log_mass_of_gaussian

_STEPS = 60
_DECAY = 1e-4
_GRID = 200


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


def fit_probe(calls: list[Call], *, quadratic: bool) -> Candidate:
    """Fit a logistic regression for each head of a layer, from the query to the exact share of the bulk keys.

    Args:
        calls: Calls whose exact log mass is known; every second pair is fitted.
        quadratic: Whether products of the query's components are among the features.
    """
    x = torch.cat([features(call, quadratic=quadratic)[:, ::2] for call in calls], 1)
    share = torch.cat([call.share[:, ::2] for call in calls], 1)
    centre, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-3)
    x = (x - centre) / scale
    weight = torch.zeros(x.shape[0], x.shape[2], 1, requires_grad=True)
    bias = torch.zeros(x.shape[0], 1, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        logits = (x @ weight)[..., 0] + bias
        loss = binary_cross_entropy_with_logits(logits, share, reduction="none").mean(1).sum()
        loss = loss + _DECAY * weight.square().sum()
        loss.backward()
        return loss

    search.step(closure)

    @torch.no_grad()
    def mass(call: Call) -> Tensor:
        logits = ((features(call, quadratic=quadratic) - centre) / scale @ weight)[..., 0] + bias
        return call.local + logits.view_as(call.local)

    return mass


def features(call: Call, *, quadratic: bool) -> Tensor:
    """Local log mass, log of the number of bulk keys and the query, [heads, asked, features]."""
    query = call.query.flatten(0, 1)
    known = torch.stack([call.local.flatten(0, 1), call.log_n.expand(query.shape[:2])], -1)
    if not quadratic:
        return torch.cat([known, query], -1)
    row, column = torch.triu_indices(query.shape[-1], query.shape[-1])
    return torch.cat([known, query, query[..., row] * query[..., column]], -1)


def common_threshold(margins: Tensor, fraction: float) -> Tensor:
    """Find the margin below which a share of all pairs lies; [heads, pairs] -> [heads], all equal.

    A candidate that opens more than that whatever the threshold gets NaN.
    """
    ordered = torch.where(margins.isnan(), -torch.inf, margins).flatten().sort().values
    found = ordered[int(fraction * len(ordered))]
    return torch.where(found == -torch.inf, torch.nan, found).expand(len(margins))


def thresholds_by_head(margins: Tensor, share: Tensor, fraction: float) -> Tensor:
    """Choose a threshold for each head so that all miss least while a share of the pairs is open.

    Args:
        margins: [heads, pairs] nats; -inf and NaN can't be told apart from one another.
        share: [heads, pairs] exact share of the bulk keys.
        fraction: Open fraction over all heads.

    Returns:
        [heads]; -inf closes a head for good, +inf opens it.
    """
    pairs = margins.shape[1]
    ordered, order = torch.where(margins.isnan(), -torch.inf, margins).sort(1)
    found = share.gather(1, order).double().cumsum(1)
    opened = torch.linspace(0, pairs, _GRID).long()
    missed = (found[:, -1:] - torch.cat([torch.zeros(len(found), 1), found], 1)[:, opened]) / pairs
    alike = (ordered == -torch.inf).sum(1, keepdim=True)
    missed = missed.masked_fill((opened > 0) & (opened < alike), torch.inf)
    low, high = 0.0, 1.0
    for _ in range(40):
        price = (low + high) / 2
        chosen = (missed + price * opened / pairs).argmin(1)
        low, high = (price, high) if opened[chosen].double().mean() > fraction * pairs else (low, price)
    chosen = opened[(missed + high * opened / pairs).argmin(1)]
    inf = torch.full_like(ordered[:, :1], torch.inf)
    edges = torch.cat([-inf, ordered[:, 1:], inf], 1)  # a margin below edge j is one of the first j
    return edges.gather(1, chosen[:, None])[:, 0]
