"""What the stages of `gpu.py` measure; each is run by it, as a process of its own.

Rows are added to the file of all stages as they come. A case that fails is a row that says why, and the next one is
taken. With `--warm` a stage compiles what it is going to time, and times nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu import ENVIRONMENT, PROFILES, add_row
from gpu_llama import COMPILED, LAYERS, POLICIES, Decoder, profiled
from harness import Row, environment
from layer import Case, timed_rows
from model import random_tokens, random_weights
from problems import DTYPES, Shape, dense_flex, gated, iid_gates, make_inputs, shape_on, shipped_model
from transformers import DynamicCache
from whole import STOCK

import patchattn
from patchattn import MomentGate, Policy, backends, demo
from patchattn.backends.self_check import self_check
from patchattn.cli.doctor import checks_of
from patchattn.hf import patching
from patchattn.hf.architecture import with_cache
from patchattn.testing import recorded_gates, replay_gates

LONG, LONGER = 32768, 131072
LENGTHS = (LONG, LONGER, 8192, 4096)
"""Lengths of one layer, the most telling first; the last one finds the break-even only."""
SHARES = (0.15, 0.5, 0.3, 0.05)
FEW_LAYERS = 2
"""Layers of what is compiled as a whole, which takes long, and of what is profiled."""
CELLS = [(policy, "dynamic") for policy in POLICIES] + [(policy, "static") for policy in (STOCK, "default")]
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.device = torch.device("cpu" if options.rehearse else "cuda")
    # What a layer is timed with.
    options.backend, options.clock, options.repeats, options.flex = "auto", "wall", 1 if options.rehearse else 5, False
    # The self-check of `patch` compiles graphs that no model uses; the first stage makes it.
    with torch.no_grad(), mock.patch.object(patching, "self_check", return_value=0.0):
        STAGES[options.stage](options)


def add(options: argparse.Namespace, row: Row, stage: str = "") -> None:
    """Keep a row; JSON has no NaN."""
    add_row(options.out, stage or options.stage, {k: None if v != v else v for k, v in row.items()})


@contextmanager
def told(options: argparse.Namespace, **case: Any) -> Iterator[None]:
    """Turn a failure of a case into a row, and free what it held."""
    try:
        yield
    except Exception as error:
        print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        reason = " ".join(str(error).split())[:500]
        add(options, case | {"problem": f"{type(error).__name__}: {reason}"})
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()


def check(options: argparse.Namespace) -> None:
    """Say what the machine is, and try the backend on the heads that all later stages have."""
    found = environment(options.device) | {"clock": options.clock}
    if options.device.type == "cuda":
        properties = torch.cuda.get_device_properties(options.device)
        found |= {"capability": f"{properties.major}.{properties.minor}", "GiB": properties.total_memory / 2**30}
        found |= {"cuda": torch.version.cuda, "driver": driver()}
    add(options, found, ENVIRONMENT)
    backend, dim, group = backends.resolve(options.backend, options.device), 128, 4
    with told(options, backend=backend):
        begin = time.perf_counter()
        share = self_check(backend, dtype=DTYPES["bf16"], head_dim=dim, group_size=group, device=options.device)
        row = {"backend": backend, "dtype": "bfloat16", "head_dim": dim, "group_size": group, "error_share": share}
        add(options, row | {"seconds": time.perf_counter() - begin})


def driver() -> str | None:
    """Return the version of the driver, where its own program tells."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None


def doctor(options: argparse.Namespace) -> None:
    """Make the checks of `patchattn doctor` for the device, one row each, so that those made in time are kept."""
    # FlexAttention compiles for minutes on a CPU; switched off it says so at once.
    with torch.compiler.set_stance("force_eager" if options.rehearse else "default"):
        for made in checks_of(str(options.device)):
            row = vars(made)
            add(options, row if made.problem else {name: row[name] for name in row if name != "problem"})


def layer(options: argparse.Namespace) -> None:
    """Time prefill and decode of one layer."""
    for length, phase, batch in cases_of_a_layer(options):
        case = Case("bf16", *shaped(options, length, phase, batch))
        what = {"phase": phase, "tokens": length, "batch": batch}
        with told(options, **what):
            if options.warm:
                compile_layer(options, case)
                continue
            try:
                rows = timed_rows(options, case)
            except RuntimeError as error:
                if phase == "prefill" or options.device.type != "cuda":
                    raise
                add(options, what | {"problem": f"no CUDA graph: {' '.join(str(error).split())[:300]}"})
                rows = timed_rows(options, case, in_graph=False)
            for row in rows:
                add(options, {"phase": phase} | row | traffic(case, row))


