"""Whole models, dense and patched: prefill seconds and decode tokens per second.

python recipes/benchmarks/end_to_end.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from harness import Row, arguments, measure, prepare, progress, save, tick_lengths
from matplotlib.figure import Figure
from problems import DTYPES
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import patchattn
from patchattn import MomentGate, Policy, demo
from patchattn.evaluation.documents import check_longest
from patchattn.hf.architecture import cache_of, with_cache

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
    },
}  # fmt: skip


def main() -> None:
    """Time the shipped model with its gates forced to decide and at break-even, and models of real shapes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=["shipped"], choices=["shipped", *SHAPES])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 500, 1000, 2000, 2500, 4000])
    parser.add_argument("--layers", type=int, default=2, help="layers of the models with random weights")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=16, help="decode steps in one timed call")
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    device = prepare(options)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    policies = {
        "auto": Policy(window_size=options.window),
        "min_bulk=0": Policy(window_size=options.window, min_bulk=0, gate=MomentGate()),
    }
    rows = []
    with progress(len(options.models) * len(options.lengths)) as step, torch.no_grad():
        for name in options.models:
            model, tokens = load(name, options.layers, max(options.lengths) + options.steps, dtype)
            model, tokens = model.to(device), tokens.to(device)
            for length in options.lengths:
                step(f"{name}, {length:,} tokens")
                rows += rows_of(options, model, tokens[:, :length], policies, name)
    notes = (
        f"Sink 16, window {options.window}, default gate; `auto` leaves `min_bulk` to the library, `min_bulk=0` asks "
        "every query. Dense is the model as it comes (SDPA). Models named after real ones have their shapes, "
        f"{options.layers} layers and random weights. Times in milliseconds, a prefill or one decode step, batch 1; "
        "the speed-up is the median over the repeats, with lowest and highest."
    )
    save(options, "end_to_end", "Whole models", rows, figure_of(rows), notes)


def figure_of(rows: list[Row]) -> Figure:
    """Draw the speed-up over the length, a line for each model, policy and phase."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for label in dict.fromkeys((row["model"], row["policy"], row["phase"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["policy"], row["phase"]) == label]
        axes.plot([row["tokens"] for row in chosen], [row["speed-up"] for row in chosen], "o-", label=", ".join(label))
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="times as fast as dense", title="Whole models")
    tick_lengths(axes, rows, "tokens")
    axes.legend(fontsize=7)
    return figure


def load(name: str, layers: int, longest: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Load the shipped model with its text, or make a model of a real shape with random weights and tokens."""
    if name == "shipped":
        model, tokenizer = demo.load()
        check_longest(model, longest)
        return model.to(dtype), tokenizer(demo.sample_text()[:30000], return_tensors="pt").input_ids
    fields = dict(SHAPES[name])
    config = AutoConfig.for_model(
        fields.pop("model_type"), num_hidden_layers=layers, vocab_size=4096, max_position_embeddings=longest, **fields
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        return model, torch.randint(4096, (1, longest))


def rows_of(options, model: Any, tokens: torch.Tensor, policies: dict[str, Policy], name: str) -> list[Row]:
    """Time dense and all policies in turn: each has a model of its own that shares the weights."""
    models = {"dense": model}
    handles = {}
    for label, policy in policies.items():
        models[label] = _twin(model)
        handles[label] = patchattn.patch(models[label], policy)
    prefills = {label: _prefill(twin, tokens) for label, twin in models.items()}
    caches = {label: cache_of(prefill()) for label, prefill in prefills.items()}
    decodes = {label: _decode(twin, caches[label], tokens, options.steps) for label, twin in models.items()}
    rows = []
    for phase, variants, unit in (("prefill", prefills, 1), ("decode", decodes, options.steps)):
        for handle in handles.values():
            handle.reset_report()
        timed = measure(variants, device=tokens.device, repeats=options.repeats, clock=options.clock)
        for label in policies:
            report, (dense, patched) = handles[label].report(), (timed.timings[key] for key in ("dense", label))
            ratios = sorted(a / b for a, b in zip(dense.samples, patched.samples, strict=True))
            rows.append(
                {"model": name, "policy": label, "phase": phase, "tokens": tokens.shape[1]}
                | {"dense ms": dense.median / unit, "patched ms": patched.median / unit}
                | {"speed-up": dense.ratio(patched), "lowest": ratios[0], "highest": ratios[-1]}
                | {"open": report.open_fraction(phase), "density": report.realised_density(phase)}
                | {"quiet": timed.is_quiet}
            )
    return rows


def _twin(model: Any) -> Any:
    """Copy a model without copying its weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def _prefill(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(tokens, use_cache=True, logits_to_keep=1)


def _decode(model: Any, cache: DynamicCache, tokens: torch.Tensor, steps: int) -> Callable[[], None]:
    """Take decode steps after a prefill, and take their keys out of the cache again."""

    def call() -> None:
        for _ in range(steps):
            model(tokens[:, -1:], **with_cache(model, cache), use_cache=True)
        cache.crop(-steps)

    return call


if __name__ == "__main__":
    main()
