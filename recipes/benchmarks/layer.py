"""One layer, prefill or decode: gated attention against every dense kernel of the device.

python recipes/benchmarks/layer.py prefill
python recipes/benchmarks/layer.py decode
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from harness import Row, arguments, measure, prepare, progress, save, speedup_figure
from problems import DTYPES, Shape, dense_baselines, gated, graphed, iid_gates, make_inputs, shape_on, shipped_gates
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs

CPU = {"lengths": [4096, 8192, 16384, 32768], "dtypes": ["fp32", "bf16"]}
CUDA = {"lengths": [8192, 32768, 131072], "dtypes": ["bf16"]}
SIZES = ("heads", "kv_heads", "dim", "batch", "window")


class Case(NamedTuple):
    """A call to time: its shape, and decisions [batch, heads, queries] by name, one row of the result each."""

    dtype: str
    shape: Shape
    gates: dict[str, Tensor]


def main() -> None:
    """Time every combination of dtype, length and gates."""
    parser = arguments(__doc__)
    parser.add_argument("phase", choices=["prefill", "decode"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int)
    parser.add_argument("--open", type=float, nargs="+", default=[0.15, 0.5, 1.0], help="open fractions of a prefill")
    parser.add_argument("--no-replay", action="store_true", help="leave out the gates of the shipped model")
    parser.add_argument("--flex", action="store_true", help="time compiled dense FlexAttention on a CPU too")
    options = prepare(parser.parse_args(), cpu=CPU, cuda=CUDA)
    cases = [*drawn_cases(options), *([] if options.no_replay else replayed_cases(options))]
    rows: list[Row] = []
    with torch.no_grad():
        for case in progress(cases, lambda case: f"{case.dtype}, {case.shape.length:,} tokens"):
            rows += timed_rows(options, case)
    title = f"{options.phase.capitalize()} of one layer"
    drawn = [row for row in rows if "layer" not in row["gates"]]
    figure = speedup_figure(drawn, ("gates", "dtype"), f"{title} (dotted: limit)")
    shape = cases[0].shape
    notes = (
        f"Sink 16, window {shape.window}, batch {shape.batch}. Times are medians in milliseconds, the speed-up is the "
        "median over the repeats of the fastest dense time divided by the gated time, with lowest and highest. "
        "`share` is the share of the limit reached."
    )
    if options.phase == "decode":
        notes += (
            " Gates of the shipped model are those of its most typical step (median of open pairs), in its own shape."
        )
    save(options, options.phase, title, rows, notes, figure)


def drawn_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Open pairs of a prefill at random; in decode no KV head, one, and all of them."""
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
    if options.phase == "decode" and options.device.type == "cuda":
        sizes = {"batch": 8} | sizes
    for dtype, length in itertools.product(options.dtypes, options.lengths):
        queries = length if options.phase == "prefill" else 1
        shape = replace(shape_on(options.device, length, queries), **sizes)
        if options.phase == "prefill":
            yield Case(dtype, shape, {f"i.i.d. {share:.0%}": iid_gates(shape, share) for share in options.open})
        else:
            closed = torch.zeros(shape.batch, shape.heads, 1, dtype=torch.bool)
            one = closed.clone()
            one[:, : shape.heads // shape.kv_heads] = True
            gates = {"all closed": closed, f"1 of {shape.kv_heads} KV heads open": one, "all open": ~closed}
            yield Case(dtype, shape, gates)


def replayed_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Take decisions of the shipped model, in its shape: of each layer's prefill, or of the typical decode step."""
    longest = min(4096, max(options.lengths))
    if options.phase == "prefill":
        gates = shipped_gates(longest, steps=2)["prefill"]
        tokens = gates[0].shape[2]
        named = {f"shipped model, layer {layer}": opened for layer, opened in enumerate(gates)}
        yield Case("fp32", Shape(tokens, tokens, 6, 2, 32), named)
        return
    recorded = sorted(shipped_gates(longest)["decode"], key=lambda opened: int(opened.sum()))
    for length in options.lengths:
        yield Case(options.dtypes[0], Shape(length, 1, 6, 2, 32), {"shipped model": recorded[len(recorded) // 2]})


def timed_rows(options: argparse.Namespace, case: Case, *, in_graph: bool = True) -> list[Row]:
    """Time gates and baselines in turn; each row has the fastest dense kernel and the arithmetic limit.

    Decode steps on CUDA are launched from a CUDA graph, dense and gated alike, unless `in_graph` is False: otherwise
    launches are what is timed.
    """
    on_cuda, shape = options.device.type == "cuda", case.shape
    inputs = make_inputs(shape, DTYPES[case.dtype], options.device)
    dense = dense_baselines(inputs, compiled_flex=options.flex or on_cuda)
    calls = {name: gated(inputs, opened, options.backend) for name, opened in case.gates.items()}
    timed_calls = dense | calls
    if on_cuda and shape.queries == 1 and in_graph:
        timed_calls = {name: graphed(call) for name, call in timed_calls.items()}
    timed = measure(timed_calls, device=options.device, repeats=options.repeats, clock=options.clock)
    best = min(dense, key=timed.ms)
    rows = []
    for name, call in calls.items():
        row: Row = {"dtype": case.dtype, "tokens": shape.length, "heads": f"{shape.heads}/{shape.kv_heads}"}
        row |= {"window": shape.window, "batch": shape.batch, "gates": name}
        row |= {"dense": best, "dense ms": timed.ms(best), "gated ms": timed.ms(name)}
        row |= timed.speedup(best, name) | facts(call(), inputs)
        rows.append(row | {"share": row["speed-up"] / row["limit"], "quiet": timed.is_quiet})
    return rows


def facts(attended: Attended, inputs: AttentionInputs) -> dict[str, float]:
    """Say how many pairs were open, how many keys were scored, and how much faster that could be at most."""
    regions, heads = inputs.regions, inputs.query.shape[1]
    opened = float(attended.open.sum() / (regions.asked.sum() * heads))
    density = float(attended.scored_keys / (regions.n_causal.sum() * heads))
    return {"open": opened, "density": density, "limit": 1 / density}


if __name__ == "__main__":
    main()
