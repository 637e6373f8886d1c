"""One pass over a document: what each pair would cost closed or ajar, and what cheap looks say about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from studies.towards_the_oracle.estimates import (
    CLUSTERS,
    RANKS,
    Basis,
    Far,
    Seen,
    ajar,
    boxes,
    by_bounds,
    by_chunks,
    by_moments,
    by_scores,
    change,
    clustered,
    clusters,
    exact_scores,
    moments_of_values,
    read,
    sketch,
    sketched_scores,
    spread,
)
from torch import Tensor

from patchattn.backends.blockwise import closed_attention
from patchattn.call.inputs import AttentionInputs
from patchattn.hf.support import attention_modules
from patchattn.measuring.prices import Pricing
from patchattn.moments.gaussian import CHUNK
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.writing import made

EVERY = 2
"""One query in so many is looked at."""

BACK = (1, 4, 16)
"""So many queries before, what the bulk gave the same head."""

LOOKS = (
    *(f"sketch {rank}" for rank in RANKS),
    *(f"clusters {count}" for count in CLUSTERS),
    "values",
    "boxes",
    "exact",
)
RANKED_BY = ("moments", "bounds", "sketch 8", "scores")
"""How the blocks that a head reads when it is ajar are chosen."""

_FURTHEST = 40.0
_OPEN_FROM = 0.4
"""Margin in nats, bulk less local, from which an earlier query counts as one that was open; a threshold of 0.6."""


def rows_of(inputs: AttentionInputs, every: int = EVERY) -> Tensor:
    """Return the queries that can be looked at, [rows] int64: those with a full chunk of bulk keys, one in so many."""
    return (inputs.regions.n_bulk[0] >= CHUNK).nonzero()[:, 0][::every]


class Pass(Pricing):
    """Price a document and look at its pairs.

    Args:
        model: The model.
        local: Sink and window, tokens.
        bases: For the sketches, by layer.
        margin: From layer, attention call, hidden state and local mass to the margin of the probe, see `Probe.margin`.
    """

    def __init__(
        self, model: Any, local: tuple[int, int], bases: dict[int, Basis], margin: Callable[..., Tensor]
    ) -> None:
        super().__init__(model, tuple(attention_modules(model)), local, lambda *_: None)
        self._bases, self._margin = bases, margin
        self.found: dict[int, dict[str, Tensor]] = {}

    def visit(self, layer: int, given: Any, gradient: Tensor) -> None:
        """Look at the pairs of a layer."""
        inputs, hidden, dense = given
        closed, local = closed_attention(inputs)
        rows = rows_of(inputs)
        delta = closed[0].float() - dense[0].float()
        found, partly = seen_of(inputs, rows, closed, local, basis=self._bases[layer])
        found |= before(inputs, rows, local, delta)
        estimate, _ = bulk_log_mass_from_prompt(inputs)
        found["margin"] = (estimate - local)[0][:, rows].clamp(-_FURTHEST, _FURTHEST)
        found = {name: values.half() for name, values in found.items()}
        found["price"] = _price(gradient[0], delta)[:, rows]
        for name, output in partly.items():
            found[f"price, ajar by {name}"] = _price(gradient[0][:, rows], output - dense[0, :, rows].float())
        found["probe"] = -self._margin(layer, inputs, hidden, local)[0][:, rows].clamp(-_FURTHEST, _FURTHEST)
        self.n = inputs.regions.n_bulk[0, rows]
        self.found[layer] = found

    def read(self, ids: Tensor, seed: int) -> dict[str, Tensor]:
        """Read a document, [tokens] ids; returns what was found, [layers, heads, rows] each, and `n` [rows]."""
        self.found = {}
        self.price(ids, seed)
        layers = [self.found.pop(layer) for layer in sorted(self.found)]
        found = {name: torch.stack([of_layer[name] for of_layer in layers]) for name in layers[0]}
        found |= {name: found[name] * (EVERY / len(ids)) for name in found if name.startswith("price")}
        return found | {"n": self.n}


def _price(gradient: Tensor, delta: Tensor) -> Tensor:
    """Return prices, [heads, rows] nats summed over tokens."""
    return ((gradient.double() * delta.double()).sum(-1).square() / 2).float()


def seen_of(
    inputs: AttentionInputs,
    rows: Tensor,
    closed: Tensor,
    local: Tensor,
    *,
    basis: Basis,
    looks: Collection[str] = LOOKS,
    ranked_by: Collection[str] = RANKED_BY,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Look at some queries.

    Args:
        inputs: All tokens of one document.
        rows: [rows] int64.
        closed: [1, heads, query, dim]; output of the local keys alone.
        local: [1, heads, query] nats.
        basis: For the sketches.
        looks: In which ways.
        ranked_by: How the blocks are chosen that a head reads when it is ajar.

    Returns:
        Logarithm of the squared change of output and margin, bulk less local in nats, of each look, and `spread`,
        [heads, rows]; and the outputs of heads that are ajar, [heads, rows, dim]. By name.
    """
    kv_heads, sink = inputs.key.shape[1], inputs.regions.sink_size
    counts = [count for count in CLUSTERS if f"clusters {count}" in looks]
    labels = {count: clustered(inputs.key[0, :, sink:].float(), count) for count in counts}
    parts: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for at, far in by_chunks(inputs, rows):
        mass, output = (x[0][:, rows[at]].float().unflatten(0, (kv_heads, -1)) for x in (local, closed))
        scores = exact_scores(far)
        for name in looks:
            seen = _look(name, far, scores, basis, labels)
            parts.setdefault(f"{name}, change", []).append(change(seen, mass, output))
            parts.setdefault(f"{name}, margin", []).append(seen.mass - mass)
        parts.setdefault("spread", []).append(spread(far))
        for name in ranked_by:
            seen = ajar(far, scores, _ranked(name, far, scores, basis))
            share = torch.sigmoid(seen.mass - mass)[..., None]
            outputs.setdefault(name, []).append(output + share * (seen.output - output))
    known = {name: torch.cat(values, 2).flatten(0, 1) for name, values in parts.items()}
    known = {name: values.clamp(-_FURTHEST, _FURTHEST) for name, values in known.items()}
    return known, {name: torch.cat(values, 2).flatten(0, 1) for name, values in outputs.items()}


