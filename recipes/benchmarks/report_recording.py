"""What recording costs: the shipped model patched with `record=None`, `"summary"` and `"timeline"`, timed in turn.

python recipes/benchmarks/report_recording.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Row, arguments, measure, prepare, progress, save
from matplotlib.figure import Figure
from transformers import DynamicCache

import patchattn
from patchattn import Policy, demo
from patchattn.hf.patching import Record

RECORDS: tuple[Record, ...] = (None, "summary", "timeline")
# Steps of decode need places left in the model's context.
_ROOM_TO_DECODE = 512


def main() -> None:
    """Time prefill and decode."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    device = prepare(options)
    models = {}
    for record in RECORDS:
        model, tokenizer = demo.load()
        model = model.to(device)
        policy = Policy(window_size=options.window, min_bulk=0)
        models[record] = model, patchattn.patch(model, policy, backend=options.backend, record=record)
    ids = torch.tensor([tokenizer(demo.sample_text())["input_ids"][: options.length]], device=device)
    rows = []
    with progress(2) as step, torch.no_grad():
        for phase, call in (("prefill", prefill), ("decode", decode)):
            step(phase)
            variants = {str(record): call(model, ids) for record, (model, _) in models.items()}
            timed = measure(variants, device=device, repeats=options.repeats, clock=options.clock)
            for name, timing in timed.timings.items():
                ratios = sorted(a / b for a, b in zip(timing.samples, timed.timings["None"].samples, strict=True))
                middle = timing.ratio(timed.timings["None"])
                shares = {"cost": middle - 1, "lowest": ratios[0] - 1, "highest": ratios[-1] - 1}
                percent = {key: f"{100 * share:+.1f}%" for key, share in shares.items()}
                fields = {"phase": phase, "record": name, "tokens": ids.shape[1], "ms": timing.median}
                rows.append(fields | percent | {"repeats": len(ratios), "quiet": timed.is_quiet})
    report = models["summary"][1].report()
    opened = ", ".join(f"{report.open_fraction(phase):.0%} in {phase}" for phase in ("prefill", "decode"))
    notes = (
        f"The shipped model in bfloat16, window {options.window}, `min_bulk=0`, {opened} of the pairs open. Medians of "
        "forward passes in milliseconds; cost is the median over the repeats of the time divided by that of "
        "`record=None` in the same repeat, less one; lowest and highest are of single repeats. The goal is 3%."
    )
    save(options, "report_recording", "What recording costs", rows, figure_of(rows), notes)


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Read the whole text."""
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Read one token more on a cache that grows."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-_ROOM_TO_DECODE], past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]
    return lambda: model(token, past_key_values=cache, logits_to_keep=1)


def figure_of(rows: list[Row]) -> Figure:
    """Draw the cost of each way of recording, with the spread over the repeats."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row["record"] != "None"]
    for index, row in enumerate(shown):
        cost, low, high = (float(row[name].rstrip("%")) for name in ("cost", "lowest", "highest"))
        axes.errorbar([index], [cost], yerr=[[max(cost - low, 0)], [max(high - cost, 0)]], fmt="o", capsize=4)
    axes.axhline(3, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [f"{row['phase']}\n{row['record']}" for row in shown])
    axes.set(ylabel="time over record=None, percent", title="What recording costs")
    return figure


if __name__ == "__main__":
    main()
