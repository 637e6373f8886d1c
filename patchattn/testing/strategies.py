"""Hypothesis strategies for attention calls: shapes, padding, keys, gates, policies and batches of tokens.

Needs hypothesis. Tensors are made from a seed that it draws: a failing example is short to print and cheap to shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates import Gate, MomentGate
from patchattn.gates.thresholds import KL_BOUND, Target
from patchattn.moments.gaussian import CHUNK, Estimate
from patchattn.policy import PHASES, MinBulk, Policy

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError("patchattn.testing.strategies needs the package hypothesis: pip install hypothesis") from error

GROUP_SIZES = (1, 2, 3, 4, 5, 6, 7)
"""Query heads per KV head; kernels are tempted to assume powers of two."""

HEAD_DIMS = (1, 8, 16, 40, 64, 80, 96)
"""Dimensions of keys and values."""

KeyKind = Literal["gaussian", "heavy_tailed", "outlier", "constant", "near_duplicate", "large_mean", "nan", "inf"]
"""How keys are distributed."""

FINITE_KEYS = tuple(kind for kind in get_args(KeyKind) if kind not in ("nan", "inf"))
"""Kinds of keys without NaN or infinity."""

_SEEDS = st.integers(0, 2**16)


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call.

    Args:
        batch: Number of sequences.
        kv_heads: Number of KV heads.
        group_size: Query heads per KV head.
        head_dim: Dimension of queries and keys.
        value_dim: Dimension of values.
        queries: Number of query rows.
        keys: Number of key slots.
        query_slot: Slot of the first query row; the slots after the last row are those of a cache not filled yet.
        sink_size: Tokens of the sink.
        window_size: Tokens of the window.
    """

    batch: int
    kv_heads: int
    group_size: int
    head_dim: int
    value_dim: int
    queries: int
    keys: int
    query_slot: int
    sink_size: int
    window_size: int

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv_heads * self.group_size


