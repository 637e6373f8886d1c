"""Tokens per second and memory of a model that drafts, beside the stock model and every gate open, with both caches.

python recipes/benchmarks/drafting.py --models FOLDER --dtype bf16
python recipes/benchmarks/drafting.py --models FOLDER --drafts "drafts" "drafts of 2" --repeats 5
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import CLOCKS, Row, Timed, arguments, in_turn, milliseconds, prepare, progress, save
from matplotlib.figure import Figure
from model import MIB, context, load, peak_of, twin
from problems import DTYPES
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from whole import CACHES, OPEN, STOCK, faster_stock

import patchattn
from patchattn import ClosedGate, OpenGate, Policy
from patchattn.hf.architecture import with_cache

CLOSED = Policy(gate=ClosedGate(), phases=frozenset({"decode"}), min_bulk=0, window_size=1024)
DRAFTS: dict[str, tuple[Policy, Any]] = {
    "drafts": (CLOSED, "auto"),
    "drafts of 2": (CLOSED, 2),
    "drafts of 4": (CLOSED, 4),
    "drafts, window 2,048": (CLOSED.model_copy(update={"window_size": 2048}), "auto"),
    "drafts, gates asked": (Policy(phases=frozenset({"decode"}), min_bulk=0), "auto"),
}
NOTES = """\
Batch 1, greedy, {new} new tokens a repeat after a prompt of real text that was read densely once and is copied into \
the cache of each call, which is not timed. `speed-up` is against stock `sdpa` with the faster of its caches, `of \
open` against the patched model with every gate open and the faster of its caches: medians over repeats in turn. \
Drafts are of closed heads, where it does not say otherwise, and of a length that adapts, where it names none. `kept` \
are drafted tokens that dense attention kept, `a round` the tokens that a round wrote, `drafted` the share of the new \
tokens that come from rounds with a draft; of all repeats, what is learned in the first ones included. `same` is the \
share of the new tokens, up to the first that differs, that the model with every gate open writes too: all in float32; \
in bfloat16 it is for stock what rounding alone does. `MiB` is the most that a call which writes {steps} tokens holds \
beside weights and the cache it is given, in a pass of its own after the timed ones; `memory` is the change of all \
three together against stock with the same cache. Goals: `memory` at most +2%, and drafts that adapt never under 0.97x \
of stock with the same cache (`of cache`).\
"""
STEPS = 16


def main() -> None:
    """Time every length, and write the table."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--models", nargs="+", default=["shipped"], help="shipped, or folders")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a repeat")
    parser.add_argument("--drafts", nargs="+", choices=list(DRAFTS), default=list(DRAFTS), help="all by default")
    parser.add_argument("--window", type=int, help="window of all policies, in place of the default one")
    options = prepare(parser.parse_args())
    options.layers = 0  # of models with random weights, which write nothing worth drafting
    every = itertools.product(options.models, options.lengths)
    cases = [case for case in every if case[1] <= context(options, case[0])]
    if not cases:
        parser.error(f"none of the lengths {options.lengths} is within the context of a model: give shorter ones")
    rows: list[Row] = []
    with torch.no_grad():
        for case in progress(cases, lambda case: f"{Path(case[0]).name}, {case[1]:,} tokens"):
            rows += timed_rows(options, *case)
    save(
        options,
        "drafting",
        "Lossless drafts",
        rows,
        NOTES.format(new=options.new, steps=min(STEPS, options.new)),
        figure(rows),
    )


class Writers:
    """Twins of one model that write on from the same prompt.

    Args:
        models: By policy; the stock one reads the prompt.
        tokens: [1, tokens]; the prompt.
        new: New tokens of a call.
    """

    def __init__(self, models: dict[str, Any], tokens: torch.Tensor, new: int) -> None:
        self.models, self.tokens, self.new = models, tokens, new
        self.texts: dict[tuple[str, str], torch.Tensor] = {}
        self.read = DynamicCache(config=models[STOCK].config)
        models[STOCK](tokens[:, :-1], **with_cache(models[STOCK], self.read), use_cache=True, logits_to_keep=1)

    def call(self, cell: tuple[str, str], new: int) -> Callable[[], None]:
        """Copy the cache, and make a call that writes on in the copy."""
        model = self.models[cell[0]]
        is_static = cell[1] == "static"
        cache = StaticCache(model.config, self.tokens.shape[1] + self.new) if is_static else DynamicCache()
        for layer, filled in enumerate(self.read.layers):
            cache.update(filled.keys.clone(), filled.values.clone(), layer)
        asked = {"attention_mask": torch.ones_like(self.tokens), "do_sample": False, **with_cache(model, cache)}
        asked |= {"max_new_tokens": new, "min_new_tokens": new}

        def call() -> None:
            self.texts[cell] = model.generate(self.tokens, **asked)[0, self.tokens.shape[1] :]

        return call

    def write(self, cell: tuple[str, str], options: argparse.Namespace) -> float:
        """Write on in a copy of the cache; returns milliseconds."""
        return milliseconds(self.call(cell, self.new), options.device, 1, CLOCKS[options.clock])

    def mib(self, cell: tuple[str, str], options: argparse.Namespace) -> tuple[float, float]:
        """Return the most that writing a few tokens holds beside weights and cache, and weights and cache, MiB."""
        held = sum(tensor.nbytes for tensor in self.models[cell[0]].parameters())
        room = self.tokens.shape[1] + (self.new if cell[1] == "static" else -1)
        per_token = sum((layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes) for layer in self.read.layers)
        call = self.call(cell, min(STEPS, self.new))
        texts = dict(self.texts)
        most = peak_of(call, options.device)
        self.texts = texts
        return most, (held + room * per_token) / MIB

    def same(self, cell: tuple[str, str]) -> float:
        """Return the share of the text that the model with every gate open writes too."""
        equal = self.texts[cell] == self.texts[OPEN, "dynamic"]
        return equal.long().cumprod(0).float().mean().item()


