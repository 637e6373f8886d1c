"""What recording costs: the shipped model patched with `record=None`, `"summary"` and `"timeline"`, timed in turn.

python recipes/benchmarks/report_recording.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from harness import Row, Timing, arguments, measure, prepare, progress, save
from matplotlib.figure import Figure
from transformers import DynamicCache

import patchattn
from patchattn import Policy, demo
from patchattn.evaluation.documents import check_longest
from patchattn.hf.architecture import with_cache
from patchattn.hf.attention import LayerState
from patchattn.hf.patching import Record

RECORDS: tuple[Record, ...] = (None, "summary", "timeline")
# Steps of decode need places left in the model's context.
_ROOM_TO_DECODE = 512


def main() -> None:
    """Time prefill and decode."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="steps of decode for each repeat")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    device = prepare(options)
    models = {}
    for record in RECORDS:
        model, tokenizer = demo.load()
        check_longest(model, options.length)
        model = model.to(device)
        policy = Policy(window_size=options.window, min_bulk=0)
        models[record] = model, patchattn.patch(model, policy, backend=options.backend, record=record)
    ids = torch.tensor([tokenizer(demo.sample_text())["input_ids"][: options.length]], device=device)
    rows = []
    with progress(2) as step, torch.no_grad():
        for phase, call, passes in (("prefill", prefill, 1), ("decode", decode, options.steps)):
            step(phase)
            variants = {str(record): call(model, ids) for record, (model, _) in models.items()}
            # Short turns: a slow moment of the machine lasts longer than a pass.
            repeats = passes * options.repeats
            timed = measure(variants, device=device, repeats=repeats, at_least_ms=0.0, clock=options.clock)
            for name, timing in timed.timings.items():
                ratios = [a / b for a, b in zip(timing.samples, timed.timings["None"].samples, strict=True)]
                spread = Timing.of(ratios)
                shares = {"cost": spread.median - 1, "from": spread.low - 1, "to": spread.high - 1}
                shares["inside"] = statistics.median(share_inside(variants[name]) for _ in range(3 * passes))
                percent = {key: f"{100 * share:+.1f}%" for key, share in shares.items()}
                fields = {"phase": phase, "record": name, "tokens": ids.shape[1], "ms": timing.median}
                rows.append(fields | percent | {"repeats": len(ratios), "quiet": timed.is_quiet})
    report = models["summary"][1].report()
    opened = ", ".join(f"{report.open_fraction(phase):.0%} in {phase}" for phase in ("prefill", "decode"))
    notes = (
        f"The shipped model in bfloat16, window {options.window}, `min_bulk=0`, {opened} of the pairs open. Medians of "
        "forward passes in milliseconds; cost is the median over the repeats of the time divided by that of "
        "`record=None` in the same repeat, less one, and from and to are its quartiles. Inside is the share of a pass "
        "that is spent in the functions that record, which a busy machine does not blur; on a GPU it is what the host "
        "spends there. The goal is 3%."
    )
    save(options, "report_recording", "What recording costs", rows, figure_of(rows), notes)


def share_inside(call: Callable[[], Any]) -> float:
    """Time one pass, and in it the functions that record."""
    inside = 0.0

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: Any) -> None:
            nonlocal inside
            begin = time.perf_counter()
            function(*args)
            inside += time.perf_counter() - begin

        return wrapper

    with mock.patch.multiple(LayerState, count=timed(LayerState.count), keep=timed(LayerState.keep)):
        begin = time.perf_counter()
        call()
        return inside / (time.perf_counter() - begin)


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Read the whole text."""
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Read one token more on a cache that grows."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-_ROOM_TO_DECODE], **with_cache(model, cache), logits_to_keep=1)
    token = ids[:, -1:]
    return lambda: model(token, **with_cache(model, cache), logits_to_keep=1)


def figure_of(rows: list[Row]) -> Figure:
    """Draw the cost of each way of recording, with the spread over the repeats."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row["record"] != "None"]
    for index, row in enumerate(shown):
        cost, low, high = (float(row[name].rstrip("%")) for name in ("cost", "from", "to"))
        axes.plot(
            [index], [float(row["inside"].rstrip("%"))], "x", color="black", label="inside" if index == 0 else None
        )
        axes.errorbar([index], [cost], yerr=[[max(cost - low, 0)], [max(high - cost, 0)]], fmt="o", capsize=4)
    axes.axhline(3, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [f"{row['phase']}\n{row['record']}" for row in shown])
    axes.legend()
    axes.set(ylabel="time over record=None, percent", title="What recording costs")
    return figure


if __name__ == "__main__":
    main()
