"""Whole models, dense and patched: prefill seconds and decode tokens per second.

python recipes/benchmarks/model.py
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from harness import Row, arguments, measure, prepare, progress, save, speedup_figure
from problems import DTYPES, reading, shipped_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import patchattn
from patchattn import Policy
from patchattn.hf.architecture import cache_of, with_cache

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336} | _HEADS,
    "qwen3-8b": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288} | _HEADS,
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": None}
    | _HEADS,
}


def main() -> None:
    """Time the shipped model with its gates forced to decide and at break-even, and models of real shapes."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["shipped"], choices=["shipped", *SHAPES])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 500, 1000, 2000, 2500, 4000])
    parser.add_argument("--layers", type=int, default=2, help="layers of the models with random weights")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=16, help="decode steps in one timed call")
    parser.add_argument("--window", type=int, default=256)
    options = prepare(parser.parse_args(), cpu={"dtype": "fp32"}, cuda={"dtype": "bf16"})
    longest = max(options.lengths) + options.steps
    rows: list[Row] = []
    cases = list(itertools.product(options.models, options.lengths))
    with torch.no_grad():
        for name, length in progress(cases, lambda case: f"{case[0]}, {case[1]:,} tokens"):
            model, tokens = load(name, longest, options.layers, options.dtype, options.device)
            rows += timed_rows(options, name, model, tokens[:, :length])
    notes = (
        f"Sink 16, window {options.window}, default gate; `auto` leaves `min_bulk` to the library, `min_bulk=0` asks "
        "every query. Dense is the model as it comes (SDPA). Models named after real ones have their shapes, "
        f"{options.layers} layers and random weights. Times in milliseconds, a prefill or one decode step, batch 1; "
        "the speed-up is the median over the repeats, with lowest and highest."
    )
    figure = speedup_figure(rows, ("model", "policy", "phase"), "Whole models")
    save(options, "end_to_end", "Whole models", rows, notes, figure)


@functools.lru_cache(maxsize=1)
def load(name: str, longest: int, layers: int, dtype: str, device: torch.device) -> tuple[Any, torch.Tensor]:
    """Load the shipped model with its text, or make one of a real shape with random weights and tokens [1, longest]."""
    if name == "shipped":
        model, tokens = shipped_model(longest)
        return model.to(device, DTYPES[dtype]), tokens.to(device)
    sizes = {"num_hidden_layers": layers, "vocab_size": 4096, "max_position_embeddings": longest}
    config = AutoConfig.for_model(**SHAPES[name], **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
        return model.to(device), torch.randint(4096, (1, longest)).to(device)


def timed_rows(options: argparse.Namespace, name: str, model: Any, tokens: torch.Tensor) -> list[Row]:
    """Time dense and all policies in turn: each has a model of its own that shares the weights."""
    policy = Policy(window_size=options.window)
    policies = {"auto": policy, "min_bulk=0": policy.model_copy(update={"min_bulk": 0})}
    models = {"dense": model} | {label: _twin(model) for label in policies}
    handles = {label: patchattn.patch(models[label], policy) for label, policy in policies.items()}
    prefills = {label: reading(twin, tokens) for label, twin in models.items()}
    caches = {label: cache_of(prefill()) for label, prefill in prefills.items()}
    decodes = {label: _decode(twin, caches[label], tokens, options.steps) for label, twin in models.items()}
    rows = []
    for phase, variants, passes in (("prefill", prefills, 1), ("decode", decodes, options.steps)):
        for handle in handles.values():
            handle.reset_report()
        timed = measure(variants, device=options.device, repeats=options.repeats, clock=options.clock)
        for label, handle in handles.items():
            report = handle.report()
            row: Row = {"model": name, "policy": label, "phase": phase, "tokens": tokens.shape[1]}
            row |= {"dense ms": timed.ms("dense") / passes, "patched ms": timed.ms(label) / passes}
            row |= timed.speedup("dense", label)
            row |= {"open": report.open_fraction(phase), "density": report.realised_density(phase)}
            rows.append(row | {"quiet": timed.is_quiet})
    return rows


def _twin(model: Any) -> Any:
    """Copy a model without copying its weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def _decode(model: Any, cache: DynamicCache, tokens: torch.Tensor, steps: int) -> Callable[[], None]:
    """Take decode steps after a prefill, and take their keys out of the cache again."""

    def call() -> None:
        for _ in range(steps):
            model(tokens[:, -1:], **with_cache(model, cache), use_cache=True)
        cache.crop(-steps)

    return call


if __name__ == "__main__":
    main()
