"""The calls that the kernel benchmarks time: inputs, gates, and every dense baseline of a device."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import patchattn
from patchattn import MomentGate, Policy, demo
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates.decision import forced

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The math kernel makes the whole score matrix.
_LONGEST_MATH = 4096
# Baselines slower than this times the fastest are tried once and left out.
_WORTH_TIMING = 2.0


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


def iid_gates(inputs: AttentionInputs, open_fraction: float) -> Tensor:
    """Open each pair on its own with the same probability: the worst case for a kernel."""
    draw = torch.Generator(inputs.query.device).manual_seed(1)
    shape = inputs.query.shape[:3]
    return torch.rand(shape, generator=draw, device=inputs.query.device) < open_fraction


def gated(attend: Callable[..., Attended], inputs: AttentionInputs, opened: Tensor) -> Callable[[], Attended]:
    """Make a call with decisions taken beforehand."""
    mass = forced(opened, inputs)
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


def facts(attended: Attended, inputs: AttentionInputs) -> dict[str, float]:
    """Say how many pairs were open and how many keys were scored."""
    regions, heads = inputs.regions, inputs.query.shape[1]
    asked = regions.asked.sum() * heads
    density = float(attended.scored_keys / (regions.n_causal.sum() * heads))
    return {"open": float(attended.open.sum() / asked), "density": density, "limit": 1 / density}


def dense_baselines(inputs: AttentionInputs, *, compiled_flex: bool) -> dict[str, Callable[[], Any]]:
    """Try every dense kernel - SDPA's, compiled FlexAttention, flash-attn if it is installed - and keep the fast ones.

    SDPA kernels are tried with grouped keys ("gqa") and with keys repeated beforehand.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    group = inputs.group_size
    repeated = [x.repeat_interleave(group, dim=1) for x in (key, value)]
    causal = query.shape[2] > 1
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if key.shape[2] <= _LONGEST_MATH or not causal:
        kernels.append(SDPBackend.MATH)

    def sdpa(kernel: SDPBackend, *, grouped: bool) -> Callable[[], Tensor]:
        keys = (key, value) if grouped else repeated

        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(query, *keys, is_causal=causal, enable_gqa=grouped)

        return call

    found: dict[str, Callable[[], Any]] = {}
    for kernel in kernels:
        name = f"sdpa {kernel.name.lower().removesuffix('_attention')}"
        for grouped in (True, False) if group > 1 else (False,):
            found[f"{name} gqa" if grouped else name] = sdpa(kernel, grouped=grouped)
    if compiled_flex:
        found["flex"] = _dense_flex(inputs)
    if inputs.query.device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        flash = importlib.import_module("flash_attn").flash_attn_func
        rows = [x.transpose(1, 2) for x in (query, key, value)]
        found["flash-attn"] = lambda: flash(*rows, causal=causal)
    seconds = {name: _seconds(call, query.device) for name, call in found.items()}
    fastest = min(seconds.values())
    return {name: call for name, call in found.items() if seconds[name] <= _WORTH_TIMING * fastest}


def _dense_flex(inputs: AttentionInputs) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = inputs.query, inputs.key, inputs.value
    before = key.shape[2] - query.shape[2]
    mask = create_block_mask(
        lambda batch, head, row, column: column <= row + before,
        None,
        None,
        query.shape[2],
        key.shape[2],
        device=query.device.type,
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=inputs.group_size > 1)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time the second call of a kernel; infinite where it does not take this call, which it says by raising."""
    try:
        call()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, NotImplementedError, ValueError):
        return math.inf
    return time.perf_counter() - begin


def shipped_gates(length: int = 4096, steps: int = 32, window: int = 256) -> dict[str, list[Tensor]]:
    """Record what the shipped model's gates decide while it reads its text and writes on.

    Returns:
        `"prefill"`: one [1, heads, length] tensor for each layer; `"decode"`: one [1, heads, 1] tensor for each layer
        and step.
    """
    model, tokenizer = demo.load()
    tokens = tokenizer(demo.sample_text(), return_tensors="pt").input_ids[:, : length - steps]
    policy = Policy(window_size=window, min_bulk=0, gate=MomentGate())
    with torch.no_grad(), patchattn.patch(model, policy, record="timeline") as handle:
        model.generate(tokens, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    calls = [call for layer in handle.report().timeline.values() for call in layer]
    return {phase: [opened for name, opened in calls if name == phase] for phase in ("prefill", "decode")}
