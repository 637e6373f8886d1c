"""Where the time of one gated layer goes: local pass, moments and gate, bulk pass; prefill and decode.

python recipes/benchmarks/gate_overhead.py
"""

from __future__ import annotations

import torch
from harness import Row, arguments, measure, prepare, progress, save
from matplotlib.figure import Figure
from problems import DTYPES, Shape, dense_baselines, gated, iid_gates, make_inputs

from patchattn.backends import load, resolve
from patchattn.call.inputs import AttentionInputs
from patchattn.moments.prompt import bulk_log_mass_from_prompt


def main() -> None:
    """Time the parts on their own and the whole."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--open", type=float, default=0.15)
    options = parser.parse_args()
    device = prepare(options)
    on_cuda = device.type == "cuda"
    dtype = options.dtype or ("bf16" if on_cuda else "fp32")
    sizes = {"heads": 32, "kv_heads": 8, "dim": 128, "window": 1024} if on_cuda else {}
    rows = []
    with progress(2 * len(options.lengths)) as step, torch.no_grad():
        for length in options.lengths:
            for phase, queries in (("prefill", length), ("decode", 1)):
                step(f"{phase}, {length:,} tokens")
                inputs = make_inputs(Shape(length, queries, **sizes), DTYPES[dtype], device)
                rows.append(parts(options, device, inputs, phase) | {"dtype": dtype})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{row['phase']}\n{row['tokens']:,}" for row in rows]
    bottom = [0.0] * len(rows)
    for part in ("local", "bulk", "gate"):
        shares = [row[f"{part} ms"] / row["dense ms"] for row in rows]
        axes.bar(labels, shares, bottom=bottom, label=part)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(ylabel="share of dense time", title=f"Parts of one gated layer, {options.open:.0%} open")
    axes.legend()
    notes = (
        f"{options.open:.0%} of the pairs open, i.i.d.; medians in milliseconds. `local` is a call with all gates "
        "closed, `bulk` what open pairs add to it (gathering, bulk keys, merge), `gate` the estimate from prompt "
        "moments, which a forced gate does not need; in decode the moments are those left by the step before."
    )
    save(options, "gate_overhead", "Parts of one gated layer", rows, figure, notes)


def parts(options, device: torch.device, inputs: AttentionInputs, phase: str) -> Row:
    """Time one shape."""
    attend = load(resolve(options.backend, device))
    dense = dense_baselines(inputs, compiled_flex=device.type == "cuda")
    state = None
    if phase == "decode":
        _, state = bulk_log_mass_from_prompt(inputs.query, inputs.key, inputs.regions, scale=inputs.scale)
    bound = 1 if phase == "decode" else inputs.key.shape[2] // 128 + 1
    variants = dense | {
        "closed": gated(attend, inputs, iid_gates(inputs, 0.0)),
        "gated": gated(attend, inputs, iid_gates(inputs, options.open)),
        "gate": lambda: bulk_log_mass_from_prompt(
            inputs.query,
            inputs.key,
            inputs.regions,
            state,
            scale=inputs.scale,
            max_chunks=bound if device.type == "cuda" else None,
        ),
    }
    timed = measure(variants, device=device, repeats=options.repeats, clock=options.clock)
    ms = {name: timing.median for name, timing in timed.timings.items()}
    best = timed.fastest(list(dense))
    return {
        "phase": phase,
        "tokens": inputs.key.shape[2],
        "dense": best,
        "dense ms": ms[best],
        "local ms": ms["closed"],
        "bulk ms": max(ms["gated"] - ms["closed"], 0.0),
        "gate ms": ms["gate"],
        "gate / dense": ms["gate"] / ms[best],
        "quiet": timed.is_quiet,
    }


if __name__ == "__main__":
    main()
