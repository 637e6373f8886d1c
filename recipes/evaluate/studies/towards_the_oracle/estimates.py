"""What cheap looks at the far keys say about a head's change of output: sketches, clusters, boxes, a third state.

Prototypes for one sequence without padding. All look at queries whose bulk has the same number of full chunks of keys;
what is kept for keys is kept for full chunks, as the library does, and scaled up to the true number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from patchattn.call.inputs import AttentionInputs
from patchattn.moments.gaussian import CHUNK, KeyMoments, log_mass_of_gaussian

RANKS, CLUSTERS, BOX = (4, 8, 16), (2, 4), 16
AJAR, TOP = 64, 4
"""What a head that is ajar reads beside its local keys: the best `TOP` blocks of `AJAR` keys, and the keys of the last
chunk, which is not full."""

_STEPS = 8
_TINY = 1e-12


class Far(NamedTuple):
    """Some queries and their bulk, which has `chunks` full chunks of keys.

    Args:
        query: [kv_heads, group, rows, dim], times the scale.
        key: [kv_heads, keys, dim]; the keys after the sink, of which query `i` has the first `n[i]` in its bulk.
        value: [kv_heads, keys, dim].
        n: [rows].
        chunks: Full chunks.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    n: Tensor
    chunks: int

    @property
    def full(self) -> slice:
        """The keys in full chunks."""
        return slice(0, self.chunks * CHUNK)

    def masked(self, scores: Tensor) -> Tensor:
        """Leave out what is not in the bulk, [kv_heads, group, rows, keys]; in place."""
        return scores.masked_fill_(torch.arange(scores.shape[-1]) >= self.n[:, None], -torch.inf)


class Seen(NamedTuple):
    """What is known of the bulk: log mass [kv_heads, group, rows] nats, output [kv_heads, group, rows, dim]."""

    mass: Tensor
    output: Tensor


