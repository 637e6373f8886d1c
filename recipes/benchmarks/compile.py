"""Compiling a patched model: seconds to the first result, and graphs compiled while the text grows.

python recipes/benchmarks/compile.py
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import torch
from harness import Row, arguments, milliseconds, prepare, progress, save
from problems import shipped_model
from torch._dynamo.utils import counters
from transformers import StaticCache

import patchattn
from patchattn import Policy
from patchattn.hf.architecture import with_cache


def main() -> None:
    """Compile the decode step of the shipped model, dense and patched, and feed it growing texts."""
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile; aot_eager needs no compiler")
    parser.add_argument("--steps", type=int, default=16)
    options = prepare(parser.parse_args())
    model, tokens = shipped_model(max(options.lengths) + options.steps)
    model, tokens = model.to(options.device), tokens.to(options.device)
    rows = []
    with torch.no_grad():
        for name in progress(("dense", "patched"), str):
            if name == "patched":
                patchattn.patch(model, Policy(window_size=128, min_bulk=0))
            rows.append({"model": name} | compiled(options, model, tokens))
    notes = (
        f"Shipped model, static cache, `torch.compile(fullgraph=True, backend={options.compiler!r})` of the decode "
        f"step; prefill is not compiled. Texts of {', '.join(f'{length:,}' for length in options.lengths)} tokens, "
        f"{options.steps} steps each."
    )
    save(options, "compile", "Compiling a patched model", rows, notes, None)


def compiled(options: argparse.Namespace, model: Any, tokens: torch.Tensor) -> Row:
    """Compile, run all lengths, and count graphs."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend=options.compiler)
    firsts, laters, graphs = [], [], []
    for length in options.lengths:
        cache = StaticCache(config=model.config, max_cache_len=max(options.lengths) + options.steps)
        model(tokens[:, :length], **with_cache(model, cache))
        for at in range(length, length + options.steps):
            given = with_cache(model, cache) | {"position_ids": torch.tensor([[at]], device=tokens.device)}
            call = functools.partial(step, tokens[:, at : at + 1], **given)
            (laters if at > length else firsts).append(milliseconds(call, tokens.device))
            graphs.append(counters["stats"]["unique_graphs"])
    return {
        "first step s": firsts[0] / 1e3,
        "later steps ms": statistics.mean(laters),
        "graphs after the first step": graphs[0],
        "graphs at the end": graphs[-1],
    }


if __name__ == "__main__":
    main()
