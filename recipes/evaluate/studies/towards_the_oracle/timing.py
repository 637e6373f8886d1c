"""What a look at the far keys takes, beside reading them all: one layer of the real model's shape, random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from context import Context, Job, Measurement
from studies.towards_the_oracle.estimates import AJAR, BOX, TOP
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KV_HEADS, GROUP, DIM = 3, 3, 64
ROWS = {"decode": 1, "prefill": 256}
"""Queries at a time; in prefill a part of them, that of the last rows."""

KEYS = (2048, 8192)
_REPEATS, _WARMING_UP = 20, 3


@dataclass(frozen=True)
class Timed:
    """Seconds that one look takes for the queries of one layer, the least of some repeats; one thread, float32."""

    phase: str
    keys: int
    look: str
    seconds: float


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT


def _read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _scores(query, key).softmax(-1) @ value


def looks(rows: int, keys: int) -> dict[str, Callable[[], object]]:
    """Return the looks by name; what is kept for keys is there already."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    query = drawn(KV_HEADS, GROUP * rows, DIM) / DIM**0.5
    key, value, covariance = drawn(KV_HEADS, keys, DIM), drawn(KV_HEADS, keys, DIM), drawn(KV_HEADS, DIM, DIM)
    hidden, probe = drawn(rows, KV_HEADS * GROUP * DIM), drawn(KV_HEADS * GROUP * DIM, KV_HEADS * GROUP)
    boxes, blocks = (x.unflatten(1, (-1, size)) for x, size in ((key, BOX), (key, AJAR)))
    values = value.unflatten(1, (-1, BOX)).mean(2)
    kept = {"boxes of 16": (boxes.mean(2), boxes.var(2), values)}
    kept |= {f"{count} clusters": (key[:, :count], boxes.var(2)[:, :count], values[:, :count]) for count in (2, 4)}
    most, least = blocks.amax(2), blocks.amin(2)

    def groups(mean: Tensor, variance: Tensor, of_groups: Tensor) -> object:
        masses = _scores(query, mean).add_(_scores(query.square(), variance), alpha=0.5)
        return masses.logsumexp(-1), masses.softmax(-1) @ of_groups

    def sketch(rank: int) -> object:
        short, basis = shorts[rank]
        weights = _scores(query @ basis, short)
        return weights.logsumexp(-1), weights.softmax(-1).unflatten(-1, (-1, BOX)).sum(-1) @ values

    def choose() -> Tensor:
        bounds = query.clamp(min=0) @ most.mT + query.clamp(max=0) @ least.mT
        return bounds.topk(TOP).indices

    def ajar() -> Tensor:
        heads, chosen = torch.arange(KV_HEADS)[:, None, None], choose()
        keys_read, values_read = (x.unflatten(1, (-1, AJAR))[heads, chosen].flatten(2, 3) for x in (key, value))
        return (query[:, :, None] @ keys_read.mT).softmax(-1) @ values_read

    shorts = {rank: (drawn(KV_HEADS, keys, rank), drawn(KV_HEADS, DIM, rank)) for rank in (4, 8, 16)}
    found: dict[str, Callable[[], object]] = {
        "read all": lambda: _read(query, key, value),
        "read all, fused": lambda: scaled_dot_product_attention(query[None], key[None], value[None], scale=1.0),
        "moments": lambda: ((query @ covariance) * query).sum(-1),
        "probe": lambda: hidden @ probe,
        "choose 4 blocks of 64": choose,
        "ajar": ajar,
    }
    found |= {f"sketch of {rank}": lambda rank=rank: sketch(rank) for rank in shorts}
    return found | {name: lambda parts=parts: groups(*parts) for name, parts in kept.items()}


@torch.no_grad()
def measure(_: Context, phase: str, keys: int, look: str) -> Timed:
    """Time one look."""
    call = looks(ROWS[phase], keys)[look]
    times = []
    while len(times) < _REPEATS:
        begun = perf_counter()
        call()
        times.append(perf_counter() - begun)
    return Timed(phase, keys, look, min(times[_WARMING_UP:]))


def _jobs(_: Context) -> list[Job]:
    return [(phase, keys, look) for phase in ROWS for keys in KEYS for look in looks(1, KEYS[0])]


TIMED = Measurement("towards_the_oracle.times", Timed, ("phase", "keys", "look"), _jobs, measure)
