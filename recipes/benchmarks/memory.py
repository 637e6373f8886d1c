"""Memory of one gated layer: workspace of a prefill beside dense attention, and what the cache keeps in addition.

python recipes/benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import Row, arguments, prepare, progress, save
from matplotlib.figure import Figure
from problems import DTYPES, gated, iid_gates, make_inputs, shape_on
from torch.nn.functional import scaled_dot_product_attention

from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt

CALLS = ("dense", "gated", "gate")
MIB = 2**20


def main() -> None:
    """Measure every length in a process of its own, because a process never gives its peak back."""
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--measure", nargs=2, metavar=("LENGTH", "WHAT"), help="used by the benchmark itself")
    options = parser.parse_args()
    options = prepare(options, cpu={"lengths": [4096, 8192, 16384]}, cuda={"lengths": [8192, 32768, 131072]})
    if options.measure:
        print(peak(int(options.measure[0]), options.measure[1], options.device))
        return
    rows = [row_of(options, length) for length in progress(options.lengths, lambda length: f"{length:,} tokens")]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for what in CALLS:
        axes.plot(options.lengths, [row[f"{what} MiB"] for row in rows], "o-", label=what)
    axes.set(xlabel="tokens", ylabel="MiB above the inputs", title="Peak memory of one layer's prefill")
    axes.legend()
    notes = (
        "Peak above inputs, weights of the program included in neither column: `dense` is causal SDPA, `gated` the "
        "backend with 15% of the pairs open, `gate` the estimate from prompt moments; each contains its output. "
        "`kept` is what a bf16 cache carries in addition per layer: the moments."
    )
    save(options, "memory", "Memory of one gated layer", rows, notes, figure)


def row_of(options: argparse.Namespace, length: int) -> Row:
    """Measure the calls of one length, and count what a cache keeps."""
    row: Row = {"tokens": length}
    for what in CALLS:
        command = [sys.executable, __file__, "--device", str(options.device), "--measure", str(length), what]
        row[f"{what} MiB"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shape = shape_on(options.device, length, length)
    key = torch.empty(1, shape.kv_heads, length, shape.dim, dtype=torch.bfloat16, device="meta")
    cache = 2 * key.nbytes
    kept = sum(part.nbytes for part in PromptMoments.empty(key).parts)
    return row | {"KV cache MiB": cache / MIB, "kept MiB": kept / MIB, "kept / KV cache": kept / cache}


@torch.no_grad()
def peak(length: int, what: str, device: torch.device) -> float:
    """Return the peak of one call above its inputs, in MiB."""
    call(512, "gated", device)()
    run = call(length, what, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak_so_far(device)
    run()
    return _peak_so_far(device) - before


def call(length: int, what: str, device: torch.device) -> Callable[[], Any]:
    """Make the call to be measured."""
    shape = shape_on(device, length, length)
    inputs = make_inputs(shape, DTYPES["bf16" if device.type == "cuda" else "fp32"], device)
    if what == "dense":
        qkv = (inputs.query, inputs.key, inputs.value)
        return lambda: scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    if what == "gate":
        return lambda: bulk_log_mass_from_prompt(inputs)
    return gated(inputs, iid_gates(shape, 0.15))


def _peak_so_far(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / MIB if sys.platform == "darwin" else found / 1024


if __name__ == "__main__":
    main()