def by_chunks(inputs: AttentionInputs, rows: Tensor) -> Iterator[tuple[Tensor, Far]]:
    """Part queries by the full chunks of their bulk; yields which of the rows, and what they see.

    Args:
        inputs: All tokens of one document.
        rows: [rows] int64; queries with a full chunk or more.
    """
    sink, kv_heads = inputs.regions.sink_size, inputs.key.shape[1]
    query = (inputs.query[0, :, rows].float() * inputs.scale).unflatten(0, (kv_heads, -1))
    key, value = inputs.key[0, :, sink:].float(), inputs.value[0, :, sink:].float()
    n = inputs.regions.n_bulk[0, rows]
    for chunks in (n // CHUNK).unique().tolist():
        of_chunk = (n // CHUNK == chunks).nonzero()[:, 0]
        most = int(n[of_chunk].max())
        yield of_chunk, Far(query[:, :, of_chunk], key[:, :most], value[:, :most], n[of_chunk], chunks)


def change(seen: Seen, local: Tensor, output: Tensor) -> Tensor:
    """Return the logarithm of the squared change of output that closing brings, [kv_heads, group, rows].

    Args:
        seen: What is known of the bulk.
        local: [kv_heads, group, rows] nats; log mass of the local keys.
        output: [kv_heads, group, rows, dim]; of the local keys alone.
    """
    return 2 * logsigmoid(seen.mass - local) + ((seen.output - output).square().sum(-1) + _TINY).log()


def exact_scores(far: Far) -> Tensor:
    """Score every key, [kv_heads, group, rows, keys] nats; -inf where it is not in the bulk."""
    return far.masked(far.query @ far.key[:, None].mT)


def read(far: Far, scores: Tensor) -> Seen:
    """Read the keys that scores leave."""
    return Seen(scores.logsumexp(-1), scores.softmax(-1) @ far.value[:, None])


@dataclass(frozen=True)
class Basis:
    """Directions in which the scores of a KV head vary most, on other documents; [kv_heads, dim, dim], most first.

    A key `k` is sketched as `k @ keys[:, :r]` and a query `q` as `q @ queries[:, :r]`.
    """

    keys: Tensor
    queries: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Basis:
        """Find it from second moments of queries and covariances of keys, [kv_heads, dim, dim] each."""
        identity = torch.eye(query.shape[-1], dtype=query.dtype)
        scale = query.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        root = torch.linalg.cholesky(query + 1e-6 * scale * identity)
        directions = torch.linalg.eigh(root.mT @ key @ root).eigenvectors.flip(-1)
        return cls((root @ directions).float(), torch.linalg.solve_triangular(root.mT, directions, upper=True).float())


def moments_of_values(far: Far) -> Seen:
    """One Gaussian of keys and values: what scores weigh up moves the mean of the values by their covariance."""
    keys, values = far.key[:, far.full], far.value[:, far.full]
    moments, centre = KeyMoments.of(keys), values.mean(1, keepdim=True)
    cross = (keys - moments.mean[:, None]).mT @ (values - centre) / keys.shape[1]
    return Seen(_gaussian(far, moments, "lognormal"), centre[:, None] + far.query @ cross[:, None])


def spread(far: Far) -> Tensor:
    """Return the variance of the scores over that of the freezing point, [kv_heads, group, rows]."""
    covariance = KeyMoments.of(far.key[:, far.full]).covariance
    return ((far.query @ covariance[:, None]) * far.query).sum(-1) / (2 * far.n.float().log())


def _gaussian(far: Far, moments: KeyMoments, estimate: str) -> Tensor:
    mean = (far.query @ moments.mean[:, None, :, None])[..., 0]
    variance = ((far.query @ moments.covariance[:, None]) * far.query).sum(-1)
    return log_mass_of_gaussian(far.n, mean, variance, estimate=estimate)  # pyright: ignore[reportArgumentType]


def sketched_scores(far: Far, basis: Basis, rank: int) -> tuple[Tensor, Tensor]:
    """Score every key in a few directions, [kv_heads, group, rows, keys]; and the keys, [kv_heads, keys, rank]."""
    short = far.key @ basis.keys[..., :rank]
    return far.masked((far.query @ basis.queries[:, None, :, :rank]) @ short[:, None].mT), short


def sketch(far: Far, basis: Basis, rank: int) -> Seen:
    """Score every key in a few directions, one Gaussian for the others; values are means over boxes of keys."""
    scores, short = sketched_scores(far, basis, rank)
    along = basis.queries[..., :rank]
    rest = far.key[:, far.full] - short[:, far.full] @ along.mT
    others = _gaussian(far, KeyMoments.of(rest), "lognormal") - far.n.float().log()
    boxes = -(-scores.shape[-1] // BOX)
    padding = boxes * BOX - scores.shape[-1]
    share = torch.nn.functional.pad(scores.softmax(-1), (0, padding)).unflatten(-1, (boxes, BOX)).sum(-1)
    values = torch.nn.functional.pad(far.value, (0, 0, 0, padding)).unflatten(1, (boxes, BOX)).sum(2)
    sizes = torch.full((boxes, 1), float(BOX))
    sizes[-1] -= padding
    return Seen(scores.logsumexp(-1) + others, share @ (values / sizes)[:, None])


def _of_groups(far: Far, count: Tensor, mean: Tensor, variance: Tensor, value: Tensor) -> Seen:
    """Add up groups of keys, each a Gaussian without correlations; [kv_heads, groups, ...]."""
    centre, of_scores = far.query @ mean[:, None].mT, far.query.square() @ variance[:, None].mT
    masses = log_mass_of_gaussian(count[:, None, None], centre, of_scores, estimate="saturating")
    grown = (far.n.float() / (far.chunks * CHUNK)).log()
    return Seen(masses.logsumexp(-1) + grown, masses.softmax(-1) @ value[:, None])


def boxes(far: Far, size: int = BOX) -> Seen:
    """Keep mean and variances of the keys, and the mean of the values, of so many keys in a row."""
    keys = far.key[:, far.full].unflatten(1, (-1, size))
    values = far.value[:, far.full].unflatten(1, (-1, size)).mean(2)
    count = torch.full(keys.shape[:2], size)
    return _of_groups(far, count, keys.mean(2), keys.var(2, correction=0), values)


def clustered(key: Tensor, clusters: int) -> Tensor:
    """Part keys by k-means, [kv_heads, keys, dim] -> [kv_heads, keys] int64.

    It looks at the whole document, which a running model would not know yet.
    """
    centres = key[:, torch.linspace(0, key.shape[1] - 1, clusters).long()]
    labels = torch.zeros(key.shape[:2], dtype=torch.long)
    for _ in range(_STEPS):
        labels = torch.cdist(key, centres).argmin(-1)
        member = one_hot(labels, clusters).to(key.dtype)
        centres = member.mT @ key / member.sum(1).clamp(min=1)[..., None]
    return labels


def clusters(far: Far, labels: Tensor, count: int) -> Seen:
    """Keep count, mean and variances of the keys, and the mean of the values, of a few clusters."""
    keys, values = far.key[:, far.full], far.value[:, far.full]
    member = one_hot(labels[:, far.full], count).float().mT  # [kv_heads, clusters, keys]
    size = member.sum(-1)
    mean, square, value = ((member @ x) / size.clamp(min=1)[..., None] for x in (keys, keys.square(), values))
    return _of_groups(far, size, mean, (square - mean.square()).clamp(min=0), value)


def by_moments(far: Far) -> Tensor:
    """Rank blocks by mean and variances of their keys, [kv_heads, group, rows, blocks] nats."""
    keys = _blocks(far)
    mean, variance = keys.mean(2), keys.var(2, correction=0)
    centre, of_scores = far.query @ mean[:, None].mT, far.query.square() @ variance[:, None].mT
    return log_mass_of_gaussian(torch.tensor(AJAR), centre, of_scores, estimate="saturating")


def by_bounds(far: Far) -> Tensor:
    """Rank blocks by the largest score that the bounds of their keys allow (Quest, arXiv 2406.10774)."""
    keys = _blocks(far)
    most, least = keys.amax(2)[:, None].mT, keys.amin(2)[:, None].mT
    return far.query.clamp(min=0) @ most + far.query.clamp(max=0) @ least


def by_scores(far: Far, scores: Tensor) -> Tensor:
    """Rank blocks by scores of all keys, [kv_heads, group, rows, keys]."""
    return scores[..., far.full].unflatten(-1, (-1, AJAR)).logsumexp(-1)


def _blocks(far: Far) -> Tensor:
    return far.key[:, far.full].unflatten(1, (-1, AJAR))


def ajar(far: Far, scores: Tensor, ranked: Tensor) -> Seen:
    """Read the best blocks of keys, and the keys of the chunk that is not full.

    Args:
        far: Queries and their bulk.
        scores: [kv_heads, group, rows, keys] exact ones.
        ranked: [kv_heads, group, rows, blocks]; the largest are read.
    """
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen.scatter_(-1, ranked.topk(min(TOP, ranked.shape[-1])).indices, value=True)
    found = scores.clone()
    found[..., far.full].masked_fill_(~chosen.repeat_interleave(AJAR, -1), -torch.inf)
    return read(far, found)
