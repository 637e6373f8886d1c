"""Memory of one gated layer: workspace of a prefill beside dense attention, and what the cache keeps in addition.

python recipes/benchmarks/memory.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch
from harness import arguments, prepare, progress, save
from matplotlib.figure import Figure
from problems import DTYPES, Shape, gated, iid_gates, make_inputs
from torch.nn.functional import scaled_dot_product_attention

from patchattn.backends import load, resolve
from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt

MIB = 2**20


def main() -> None:
    """Measure every length in a process of its own, because a process never gives its peak back."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--measure", nargs=2, metavar=("LENGTH", "WHAT"), help="used by the benchmark itself")
    options = parser.parse_args()
    device = prepare(options)
    on_cuda = device.type == "cuda"
    if options.measure:
        print(peak(int(options.measure[0]), options.measure[1], device))
        return
    lengths = options.lengths or ([8192, 32768, 131072] if on_cuda else [4096, 8192, 16384])
    rows = []
    with progress(len(lengths)) as step:
        for length in lengths:
            step(f"{length:,} tokens")
            found = {what: _in_own_process(options, length, what) for what in ("dense", "gated", "gate")}
            shape = _shape(length, device)
            key = torch.empty(1, shape.kv_heads, length, shape.dim, dtype=torch.bfloat16, device="meta")
            cache = 2 * key.numel() * key.element_size()
            state = sum(part.numel() * part.element_size() for part in PromptMoments.empty(key)._parts())
            rows.append(
                {"tokens": length}
                | {f"{what} MiB": mib for what, mib in found.items()}
                | {"KV cache MiB": cache / MIB, "kept MiB": state / MIB, "kept / KV cache": state / cache}
            )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for what in ("dense", "gated", "gate"):
        axes.plot([row["tokens"] for row in rows], [row[f"{what} MiB"] for row in rows], "o-", label=what)
    axes.set(xlabel="tokens", ylabel="MiB above the inputs", title="Peak memory of one layer's prefill")
    axes.legend()
    notes = (
        "Peak above inputs, weights of the program included in neither column: `dense` is causal SDPA, `gated` the "
        "backend with 15% of the pairs open, `gate` the estimate from prompt moments; each contains its output. "
        "`kept` is what a bf16 cache carries in addition per layer: the moments."
    )
    save(options, "memory", "Memory of one gated layer", rows, figure, notes)


def _shape(length: int, device: torch.device) -> Shape:
    return Shape(length, length, 32, 8, 128, window=1024) if device.type == "cuda" else Shape(length, length)


def _in_own_process(options, length: int, what: str) -> float:
    command = [sys.executable, str(Path(__file__)), "--device", options.device, "--measure", str(length), what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.no_grad()
def peak(length: int, what: str, device: torch.device) -> float:
    """Return the peak of one call above its inputs, in MiB."""
    attend = load(resolve("auto", device))
    call(512, "gated", device, attend)()
    run = call(length, what, device, attend)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    before = _resident_peak()
    run()
    return _resident_peak() - before


def call(length: int, what: str, device: torch.device, attend):
    """Make the call to be measured."""
    inputs = make_inputs(_shape(length, device), DTYPES["bf16" if device.type == "cuda" else "fp32"], device)
    if what == "dense":
        qkv = (inputs.query, inputs.key, inputs.value)
        return lambda: scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    if what == "gate":
        return lambda: bulk_log_mass_from_prompt(inputs.query, inputs.key, inputs.regions, scale=inputs.scale)
    return gated(attend, inputs, iid_gates(inputs, 0.15))


def _resident_peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    main()
