"""What gating adds: the parts of one gated layer, and recording in the shipped model.

python recipes/benchmarks/overhead.py gate
python recipes/benchmarks/overhead.py recording
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from harness import Row, arguments, measure, milliseconds, prepare, progress, save
from matplotlib.figure import Figure
from problems import DTYPES, Shape, dense_baselines, gated, iid_gates, make_inputs, reading, shape_on, shipped_model
from transformers import DynamicCache

import patchattn
from patchattn import Policy
from patchattn.call.inputs import AttentionInputs
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.moment import with_offsets
from patchattn.hf.architecture import with_cache
from patchattn.hf.counting import Counters
from patchattn.hf.patching import Record
from patchattn.hf.state import LayerState
from patchattn.moments.prompt import bulk_log_mass_from_prompt

RECORDS: tuple[Record, ...] = (None, "summary", "timeline")
# Steps of decode need places left in the model's context.
_ROOM_TO_DECODE = 512
CPU = torch.device("cpu")


def main() -> None:
    """Measure one of the two."""
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["gate", "recording"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the layer")
    parser.add_argument("--open", type=float, default=0.15, help="open fraction of the layer")
    parser.add_argument("--window", type=int, default=256, help="of the shipped model")
    parser.add_argument("--steps", type=int, default=40, help="steps of decode for each repeat of recording")
    options = prepare(parser.parse_args(), cpu={"dtype": "fp32"}, cuda={"dtype": "bf16"})
    lengths = options.lengths or ([4096, 8192, 16384] if options.what == "gate" else [4096])
    cases = list(itertools.product(lengths, ("prefill", "decode")))
    with torch.no_grad():
        (gate if options.what == "gate" else recording)(options, cases)


def gate(options: argparse.Namespace, cases: list[tuple[int, str]]) -> None:
    """Time local pass, moments and gate, and bulk pass on their own and the whole."""
    rows = [parts(options, *case) for case in progress(cases, lambda case: f"{case[1]}, {case[0]:,} tokens")]
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
        "moments, which a forced gate does not need; in decode the moments are those left by the step before. "
        "`probe` is what thresholds by price add to it: a product with a hidden state as wide as all query heads."
    )
    save(options, "gate_overhead", "Parts of one gated layer", rows, notes, figure)


def parts(options: argparse.Namespace, length: int, phase: str) -> Row:
    """Time one shape."""
    on_cuda, queries = options.device.type == "cuda", length if phase == "prefill" else 1
    shape = shape_on(options.device, length, queries)
    inputs = make_inputs(shape, DTYPES[options.dtype], options.device)
    dense = dense_baselines(inputs, compiled_flex=on_cuda)
    state, bound = (bulk_log_mass_from_prompt(inputs)[1], 1) if phase == "decode" else (None, length // 128 + 1)
    variants = dense | {
        "closed": gated(inputs, iid_gates(shape, 0.0), options.backend),
        "gated": gated(inputs, iid_gates(shape, options.open), options.backend),
        "gate": lambda: bulk_log_mass_from_prompt(inputs, state, max_chunks=bound if on_cuda else None),
        "probe": with_probe(shape, inputs),
    }
    timed = measure(variants, device=options.device, repeats=options.repeats, clock=options.clock)
    ms, best = {name: timed.ms(name) for name in variants}, min(dense, key=timed.ms)
    row: Row = {"phase": phase, "tokens": length, "dense": best, "dense ms": ms[best], "local ms": ms["closed"]}
    row |= {"bulk ms": max(ms["gated"] - ms["closed"], 0.0), "gate ms": ms["gate"]}
    row |= {"probe ms": ms["probe"], "gate / dense": ms["gate"] / ms[best], "probe / dense": ms["probe"] / ms[best]}
    return row | {"quiet": timed.is_quiet, "dtype": options.dtype}


def with_probe(shape: Shape, inputs: AttentionInputs) -> Callable[[], torch.Tensor]:
    """Add what a probe says of a hidden state to a bulk log mass."""
    drawn = torch.randn(shape.batch, shape.queries, shape.heads * shape.dim, generator=torch.Generator().manual_seed(0))
    hidden, mass = drawn.to(inputs.query), torch.zeros(inputs.query.shape[:3], device=inputs.query.device)
    heads = MeasuredHeads(mass[0, :, 0], probe=torch.ones(shape.heads, hidden.shape[2], device=hidden.device))

    def add() -> torch.Tensor:
        offsets = heads.offsets(hidden, inputs.compute_dtype)
        assert offsets is not None
        return with_offsets(mass, offsets)

    return add


def recording(options: argparse.Namespace, cases: list[tuple[int, str]]) -> None:
    """Time prefill and decode of the shipped model for each way of recording."""
    policy = Policy(window_size=options.window, min_bulk=0)
    models, handles = {}, {}
    for record in RECORDS:
        model, ids = shipped_model(max(cases)[0])
        models[str(record)], ids = model.to(options.device), ids.to(options.device)
        handles[record] = patchattn.patch(model, policy, backend=options.backend, record=record)
    rows = []
    for length, phase in progress(cases, lambda case: f"{case[1]}, {case[0]:,} tokens"):
        call, passes = (reading, 1) if phase == "prefill" else (decode, options.steps)
        variants = {name: call(model, ids[:, :length]) for name, model in models.items()}
        # Short turns: a slow moment of the machine lasts longer than a pass.
        repeats = passes * options.repeats
        timed = measure(variants, device=options.device, repeats=repeats, at_least_ms=0.0, clock=options.clock)
        for name, variant in variants.items():
            ratios = timed.ratios(name, "None")
            low, cost, high = (torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])) - 1).tolist()
            inside = statistics.median(share_inside(variant) for _ in range(3 * passes))
            shares = {"cost": cost, "from": low, "to": high, "inside": inside}
            row: Row = {"phase": phase, "record": name, "tokens": length, "ms": timed.ms(name)}
            row |= {key: f"{100 * share:+.1f}%" for key, share in shares.items()}
            rows.append(row | {"repeats": len(ratios), "quiet": timed.is_quiet})
    report = handles["summary"].report()
    opened = ", ".join(f"{report.open_fraction(phase):.0%} in {phase}" for phase in ("prefill", "decode"))
    notes = (
        f"The shipped model in bfloat16, window {policy.window_size}, `min_bulk=0`, {opened} of the pairs open. "
        "Medians of forward passes in milliseconds; cost is the median over the repeats of the time divided by that of "
        "`record=None` in the same repeat, less one, and from and to are its quartiles. Inside is the share of a pass "
        "that is spent in the functions that record, which a busy machine does not blur; on a GPU it is what the host "
        "spends there. The goal is 3%."
    )
    save(options, "report_recording", "What recording costs", rows, notes, cost_figure(rows))


def decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Read one token more on a cache that grows."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-_ROOM_TO_DECODE], **with_cache(model, cache), logits_to_keep=1)
    return lambda: model(ids[:, -1:], **with_cache(model, cache), logits_to_keep=1)


def share_inside(call: Callable[[], Any]) -> float:
    """Time one pass, and in it the functions that record."""
    inside: list[float] = []

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: inside.append(milliseconds(partial(function, *args), CPU))

    count, keep = timed(Counters.count), timed(LayerState.keep)
    with mock.patch.object(Counters, "count", count), mock.patch.object(LayerState, "keep", keep):
        whole = milliseconds(call, CPU)
    return sum(inside) / whole


def cost_figure(rows: list[Row]) -> Figure:
    """Draw the cost of each way of recording, with the spread over the repeats."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row["record"] != "None"]
    cost, low, high, inside = (
        [float(row[name].rstrip("%")) for row in shown] for name in ("cost", "from", "to", "inside")
    )
    spread = [[a - b for a, b in zip(cost, low, strict=True)], [a - b for a, b in zip(high, cost, strict=True)]]
    axes.errorbar(range(len(shown)), cost, yerr=spread, fmt="o", capsize=4)
    axes.plot(range(len(shown)), inside, "x", color="black", label="inside")
    axes.axhline(3, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [f"{row['phase']}\n{row['record']}" for row in shown])
    axes.legend()
    axes.set(ylabel="time over record=None, percent", title="What recording costs")
    return figure


if __name__ == "__main__":
    main()