def lengths(*, max_length: int = 400, sink_size: int = 0, window_size: int = 0) -> SearchStrategy[int]:
    """Draw a number of tokens, often one within a token of where something changes.

    Args:
        max_length: Largest length.
        sink_size: Sink of the call; with the window it shifts the edges of the chunks of bulk keys.
        window_size: Window of the call.

    Returns:
        Lengths from 1 to `max_length`: anything, or next to a multiple of 64 (blocks of 64 and 128), to the end of
        sink and window, or to a boundary of the grid of prompt moments.
    """
    local = sink_size + window_size
    edges = {64 * i for i in range(1, max_length // 64 + 1)}
    edges |= {sink_size, window_size, local} | {local + CHUNK * i for i in range(1, max_length // CHUNK + 1)}
    near = sorted({edge + step for edge in edges for step in (-1, 0, 1) if 1 <= edge + step <= max_length})
    anything = st.integers(1, max_length)
    return anything | st.sampled_from(near) if near else anything


@st.composite
def shapes(draw: st.DrawFn, *, max_keys: int = 400, max_heads: int = 14, decode: bool | None = None) -> Shape:
    """Draw the sizes of a call: prefill from the start, in the middle, decode, or into a static cache.

    Args:
        draw: Given by hypothesis.
        max_keys: Largest number of key slots.
        max_heads: Largest number of query heads.
        decode: True for one query row, False for two or more where there is room, None for either.
    """
    group_size = draw(st.sampled_from([group for group in GROUP_SIZES if group <= max_heads]))
    sink_size = draw(st.sampled_from([0, 1, 4, 16]) | st.integers(0, 40))
    window_size = draw(st.sampled_from([1, 32, 63, 64, 65, 127, 128, 129]) | st.integers(1, 140))
    # Most calls should have bulk keys: without any there is nothing to decide.
    beyond = min(sink_size + window_size, max_keys - 1)
    at_least = draw(st.sampled_from([0, beyond, beyond, beyond]))
    keys = at_least + draw(lengths(max_length=max_keys - at_least, sink_size=sink_size, window_size=window_size))
    fewest = 1 if decode is None else min(2, keys)
    queries = 1 if decode else draw(st.just(keys) | st.integers(fewest, keys))
    spare = keys - queries
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    return Shape(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, max(1, min(3, max_heads // group_size)))),
        group_size=group_size,
        head_dim=head_dim,
        value_dim=draw(st.just(head_dim) | st.sampled_from(HEAD_DIMS)),
        queries=queries,
        keys=keys,
        query_slot=draw(st.just(spare) | st.integers(0, spare)),
        sink_size=sink_size,
        window_size=window_size,
    )


@st.composite
def paddings(draw: st.DrawFn, batch: int, keys: int, *, holes: bool = True) -> Tensor:
    """Draw which key slots are real: nothing padded, padding on the left, whole rows, and holes.

    Args:
        draw: Given by hypothesis.
        batch: Number of sequences.
        keys: Number of key slots.
        holes: Whether slots after the first real token may be padding too.

    Returns:
        [batch, keys] bool; False is padding.
    """
    valid = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        kind = draw(st.sampled_from(["none", "left", "left", "none", "hole", "hole", "everything"]))
        if kind == "everything":
            valid[row] = False
        elif kind != "none":
            valid[row, : draw(st.integers(0, keys // 2))] = False
        if holes and kind == "hole":
            begin = draw(st.integers(0, keys - 1))
            valid[row, begin : begin + draw(st.sampled_from([1, 5, 64]))] = False
    return valid


def make_keys(kind: KeyKind, size: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make keys of a distribution.

    Args:
        kind: `"gaussian"`: correlated Gaussian. `"heavy_tailed"`: Student t with 2 degrees of freedom. `"outlier"`:
            Gaussian with one key 30 times as long. `"constant"`: one key repeated. `"near_duplicate"`: 3 keys repeated,
            each time moved by 1e-3. `"large_mean"`: Gaussian around 50. `"nan"`, `"inf"`: Gaussian with one entry so.
        size: [..., keys, dim].
        seed: Seed of the draw; the global random state is left alone.
        dtype: dtype of the result; drawn in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    keys, dim = size[-2:]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def somewhere(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    if kind == "constant":
        x = normal(*size[:-2], 1, dim).expand(size).clone()
    elif kind == "near_duplicate":
        few = normal(*size[:-2], 3, dim)
        x = few[..., torch.arange(keys) % 3, :] + 1e-3 * normal(*size)
    elif kind == "heavy_tailed":
        x = normal(*size) / (normal(*size[:-1], 2).square().sum(-1, keepdim=True) / 2).sqrt().clamp(min=1e-3)
    else:
        x = normal(*size) @ (normal(dim, dim) / dim**0.5)
    if kind == "outlier":
        x[..., somewhere(keys), :] *= 30
    elif kind == "large_mean":
        x += 50
    elif kind in ("nan", "inf"):
        x[..., somewhere(keys), somewhere(dim)] = torch.nan if kind == "nan" else torch.inf
    return x.to(dtype)


@st.composite
def attention_inputs(
    draw: st.DrawFn,
    *,
    shape: SearchStrategy[Shape] | None = None,
    key_kinds: tuple[KeyKind, ...] = get_args(KeyKind),
    dtype: torch.dtype = torch.float64,
    holes: bool = True,
    features: bool = True,
) -> AttentionInputs:
    """Draw one attention call.

    Args:
        draw: Given by hypothesis.
        shape: Strategy of its sizes; None means `shapes()`.
        key_kinds: Distributions of keys to choose from, see `make_keys`.
        dtype: dtype of queries, keys and values.
        holes: Whether padding may lie between real tokens.
        features: Whether a softcap and sink logits may be there, and groups may open as a whole.
    """
    sizes = draw(shapes() if shape is None else shape)
    seed = draw(_SEEDS)
    generator = torch.Generator().manual_seed(seed)

    def normal(*of: int) -> Tensor:
        return torch.randn(of, generator=generator, dtype=torch.float64).to(dtype)

    valid = draw(paddings(sizes.batch, sizes.keys, holes=holes))
    regions = Regions.of(
        valid,
        query_length=sizes.queries,
        sink_size=sizes.sink_size,
        window_size=sizes.window_size,
        query_slot=sizes.query_slot,
        break_even=draw(st.sampled_from([0, 0, 1, 100])),
    )
    kind, size = draw(st.sampled_from(key_kinds)), (sizes.batch, sizes.kv_heads, sizes.keys, sizes.head_dim)
    return AttentionInputs(
        normal(sizes.batch, sizes.heads, sizes.queries, sizes.head_dim),
        make_keys(kind, size, seed=seed + 1, dtype=dtype),
        normal(sizes.batch, sizes.kv_heads, sizes.keys, sizes.value_dim),
        regions,
        draw(st.sampled_from([1.0, 2.0])) * sizes.head_dim**-0.5,
        draw(st.sampled_from([None, None, 3.0])) if features else None,
        normal(sizes.heads) if features and draw(st.booleans()) else None,
        features and draw(st.booleans()),
    )


@st.composite
def decisions(draw: st.DrawFn, inputs: AttentionInputs) -> Tensor:
    """Draw decisions for a call: all open, all closed, a few heads open, or pairs at random.

    Args:
        draw: Given by hypothesis.
        inputs: The call.

    Returns:
        [batch, heads, query] bool, to be passed to `patchattn.gates.decision.forced`.
    """
    rows = inputs.query.shape[:3]
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    kind = draw(st.sampled_from(["some", "few", "most", "heads", "closed", "open"]))
    if kind in ("open", "closed"):
        return torch.full(rows, kind == "open")
    if kind == "heads":
        return (torch.rand(rows[1], generator=generator) < 0.5)[None, :, None].expand(rows).clone()
    share = {"few": 0.02, "some": 0.3, "most": 0.95}[kind]
    return torch.rand(rows, generator=generator) < share


def gates(*, layers: int | tuple[int, ...] = 32, heads: int = 32, calibrated: bool = False) -> SearchStrategy[Gate]:
    """Draw a gate of any kind.

    Args:
        layers: Static gates name layers below this, or among these.
        heads: Static gates name query heads below this.
        calibrated: Whether gates that need a calibration are among them.
    """
    shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
    known = st.integers(0, layers - 1) if isinstance(layers, int) else st.sampled_from(layers)
    fields = {
        "threshold": shares,
        "estimate": st.sampled_from(get_args(Estimate)),
        "open_heads": st.lists(st.tuples(known, st.integers(0, heads - 1)), max_size=6).map(tuple),
        "alpha": shares,
        "scope": st.sampled_from(["head", "model"]),
        "fraction": shares,
        # As much as can be promised, and more would be as valid without a promise.
        "nats": st.floats(1e-6, KL_BOUND, exclude_max=True),
    }

    def of(kind: Any, **more: Any) -> Any:
        own = {name: values for name, values in fields.items() if name in kind.model_fields}
        return st.builds(kind, **(own | more))

    found = [of(kind) for kind in get_args(get_args(Gate)[0])]
    if calibrated:
        targets = st.one_of([of(kind) for kind in get_args(Target)])
        found += [of(MomentGate, threshold=targets), of(MomentGate, moments=st.just("calibration"))]
    return st.one_of(found)


@st.composite
def policies(
    draw: st.DrawFn, *, layers: int = 32, heads: int = 32, max_size: int = 2**20, calibrated: bool = False
) -> Policy:
    """Draw a policy that is valid for a model of at least this many layers and query heads.

    Args:
        draw: Given by hypothesis.
        layers: Number of layers of the model.
        heads: Number of query heads of the model.
        max_size: Largest sink, window and break-even, in tokens.
        calibrated: Whether gates that need a calibration are among them.
    """
    sizes = st.integers(0, max_size)
    patched = draw(st.none() | st.lists(st.integers(0, layers - 1), min_size=1, max_size=6).map(tuple))
    fields: dict[str, SearchStrategy[Any]] = {
        "sink_size": sizes,
        "window_size": st.integers(1, max_size),
        "gate": gates(layers=patched or layers, heads=heads, calibrated=calibrated),
        "phases": st.frozensets(st.sampled_from(PHASES), min_size=1),
        "min_bulk": sizes | st.builds(MinBulk, prefill=sizes, decode=sizes) | st.just("auto"),
        "whole_groups": st.booleans(),
    }
    return Policy(layers=patched, **{name: draw(values) for name, values in fields.items()})


@st.composite
def padded_batches(
    draw: st.DrawFn, *, max_batch: int = 3, min_length: int = 1, max_length: int = 400, vocab_size: int = 128
) -> dict[str, Tensor]:
    """Draw token ids with an attention mask, padded on the left.

    Args:
        draw: Given by hypothesis.
        max_batch: Largest number of sequences.
        min_length: Shortest sequence, in tokens.
        max_length: Longest sequence, in tokens.
        vocab_size: Ids are below this.

    Returns:
        `input_ids` and `attention_mask`, [batch, tokens] int64 each, to be passed to a model by keyword.
    """
    sizes = draw(st.lists(st.integers(min_length, max_length), min_size=1, max_size=max_batch))
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    ids = torch.randint(2, vocab_size, (len(sizes), max(sizes)), generator=generator)
    mask = torch.stack([(torch.arange(max(sizes)) >= max(sizes) - size).long() for size in sizes])
    return {"input_ids": ids * mask, "attention_mask": mask}


def cast(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """Return the call with queries, keys, values and sink logits in another dtype."""
    parts = {name: getattr(inputs, name) for name in ("query", "key", "value", "sink_logits")}
    return replace(inputs, **{name: part.to(dtype) for name, part in parts.items() if part is not None})