def _look(name: str, far: Far, scores: Tensor, basis: Basis, labels: dict[int, Tensor]) -> Seen:
    kind, _, count = name.partition(" ")
    if kind == "sketch":
        return sketch(far, basis, int(count))
    if kind == "clusters":
        return clusters(far, labels[int(count)], int(count))
    return {"values": moments_of_values, "boxes": boxes, "exact": lambda far: read(far, scores)}[kind](far)


def _ranked(name: str, far: Far, scores: Tensor, basis: Basis) -> Tensor:
    if name == "scores":
        return by_scores(far, scores)
    if name == "sketch 8":
        return by_scores(far, sketched_scores(far, basis, 8)[0])
    return {"moments": by_moments, "bounds": by_bounds}[name](far)


def before(inputs: AttentionInputs, rows: Tensor, local: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Say what the bulk gave the same head at earlier queries, [heads, rows] logarithms.

    `last` is that of the last earlier query whose estimated margin opens, and `since` the logarithm of how long ago it
    was; where there was none, it is the smallest of the head.
    """
    gain = (delta.square().sum(-1) + 1e-12).log()  # [heads, query]
    found = {f"before {back}": gain[:, (rows - back).clamp(min=0)] for back in BACK}
    estimate, _ = bulk_log_mass_from_prompt(inputs)
    opened = ((estimate - local)[0] > -_OPEN_FROM) & inputs.regions.asked
    slots = torch.where(opened, torch.arange(gain.shape[1]), -1).cummax(1).values
    last = slots[:, rows - 1]
    is_known = last >= 0
    lowest = gain[:, rows].amin(1, keepdim=True)
    found["last"] = torch.where(is_known, gain.gather(1, last.clamp(min=0)), lowest)
    found["since"] = torch.where(is_known, rows - last, rows).float().log()
    return found


def kept(path: Path, make: Any) -> dict[str, Tensor]:
    """Read tensors back, or make and keep them."""
    if not path.exists():
        with made(path.parent):
            whole = path.with_suffix(f".{os.getpid()}")
            save_file({name: value.contiguous() for name, value in make().items()}, whole)
            whole.replace(path)
    return load_file(path)
