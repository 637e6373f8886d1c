"""Compiling a patched model: seconds to the first result, and graphs compiled while the text grows.

python recipes/benchmarks/compile.py
"""

from __future__ import annotations

import time

import torch
from harness import arguments, prepare, progress, save
from torch._dynamo.utils import counters
from transformers import StaticCache

import patchattn
from patchattn import MomentGate, Policy, demo
from patchattn.evaluation.documents import check_longest
from patchattn.hf.architecture import with_cache


def main() -> None:
    """Compile the decode step of the shipped model, dense and patched, and feed it growing texts."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile; aot_eager needs no compiler")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    device = prepare(options)
    model, tokenizer = demo.load()
    check_longest(model, max(options.lengths) + options.steps)
    model = model.to(device)
    tokens = tokenizer(demo.sample_text()[:20000], return_tensors="pt").input_ids.to(device)
    rows = []
    with progress(2) as step, torch.no_grad():
        for name in ("dense", "patched"):
            step(name)
            if name == "dense":
                rows.append({"model": name} | compiled(options, model, tokens))
                continue
            with patchattn.patch(model, Policy(window_size=128, min_bulk=0, gate=MomentGate())):
                rows.append({"model": name} | compiled(options, model, tokens))
    notes = (
        f"Shipped model, static cache, `torch.compile(fullgraph=True, backend={options.compiler!r})` of the decode "
        f"step; prefill is not compiled. Texts of {', '.join(f'{length:,}' for length in options.lengths)} tokens, "
        f"{options.steps} steps each."
    )
    save(options, "compile", "Compiling a patched model", rows, None, notes)


def compiled(options, model, tokens: torch.Tensor) -> dict[str, float | int]:
    """Compile, run all lengths, and count graphs."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend=options.compiler)
    first, graphs_after_first, timed, n_steps = 0.0, 0, 0.0, 0
    for length in options.lengths:
        cache = StaticCache(config=model.config, max_cache_len=max(options.lengths) + options.steps)
        model(tokens[:, :length], **with_cache(model, cache))
        for index in range(options.steps):
            begin = time.perf_counter()
            step(
                tokens[:, length + index : length + index + 1],
                **with_cache(model, cache),
                position_ids=torch.tensor([[length + index]], device=tokens.device),
            )
            if tokens.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            if not first:
                first, graphs_after_first = seconds, counters["stats"]["unique_graphs"]
            elif index:
                timed, n_steps = timed + seconds, n_steps + 1
    graphs = counters["stats"]["unique_graphs"]
    return {
        "first step s": first,
        "later steps ms": 1e3 * timed / n_steps,
        "graphs after the first step": graphs_after_first,
        "graphs at the end": graphs,
    }


if __name__ == "__main__":
    main()
