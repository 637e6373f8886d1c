"""The calls that benchmarks time: of a layer, with every dense baseline of a device, and of the shipped model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import patchattn
from patchattn import Policy, demo
from patchattn.backends import load, resolve
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import Regions
from patchattn.evaluation.documents import check_longest
from patchattn.gates.decision import forced
from patchattn.policy import DEFAULT_WINDOW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLASH_PACKAGES = {"flash-attn 3": "flash_attn_interface", "flash-attn": "flash_attn"}
# The math kernel makes the whole score matrix.
_LONGEST_MATH = 4096
# Baselines slower than this times the fastest are tried once and left out.
_WORTH_TIMING = 2.0
_TILE = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention call: queries are the last `queries` of `length` tokens."""

    length: int
    queries: int
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    batch: int = 1
    window: int = 256
    sink: int = 16


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """Draw queries, keys and values from a normal distribution."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, shape.dim, generator=draw, device=device, dtype=dtype)

    valid = torch.ones(shape.batch, shape.length, dtype=torch.bool, device=device)
    return AttentionInputs(
        normal(shape.heads, shape.queries),
        normal(shape.kv_heads, shape.length),
        normal(shape.kv_heads, shape.length),
        Regions.of(valid, query_length=shape.queries, sink_size=shape.sink, window_size=shape.window),
        scale=shape.dim**-0.5,
    )


def shape_on(device: torch.device, length: int, queries: int) -> Shape:
    """Choose the layer of a small model for a CPU, and that of an 8B model for CUDA."""
    is_cuda = device.type == "cuda"
    return Shape(length, queries, 32, 8, 128, window=DEFAULT_WINDOW) if is_cuda else Shape(length, queries)


def iid_gates(shape: Shape, open_fraction: float) -> Tensor:
    """Open each pair on its own with the same probability: the worst case for a kernel. [batch, heads, queries]."""
    draw = torch.Generator().manual_seed(1)
    return torch.rand(shape.batch, shape.heads, shape.queries, generator=draw) < open_fraction


def gated(inputs: AttentionInputs, opened: Tensor, backend: str = "auto") -> Callable[[], Attended]:
    """Make a call with decisions taken beforehand."""
    attend = load(resolve(backend, inputs.query.device)).attend
    mass = forced(opened.to(inputs.query.device), inputs)
    return lambda: attend(inputs, mass, 0.0)


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call in a CUDA graph; the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def dense_baselines(inputs: AttentionInputs, *, compiled_flex: bool) -> dict[str, Callable[[], Any]]:
    """Try every dense kernel - SDPA's, compiled FlexAttention, flash-attn where installed - and keep the fast ones.

    SDPA kernels are tried with grouped keys ("gqa") and with keys repeated beforehand.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    repeated = [x.repeat_interleave(inputs.group_size, dim=1) for x in (key, value)]
    causal = query.shape[2] > 1
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if key.shape[2] <= _LONGEST_MATH or not causal:
        kernels.append(SDPBackend.MATH)

    def sdpa(kernel: SDPBackend, keys: Sequence[Tensor], **options: bool) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(query, *keys, is_causal=causal, **options)

    found: dict[str, Callable[[], Any]] = {}
    for kernel in kernels:
        name = f"sdpa {kernel.name.lower().removesuffix('_attention')}"
        found[name] = partial(sdpa, kernel, repeated)
        if inputs.group_size > 1:
            found[f"{name} gqa"] = partial(sdpa, kernel, (key, value), enable_gqa=True)
    if compiled_flex:
        found["flex"] = dense_flex(inputs)
    for name, package in FLASH_PACKAGES.items():
        if query.device.type == "cuda" and importlib.util.find_spec(package):
            flash = importlib.import_module(package).flash_attn_func
            found[name] = partial(flash, *(x.transpose(1, 2) for x in (query, key, value)), causal=causal)
    once = {name: _milliseconds(call, query.device) for name, call in found.items()}
    return {name: call for name, call in found.items() if once[name] <= _WORTH_TIMING * min(once.values())}


def dense_flex(inputs: AttentionInputs) -> Callable[[], Any]:
    """Make a call of FlexAttention with a causal mask, compiled for its lengths."""
    mask = causal_mask(inputs.query.shape[2], inputs.key.shape[2], inputs.query.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=inputs.group_size > 1)

    # Dynamo counts compilations per code object, and each shape is one: a code object for each keeps below its limit.
    attend.__code__ = attend.__code__.replace(co_name=f"attend_{inputs.query.shape[0]}_{mask.shape[2]}_{mask.shape[3]}")
    compiled = torch.compile(attend, dynamic=False, fullgraph=True)
    return lambda: compiled(inputs.query, inputs.key, inputs.value)


def causal_mask(queries: int, keys: int, device: torch.device) -> BlockMask:
    """List the blocks that the last `queries` of `keys` tokens read: `create_block_mask` makes queries x keys bytes."""
    offset = keys - queries
    tiles, blocks = -(-queries // _TILE), -(-keys // _TILE)
    first = torch.arange(tiles, device=device, dtype=torch.int32) * _TILE + offset
    last = (first + _TILE).clamp(max=keys) - 1
    visited, full = last // _TILE + 1, (first + 1) // _TILE
    every = torch.arange(blocks, device=device, dtype=torch.int32).expand(tiles, blocks)
    partly = (every + full[:, None]).clamp(max=blocks - 1)
    lists = ((visited - full), partly, full, every)
    return BlockMask.from_kv_blocks(
        *(part.int().contiguous()[None, None] for part in lists),
        BLOCK_SIZE=_TILE,
        mask_mod=lambda b, h, row, key: key <= row + offset,
        seq_lengths=(queries, keys),
        compute_q_blocks=False,
    )


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time the second call of a kernel; infinite where it does not take this call, which it says by raising."""
    try:
        call()
        return milliseconds(call, device)
    except (RuntimeError, NotImplementedError, ValueError):
        return math.inf


def shipped_model(length: int) -> tuple[Any, Tensor]:
    """Load the shipped model, and tokens [1, length] of its text; refuse more tokens than it reads."""
    model, tokenizer = demo.load()
    check_longest(model, length)
    return model, tokenizer(demo.sample_text()[: 10 * length], return_tensors="pt").input_ids[:, :length]


def prose(tokenizer: Any, length: int) -> Tensor:
    """Return tokens [1, length] of the English prose that comes with Python."""
    tokens = tokenizer(demo.prose()[: 10 * length], return_tensors="pt").input_ids[:, :length]
    if tokens.shape[1] < length:
        raise ValueError(f"The text has {tokens.shape[1]:,} tokens, {length:,} are asked for: take shorter lengths.")
    return tokens


def reading(model: Any, tokens: Tensor) -> Callable[[], Any]:
    """Make a call that reads tokens [batch, length] into a new cache."""
    return lambda: model(tokens, use_cache=True, logits_to_keep=1)


def shipped_gates(length: int = 4096, steps: int = 32, window: int = 256) -> dict[str, list[Tensor]]:
    """Record what the shipped model's gates decide while it reads its text and writes on.

    Returns:
        `"prefill"`: one [1, heads, length] tensor for each layer; `"decode"`: one [1, heads, 1] tensor for each layer
        and step.
    """
    model, tokens = shipped_model(length)
    with torch.no_grad(), patchattn.patch(model, Policy(window_size=window, min_bulk=0), record="timeline") as handle:
        model.generate(tokens[:, :-steps], max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    calls = [call for layer in handle.report().timeline.values() for call in layer]
    return {phase: [opened for name, opened in calls if name == phase] for phase in ("prefill", "decode")}
