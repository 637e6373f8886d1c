"""Prefill of one layer: gated attention against every dense kernel of the device.

python recipes/benchmarks/attention_prefill.py
"""

from __future__ import annotations

import argparse

import torch
from comparing import compare
from harness import Row, arguments, prepare, progress, save, speedup_figure
from problems import DTYPES, Shape, iid_gates, make_inputs, shipped_gates

CPU = {"lengths": [4096, 8192, 16384, 32768], "dtypes": ["fp32", "bf16"], "heads": 8, "kv_heads": 2, "dim": 64}
CUDA = {"lengths": [8192, 32768, 131072], "dtypes": ["bf16"], "heads": 32, "kv_heads": 8, "dim": 128}


def main() -> None:
    """Time every combination of dtype, length and open fraction."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int)
    parser.add_argument("--open", type=float, nargs="+", default=[0.15, 0.5, 1.0])
    parser.add_argument("--no-replay", action="store_true", help="leave out the gates of the shipped model")
    parser.add_argument("--flex", action="store_true", help="time compiled dense FlexAttention on a CPU too")
    options = parser.parse_args()
    device = prepare(options)
    for name, given in (CUDA if device.type == "cuda" else CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, given)
    options.window = options.window or (1024 if device.type == "cuda" else 256)
    rows = []
    with progress(len(options.dtypes) * len(options.lengths) + (not options.no_replay)) as step, torch.no_grad():
        for dtype in options.dtypes:
            for length in options.lengths:
                step(f"{dtype}, {length:,} tokens")
                rows += iid_rows(options, device, dtype, length)
        if not options.no_replay:
            step("gates of the shipped model")
            rows += replayed_rows(options, device)
    drawn = [row | {"series": f"{row['gates']}, {row['dtype']}"} for row in rows if row["gates"].endswith("%")]
    figure = speedup_figure(drawn, x="tokens", series="series", title="Prefill of one layer (dotted: limit)")
    notes = (
        f"Sink 16, window {options.window}, batch {options.batch}. Times are medians in milliseconds, the speed-up is "
        "the median over the repeats of the fastest dense time divided by the gated time, with lowest and highest. "
        "`share` is the share of the limit reached."
    )
    save(options, "attention_prefill", "Prefill of one layer", rows, figure, notes)


def iid_rows(options: argparse.Namespace, device: torch.device, dtype: str, length: int) -> list[Row]:
    """Time gates that are open at random."""
    shape = Shape(length, length, options.heads, options.kv_heads, options.dim, options.batch, options.window)
    inputs = make_inputs(shape, DTYPES[dtype], device)
    gates = {f"i.i.d. {fraction:.0%}": iid_gates(inputs, fraction) for fraction in options.open}
    fields: Row = {"dtype": dtype, "tokens": length, "heads": f"{shape.heads}/{shape.kv_heads}"}
    fields |= {"window": shape.window, "batch": shape.batch}
    return compare(options, device, inputs, gates, fields)


def replayed_rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time the gates that the shipped model's layers decide, in its own shape."""
    length = min(4096, max(options.lengths))
    gates = shipped_gates(length, steps=2)["prefill"]
    tokens = gates[0].shape[2]
    inputs = make_inputs(Shape(tokens, tokens, 6, 2, 32), torch.float32, device)
    named = {f"shipped model, layer {layer}": opened.to(device) for layer, opened in enumerate(gates)}
    return compare(
        options, device, inputs, named, {"dtype": "fp32", "tokens": tokens, "heads": "6/2", "window": 256, "batch": 1}
    )


if __name__ == "__main__":
    main()
