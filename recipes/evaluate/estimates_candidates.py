"""Estimates of the bulk log mass that were tried: what each one knows of the far keys, and what it costs.

Prototypes for one sequence without padding, to be judged by `estimates.py`; the library's own estimates are in
`patchattn.moments.gaussian`. All see far keys in whole chunks only, as the library does, and scale up to the true
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.moments.gaussian import CHUNK, log_mass_of_gaussian


@dataclass(frozen=True)
class Call:
    """The pairs of one attention call that are asked.

    Args:
        query: [kv_heads, group, asked, dim], times the scale.
        key: [kv_heads, keys, dim]; the keys after the sink, of which query `i` has the first `n[i]` in its bulk.
        value: [kv_heads, keys, dim].
        n: [asked] number of bulk keys.
        local: [kv_heads, group, asked] log mass of the local keys, nats.
        bulk: [kv_heads, group, asked] exact log mass of the bulk keys, nats; None where it is not needed.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    n: Tensor
    local: Tensor
    bulk: Tensor | None

    @classmethod
    def of(cls, inputs: AttentionInputs, local: Tensor, bulk: Tensor | None = None) -> Call:
        """Take the pairs that are asked out of a call; masses are [1, heads, query]."""
        regions, kv_heads = inputs.regions, inputs.key.shape[1]
        asked = regions.asked[0]

        def grouped(x: Tensor) -> Tensor:
            return x[0][:, asked].float().unflatten(0, (kv_heads, -1))

        return cls(
            grouped(inputs.query) * inputs.scale,
            inputs.key[0, :, regions.sink_size :].float(),
            inputs.value[0, :, regions.sink_size :].float(),
            regions.n_bulk[0][asked],
            grouped(local),
            None if bulk is None else grouped(bulk),
        )


Candidate = Callable[[Call], Tensor]
"""Estimates [kv_heads, group, asked] nats; NaN, which opens, where nothing is known yet."""


def prefix_moments(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores over the full chunks of each query's bulk, NaN before the first one is full."""
    mean = torch.full(call.query.shape[:3], torch.nan)
    variance = mean.clone()
    for chunks in range(1, int(call.n.max()) // CHUNK + 1):
        rows = call.n // CHUNK == chunks
        keys, query = call.key[:, : chunks * CHUNK], call.query[:, :, rows]
        centre = keys.mean(1)
        centred = keys - centre[:, None]
        covariance = centred.mT @ centred / keys.shape[1]
        mean[:, :, rows] = torch.einsum("hgtd,hd->hgt", query, centre)
        variance[:, :, rows] = (torch.einsum("hgtd,hde->hgte", query, covariance) * query).sum(-1)
    return mean, variance


def gaussian(estimate: str, freezing: float = 1.0) -> Candidate:
    """One Gaussian for all far keys: the library's estimates; `guarded` may freeze elsewhere than the theory says."""

    def mass(call: Call) -> Tensor:
        mean, variance = prefix_moments(call)
        kind = "lognormal" if estimate == "lognormal" else "saturating"
        found = log_mass_of_gaussian(call.n.float(), mean, variance, estimate=kind)
        if estimate == "guarded":
            found = torch.where(variance > 2 * freezing * call.n.float().log(), torch.inf, found)
        return found

    return mass


def exact(call: Call) -> Tensor:
    """The oracle."""
    assert call.bulk is not None
    return call.bulk


def _chunks(call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Cut the keys into chunks, [kv_heads, chunks, size, dim]; say which are full for whom, [asked, chunks]."""
    count = call.key.shape[1] // size
    keys = call.key[:, : count * size].unflatten(1, (count, size))
    return keys, torch.arange(count) < (call.n // size)[:, None]


def _sum_of_chunks(masses: Tensor, full: Tensor, call: Call, size: int) -> Tensor:
    covered = (call.n // size * size).float()
    total = masses.masked_fill(~full, -torch.inf).logsumexp(-1) + (call.n / covered).log()
    return torch.where(covered > 0, total, torch.nan)


def mixture(size: int, *, diagonal: bool) -> Candidate:
    """One Gaussian for each chunk of keys, each saturating by itself."""

    def mass(call: Call) -> Tensor:
        keys, full = _chunks(call, size)
        centre = keys.mean(2)
        centred = keys - centre[:, :, None]
        mean = torch.einsum("hgtd,hcd->hgtc", call.query, centre)
        if diagonal:
            variance = torch.einsum("hgtd,hcd->hgtc", call.query.square(), centred.square().mean(2))
        else:
            covariance = centred.mT @ centred / size
            variance = torch.stack(
                [
                    (torch.einsum("hgtd,hde->hgte", call.query, one) * call.query).sum(-1)
                    for one in covariance.unbind(1)
                ],
                dim=-1,
            )
        masses = log_mass_of_gaussian(torch.tensor(float(size)), mean, variance, estimate="saturating")
        return _sum_of_chunks(masses, full, call, size)

    return mass


def boxes(size: int) -> Candidate:
    """The largest score that a chunk's box of keys allows (Quest, arXiv 2406.10774), summed over chunks."""

    def mass(call: Call) -> Tensor:
        keys, full = _chunks(call, size)
        above = torch.einsum("hgtd,hcd->hgtc", call.query.clamp(min=0), keys.amax(2))
        below = torch.einsum("hgtd,hcd->hgtc", call.query.clamp(max=0), keys.amin(2))
        return _sum_of_chunks(above + below, full, call, size)

    return mass


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


def cost(name: str, keys: int, dim: int) -> float:
    """Multiply-adds of an estimate for one query, as a share of scoring all far keys."""
    kind, _, size = name.partition(" ")
    chunk = int(size) if size.isdigit() else 1
    by_kind = {
        "moments": dim * (dim + 1),
        "mixture": keys / chunk * dim * (dim + 1),
        "diagonal": keys / chunk * 2 * dim,
        "boxes": keys / chunk * 2 * dim,
        "rank": (keys + dim) * chunk,
        "linear": dim,
        "exact": keys * dim,
    }
    return by_kind[kind] / (keys * dim)


def expected_bulk(call: Call, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate what closed heads miss: output of the bulk keys under one Gaussian of keys and values.

    Exponential tilting moves the mean of the values by their covariance with the score.

    Returns:
        Log mass [kv_heads, group, asked] nats, -inf above the freezing point, where the tilt is far off; and output
        [kv_heads, group, asked, dim].
    """
    output = torch.zeros(*call.query.shape[:3], call.value.shape[-1])
    for chunks in range(1, int(call.n.max()) // CHUNK + 1):
        rows = call.n // CHUNK == chunks
        keys, values = call.key[:, : chunks * CHUNK], call.value[:, : chunks * CHUNK]
        centre = values.mean(1)
        cross = (keys - keys.mean(1, keepdim=True)).mT @ (values - centre[:, None]) / keys.shape[1]
        output[:, :, rows] = centre[:, None, None] + torch.einsum("hgtd,hdv->hgtv", call.query[:, :, rows], cross)
    log_n = call.n.float().log()
    known = (variance <= 2 * log_n) & mean.isfinite()
    mass = torch.where(known, log_n + mean + variance / 2, -math.inf)
    return mass, torch.where(known[..., None], output, 0)
