"""Decode of one layer: one query per sequence, against every dense kernel of the device.

python recipes/benchmarks/attention_decode.py
"""

from __future__ import annotations

import argparse

import torch
from comparing import compare
from harness import Row, arguments, prepare, progress, save, speedup_figure
from problems import DTYPES, Shape, make_inputs, shipped_gates
from torch import Tensor

CPU = {"lengths": [4096, 8192, 16384, 32768], "dtypes": ["fp32", "bf16"], "heads": 8, "kv_heads": 2, "dim": 64}
CUDA = {"lengths": [8192, 32768, 131072], "dtypes": ["bf16"], "heads": 32, "kv_heads": 8, "dim": 128}


def main() -> None:
    """Time every combination of dtype and length, with whole KV heads open."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--no-replay", action="store_true", help="leave out the gates of the shipped model")
    parser.add_argument("--flex", action="store_true", help="time compiled dense FlexAttention on a CPU too")
    options = parser.parse_args()
    device = prepare(options)
    for name, given in (CUDA if device.type == "cuda" else CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, given)
    options.window = options.window or (1024 if device.type == "cuda" else 256)
    options.batch = options.batch or (8 if device.type == "cuda" else 1)
    recorded = [] if options.no_replay else shipped_gates(min(4096, max(options.lengths)))["decode"]
    rows = []
    with progress(len(options.dtypes) * len(options.lengths)) as step, torch.no_grad():
        for dtype in options.dtypes:
            for length in options.lengths:
                step(f"{dtype}, {length:,} tokens")
                rows += timed_rows(options, device, dtype, length)
                if recorded and dtype == options.dtypes[0]:
                    rows += replayed_rows(options, device, dtype, length, recorded)
    drawn = [row | {"series": f"{row['gates']}, {row['dtype']}"} for row in rows]
    figure = speedup_figure(drawn, x="tokens", series="series", title="Decode of one layer (dotted: limit)")
    notes = (
        f"Sink 16, window {options.window}, batch {options.batch}. Times are medians in milliseconds, the speed-up is "
        "the median over the repeats of the fastest dense time divided by the gated time, with lowest and highest. "
        "`share` is the share of the limit reached. Gates of the shipped model are those of its most typical step "
        "(median of open pairs), in its own shape."
    )
    save(options, "attention_decode", "Decode of one layer", rows, figure, notes)


def timed_rows(options: argparse.Namespace, device: torch.device, dtype: str, length: int) -> list[Row]:
    """Time all heads closed, one KV head open, and all open."""
    shape = Shape(length, 1, options.heads, options.kv_heads, options.dim, options.batch, options.window)
    inputs = make_inputs(shape, DTYPES[dtype], device)
    closed = torch.zeros(shape.batch, shape.heads, 1, dtype=torch.bool, device=device)
    one = closed.clone()
    one[:, : shape.heads // shape.kv_heads] = True
    gates = {"all closed": closed, f"1 of {shape.kv_heads} KV heads open": one, "all open": ~closed}
    fields: Row = {"dtype": dtype, "tokens": length, "heads": f"{shape.heads}/{shape.kv_heads}"}
    fields |= {"window": shape.window, "batch": shape.batch}
    return compare(options, device, inputs, gates, fields)


def replayed_rows(
    options: argparse.Namespace, device: torch.device, dtype: str, length: int, recorded: list[Tensor]
) -> list[Row]:
    """Time recorded decisions of the shipped model: the step with the median number of open pairs."""
    inputs = make_inputs(Shape(length, 1, 6, 2, 32), DTYPES[dtype], device)
    typical = sorted(recorded, key=lambda opened: int(opened.sum()))[len(recorded) // 2]
    fields: Row = {"dtype": dtype, "tokens": length, "heads": "6/2", "window": 256, "batch": 1}
    return compare(options, device, inputs, {"shipped model": typical.to(device)}, fields)


if __name__ == "__main__":
    main()