def timed_rows(options: argparse.Namespace, name: str, length: int) -> list[Row]:
    """Time stock, every gate open and all drafts in turn."""
    longest = int(min(context(options, name), max(options.lengths) + options.new))
    model, tokens = load(name, longest, options.layers, options.dtype, options.device)
    tokens = tokens[:, : min(length, longest - options.new)]
    chosen_drafts = {label: DRAFTS[label] for label in options.drafts}
    models, handles = {STOCK: model} | {label: twin(model) for label in (OPEN, *chosen_drafts)}, {}
    patchattn.patch(models[OPEN], Policy(gate=OpenGate(), min_bulk=0))
    for label, (policy, drafted) in chosen_drafts.items():
        chosen = policy.model_copy(update={"window_size": options.window}) if options.window else policy
        handles[label] = patchattn.draft(models[label], chosen, tokens=drafted)
    can_draft = [cache for cache in CACHES if cache == "dynamic" or hasattr(StaticLayer, "crop")]
    cells = [*itertools.product((STOCK, OPEN), CACHES), *itertools.product(chosen_drafts, can_draft)]
    writers, counts = Writers(models, tokens, options.new), {cell: [0, 0, 0] for cell in cells}

    def timed(cell: tuple[str, str]) -> float:
        if cell[0] in handles:
            handles[cell[0]].reset_report()
        ms = writers.write(cell, options)
        if cell[0] in handles:
            found = handles[cell[0]].report().drafts
            more = (found.rounds, found.drafted, found.accepted)
            counts[cell] = [a + b for a, b in zip(counts[cell], more, strict=True)]
        return ms

    result = in_turn(cells, timed, repeats=options.repeats, least=2, clock=options.clock)
    mib = {cell: writers.mib(cell, options) for cell in cells}
    return [row_of(result, writers, cell, counts[cell], mib, Path(name).name) for cell in cells]


def row_of(
    timed: Timed,
    writers: Writers,
    cell: tuple[str, str],
    counts: list[int],
    mib: dict[tuple[str, str], tuple[float, float]],
    name: str,
) -> Row:
    """Say how fast a cell is, what was kept of its drafts, and what it holds."""
    best_open = min(((OPEN, cache) for cache in CACHES), key=timed.ms)
    rounds, drafted, kept = counts
    row: Row = {"model": name, "tokens": writers.tokens.shape[1], "policy": cell[0], "cache": cell[1]}
    row["tokens/s"] = 1e3 * writers.new / timed.ms(cell)
    row |= timed.speedup(faster_stock(timed), cell) | {"of open": timed.speedup(best_open, cell)["speed-up"]}
    row["of cache"] = timed.speedup((STOCK, cell[1]), cell)["speed-up"]
    row["kept"], row["a round"] = (kept / drafted, (kept + rounds) / rounds) if rounds else (None, None)
    written = writers.new * len(timed.samples[cell])
    row |= {"drafted": (kept + rounds) / written, "same": writers.same(cell), "MiB": mib[cell][0]}
    return row | {"memory": sum(mib[cell]) / sum(mib[STOCK, cell[1]]) - 1, "quiet": timed.is_quiet}


def figure(rows: list[Row]) -> Figure:
    """Draw the speed-up of each policy with the faster cache, a panel for each length."""
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    drawn = Figure(figsize=(5 * len(lengths), 3.5), layout="constrained")
    for axes, length in zip(drawn.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        best: dict[str, float] = {}
        for row in rows:
            if row["tokens"] == length:
                best[row["policy"]] = max(best.get(row["policy"], 0.0), row["speed-up"])
        axes.barh(range(len(best)), list(best.values()))
        axes.set_yticks(range(len(best)), list(best))
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel="times as fast as the faster stock cache", title=f"{length:,} tokens")
    return drawn


if __name__ == "__main__":
    main()
