"""One row of a kernel benchmark: gated attention beside the fastest dense kernel and the arithmetic limit."""

from __future__ import annotations

import argparse

import torch
from harness import Row, measure
from problems import dense_baselines, facts, gated, graphed
from torch import Tensor

from patchattn.backends import load, resolve
from patchattn.call.inputs import AttentionInputs


def compare(
    options: argparse.Namespace, device: torch.device, inputs: AttentionInputs, gates: dict[str, Tensor], fields: Row
) -> list[Row]:
    """Time gates and baselines in turn.

    Args:
        options: `backend`, `flex` and `repeats`.
        device: Where to run.
        inputs: The call.
        gates: Decisions [batch, heads, query] by name; one row of the result each.
        fields: What to write in front of each row.
    """
    attend = load(resolve(options.backend, device))
    dense = dense_baselines(inputs, compiled_flex=options.flex or device.type == "cuda")
    calls = {name: gated(attend, inputs, opened) for name, opened in gates.items()}
    timed_calls = dense | calls
    if device.type == "cuda" and inputs.query.shape[2] == 1:
        # A decode step is launched from a CUDA graph, dense and gated alike; otherwise launches are what is timed.
        timed_calls = {name: graphed(call) for name, call in timed_calls.items()}
    timed = measure(timed_calls, device=device, repeats=options.repeats, clock=options.clock)
    best = timed.fastest(list(dense))
    rows = []
    for name, call in calls.items():
        timing, found = timed.timings[name], facts(call(), inputs)
        speedup = timed.timings[best].ratio(timing)
        quartiles = sorted(a / b for a, b in zip(timed.timings[best].samples, timing.samples, strict=True))
        rows.append(
            fields
            | {"gates": name, "dense": best, "dense ms": timed.timings[best].median, "gated ms": timing.median}
            | {"speed-up": speedup, "lowest": quartiles[0], "highest": quartiles[-1]}
            | found
            | {"share": speedup / found["limit"], "quiet": timed.is_quiet}
        )
    return rows