def cases_of_a_layer(options: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """List lengths, phases and batches, the most telling first."""
    for length in (512, 256) if options.rehearse else LENGTHS:
        yield length, "prefill", 1
        yield length, "decode", 1
        if length != LENGTHS[-1]:
            yield length, "decode", 16


def shaped(options: argparse.Namespace, length: int, phase: str, batch: int) -> tuple[Shape, dict[str, torch.Tensor]]:
    """Choose the shape of a layer, and what is open: pairs at random, and in decode one whole group."""
    queries = length if phase == "prefill" else 1
    shape = shape_on(options.device, length, queries)
    sizes = {"batch": batch} | ({"window": 64} if options.rehearse else {})
    shape = Shape(**{**vars(shape), **sizes})
    closed = torch.zeros(batch, shape.heads, queries, dtype=torch.bool)
    gates = {f"{share:.0%} open": iid_gates(shape, share) for share in SHARES[: 1 if options.rehearse else None]}
    if phase == "decode":
        group = closed.clone()
        group[:, : shape.heads // shape.kv_heads] = True
        gates = {f"1 of {shape.kv_heads} KV heads open": group} | gates
    return shape, {**gates, "all open": ~closed, "all closed": closed}


def compile_layer(options: argparse.Namespace, case: Case) -> None:
    """Compile what `timed_rows` will call."""
    inputs = make_inputs(case.shape, DTYPES[case.dtype], options.device)
    gated(inputs, case.gates["all closed"], options.backend)()
    if options.device.type == "cuda":
        dense_flex(inputs)()


def traffic(case: Case, row: Row) -> Row:
    """Add what the call moves: bytes of keys and values that a decode step reads, operations of a dense prefill."""
    shape = case.shape
    if shape.queries > 1:
        pairs = shape.batch * shape.heads * shape.length * (shape.length + 1) / 2
        return {"dense TFLOP/s": 4 * shape.dim * pairs / row["dense ms"] / 1e9}
    size = 2 * shape.batch * shape.kv_heads * shape.length * shape.dim * DTYPES[case.dtype].itemsize
    read = {"dense": size, "gated": size * row["density"]}
    found = {f"{name} MB": read[name] / 1e6 for name in read}
    return found | {f"{name} TB/s": read[name] / row[f"{name} ms"] / 1e9 for name in read}


def models(options: argparse.Namespace) -> None:
    """Compare decisions and logits with the CPU's: the shipped model, and a random one of a real shape."""
    length, steps = (640, 4) if options.rehearse else (2048, 8)
    for dtype, name in itertools.product(("bf16", "fp32"), ("shipped", "smollm2-135m")):
        with told(options, model=name, dtype=dtype):
            if name == "shipped":
                model, tokens = shipped_model(length + steps)
                policy = demo.default_policy(model, length)
            else:
                # Random weights of the usual size give flat attention; larger ones make heads that differ.
                sizes = {"num_hidden_layers": 3 if options.rehearse else 30, "vocab_size": 4096}
                model = random_weights(name, torch.float32, torch.device("cpu"), initializer_range=0.06, **sizes)
                tokens = random_tokens(length + steps, sizes["vocab_size"])
                policy = Policy(window_size=256, min_bulk=0, gate=MomentGate(threshold=256 / length))
            model = model.to(DTYPES[dtype])
            row: Row = {"model": name, "dtype": dtype, "tokens": length}
            add(options, row | agreement(options, model, tokens, length, policy))


def agreement(options: argparse.Namespace, model: Any, tokens: torch.Tensor, length: int, policy: Policy) -> Row:
    """Read the same tokens on both devices, each with its own gates, and with those of the CPU; and densely."""
    cpu, device = torch.device("cpu"), options.device
    logits, gates = read_on(model, tokens, length, cpu, policy)
    dense = read_on(model, tokens, length, cpu)[0]
    others, other_gates = read_on(model, tokens, length, device, policy)
    replayed = read_on(model, tokens, length, device, policy, gates)[0]
    asked = policy.sink_size + policy.window_size

    def pairs(every: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([opened[:, :, asked if opened.shape[2] > 1 else 0 :].flatten() for opened in every])

    own, other = pairs(gates), pairs(other_gates)
    return {
        "open": own.float().mean().item(),
        "open here": other.float().mean().item(),
        "agree": (own == other).float().mean().item(),
        "logits apart": (logits - others).abs().max().item(),
        "with the same gates": (logits - replayed).abs().max().item(),
        "dense": (dense - read_on(model, tokens, length, device)[0]).abs().max().item(),
        "same token": (logits.argmax(-1) == others.argmax(-1)).float().mean().item(),
    }


def read_on(
    model: Any, tokens: torch.Tensor, length: int, device: torch.device, policy: Policy | None = None, gates: Any = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Read a prompt and go on token by token; returns the logits of all tokens, and the decisions, call by call."""
    model, tokens = model.to(device), tokens.to(device)
    cache = DynamicCache(config=model.config)
    handle = None if policy is None else patchattn.patch(model, policy, record="timeline")
    try:
        if handle is not None and gates is not None:
            calls = len(gates) // len(handle.states)
            by_layer = {at: gates[n * calls : (n + 1) * calls] for n, at in enumerate(handle.states)}
            replay_gates(handle, {at: [opened.to(device) for opened in of] for at, of in by_layer.items()})
        parts = [tokens[:, :length], *tokens[:, length:].split(1, dim=1)]
        logits = [model(part, **with_cache(model, cache), use_cache=True).logits.float().cpu() for part in parts]
        recorded = {} if handle is None else recorded_gates(handle)
        return torch.cat(logits, dim=1), [opened.cpu() for calls in recorded.values() for opened in calls]
    finally:
        if handle is not None:
            handle.unpatch()


def llama(options: argparse.Namespace) -> None:
    """Time a random Llama-3.1-8B: first token and decode with each cache, and its decode step compiled."""
    if not options.warm:
        model = big_model(options, LAYERS)
        read_and_decode(options, model, lengths(options)[0])
    compile_steps(options)
    if not options.warm:
        # Half of the layers, or none but the first policies would be read in time.
        del model.model.layers[len(model.model.layers) // 2 :]
        read_and_decode(options, model, lengths(options)[1])


def read_and_decode(options: argparse.Namespace, model: Any, length: int) -> None:
    """Time every policy, one cache at a time: several caches of this size leave no room for anything else."""
    for policy, cache in CELLS:
        what = {"policy": policy, "cache": cache, "tokens": length, "layers": len(model.model.layers)}
        with told(options, **what), Decoder(options, model, policy, cache, length) as decoder:
            add(options, what | {"compiled": False} | decoder.timed())


def compile_steps(options: argparse.Namespace) -> None:
    """Time the decode step of a few layers as one CUDA graph."""
    model, length = big_model(options, FEW_LAYERS), lengths(options)[0]
    for policy in COMPILED:
        what = {"policy": policy, "cache": "static", "tokens": length, "layers": FEW_LAYERS}
        with told(options, **what), Decoder(options, model, policy, "static", length) as decoder:
            row = what | {"compiled": True} | decoder.compiled()
            if not options.warm:
                add(options, row)


def profiles(options: argparse.Namespace) -> None:
    """Profile one decode step and one prefill, stock and patched, of a few layers."""
    model, length = big_model(options, FEW_LAYERS), lengths(options)[0]
    for policy in (STOCK, "default"):
        what = {"policy": policy, "tokens": length, "layers": FEW_LAYERS}
        with told(options, **what), Decoder(options, model, policy, "static", length) as decoder:
            decoder.prefill()
            for phase, call in (("decode", decoder.step), ("prefill", decoder.prefill)):
                row, table = profiled(options, call)
                add(options, what | {"phase": phase} | row)
                with (options.out / PROFILES).open("a", encoding="utf-8") as file:
                    file.write(f"{phase}, {policy}, {FEW_LAYERS} layers, {length:,} tokens\n{table}\n")


def lengths(options: argparse.Namespace) -> tuple[int, ...]:
    """Return the lengths of whole models."""
    return (300, 400) if options.rehearse else (LONG, LONGER)


def big_model(options: argparse.Namespace, layers: int) -> Any:
    """Make Llama-3.1-8B with random weights on the device, or a tiny one for a rehearsal."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "vocab_size": 128256, "max_position_embeddings": 2 * LONGER}
    if options.rehearse:
        sizes |= TINY | {"vocab_size": 128, "num_hidden_layers": min(layers, 4)}
    return random_weights("llama-3.1-8b", DTYPES["bf16"], options.device, **sizes)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check,
    "doctor": doctor,
    "layer": layer,
    "models": models,
    "llama": llama,
    "profile": profiles,
}


if __name__ == "__main__":
    main()
