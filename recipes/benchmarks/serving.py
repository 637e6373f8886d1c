"""Continuous batching: the engine of transformers on a stock and on a patched model, the same requests for both.

python recipes/benchmarks/serving.py --model FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from harness import Row, Timed, arguments, in_turn, prepare, progress, save
from matplotlib.figure import Figure
from model import twin
from peak import resident_peak
from problems import DTYPES, prose, shipped_model
from transformers import ContinuousBatchingConfig, GenerationConfig

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, Policy
from patchattn.hf.loading import load_pretrained

STOCK, IN_TURN, OPEN = "stock", "in turn", "every gate open"
POLICIES = {
    OPEN: Policy(gate=OpenGate(), min_bulk=0),
    "default": Policy(),
    "default, `min_bulk=0`": Policy(min_bulk=0),
    "threshold 0.6, `min_bulk=0`": Policy(gate=MomentGate(threshold=0.6), min_bulk=0),
    "all closed, `min_bulk=0`": Policy(gate=ClosedGate(), min_bulk=0),
}
COLUMNS = {name.replace("`", ""): name for name in (STOCK, IN_TURN, *POLICIES)}
"""All that can be timed, by what it is called on the command line."""
PAGE_SIZE = 256
WHAT = ("whole", "first token", "tokens/s")
NOTES = """\
All requests are there at once, each with a prompt of its own, and end after as many new tokens. `whole` is the time \
from the first request to the last token, `first token` the mean over the requests, `tokens/s` counts tokens of all \
requests after each has its first. Speed-ups are against the stock engine with the fastest of its batch sizes \
({tokens} tokens) in the whole, which the others use too, and against the patched model with every gate open, in which \
the gate has no part: medians of ratios within a repeat, all in turn. `MiB` is the largest resident set of the first \
repeat above that of the loaded model; the pages take {pages} MiB of it. Stock runs `sdpa` with a mask of all requests \
against all keys, and copies the keys of all requests in every layer and step. `in turn` is stock `generate`, one \
request after the other, with the cache that is faster for the first of them: `first token` counts the wait for those \
before, and `tokens/s` are those of the last request. Open fraction and density are of prompts / of new tokens.\
"""


def main() -> None:
    """Time every load, and write the table."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--model", default="shipped", help="shipped, or a folder")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--loads", nargs="+", default=["8x500", "8x6000"], help="requests x tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[512, 2048], help="sizes tried for stock")
    parser.add_argument("--window", type=int, help="window of all policies, in place of the default one")
    parser.add_argument("--policies", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="what is timed")
    options = prepare(parser.parse_args())
    if STOCK not in options.policies and len(options.batch_tokens) > 1:
        parser.error("--batch-tokens takes one size where stock is not timed, which chooses among them")
    rows: list[Row] = []
    with torch.no_grad():
        for load in progress(options.loads, lambda load: load.replace("x", " requests of ") + " tokens"):
            rows += timed_rows(options, *map(int, load.split("x")))
    pages = max(row.pop("pages") for row in rows)
    notes = NOTES.format(tokens=" or ".join(f"{size:,}" for size in options.batch_tokens), pages=f"{pages:,.0f}")
    save(options, "serving", "Continuous batching", rows, notes, figure(rows) if STOCK in options.policies else None)


class Served:
    """One model that is given the same requests again and again.

    Args:
        model: Stock or patched.
        prompts: Tokens of each request.
        new: New tokens of each.
        batch_tokens: Most tokens of a step.
    """

    def __init__(self, model: Any, prompts: list[list[int]], new: int, batch_tokens: int) -> None:
        self.model, self.prompts, self.new = model, prompts, new
        blocks = sum(-(-(len(prompt) + new) // PAGE_SIZE) + 1 for prompt in prompts)
        self.config = ContinuousBatchingConfig(
            num_blocks=blocks, max_batch_tokens=batch_tokens, page_size=PAGE_SIZE, allow_block_sharing=False
        )
        self.generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.seconds: list[dict[str, float]] = []
        self.mib = float("nan")

    def serve(self) -> float:
        """Serve all requests; returns milliseconds."""
        if self.seconds:
            self._serve()
        else:
            self.mib = resident_peak(self._serve)
        return 1e3 * self.seconds[-1]["whole"]

    def _serve(self) -> None:
        self.seconds.append(seconds_of(*self._stamps()))

    def _stamps(self) -> tuple[float, list[list[float]]]:
        """Serve all requests; returns when it began, and when each token of each was there."""
        outputs = self.model.generate_batch(
            self.prompts,
            generation_config=self.generation,
            continuous_batching_config=self.config,
            record_timestamps=True,
        ).values()
        errors = [output.error for output in outputs if output.error]
        if errors or len(outputs) < len(self.prompts):
            raise RuntimeError(f"The engine failed: {errors}")
        return min(output.created_time for output in outputs), [output.timestamps for output in outputs]


class InTurn(Served):
    """The same requests by `generate`, one after the other.

    Args:
        model: Stock.
        prompts: Tokens of each request.
        new: New tokens of each.
        cache: "dynamic" or "static".
    """

    def __init__(self, model: Any, prompts: list[list[int]], new: int, cache: str) -> None:
        super().__init__(model, prompts, new, 0)
        self.cache = cache

    def _stamps(self) -> tuple[float, list[list[float]]]:
        begin, stamps = time.perf_counter(), []
        # What is read of the new tokens is on the host by then.
        noted = SimpleNamespace(put=lambda _: stamps[-1].append(time.perf_counter()), end=lambda: None)
        sizes = {"min_new_tokens": self.new, "max_new_tokens": self.new, "cache_implementation": self.cache}
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=self.model.device)
            stamps.append([])
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, streamer=noted, **sizes
            )
        # The first thing that is told is the prompt.
        return begin, [each[1:] for each in stamps]


def seconds_of(begin: float, stamps: list[list[float]]) -> dict[str, float]:
    """Say how long all took, a first token in the mean, and each token after every request had its first."""
    all_began, end = max(each[0] for each in stamps), max(each[-1] for each in stamps)
    after = sum(stamp > all_began for each in stamps for stamp in each)
    return {
        "whole": end - begin,
        "first token": statistics.mean(each[0] - begin for each in stamps),
        "tokens/s": (end - all_began) / max(after, 1),
    }


def timed_rows(options: argparse.Namespace, requests: int, length: int) -> list[Row]:
    """Time stock, with the batch size that is fastest for it, and all policies in turn."""
    model, prompts = load(options, requests, length)
    stock = [Served(model, prompts, options.new, size) for size in options.batch_tokens]
    best = min(stock, key=Served.serve) if len(stock) > 1 else stock[0]
    size = best.config.max_batch_tokens
    served: dict[str, Served] = {}
    handles, in_turns = {}, ""
    for label in (COLUMNS[name] for name in COLUMNS if name in options.policies):
        if label == STOCK:
            # Anew, so that it has the memory of its first repeat.
            served[label] = Served(model, prompts, options.new, size)
        elif label == IN_TURN:
            tried = [InTurn(model, prompts[:1], options.new, cache) for cache in ("dynamic", "static")]
            cache = min(tried, key=Served.serve).cache
            in_turns = f"stock `generate` in turn, {cache} cache"
            served[in_turns] = InTurn(model, prompts, options.new, cache)
        else:
            policy, patched = POLICIES[label], twin(model)
            chosen = policy.model_copy(update={"window_size": options.window}) if options.window else policy
            handles[label] = patchattn.patch(patched, chosen, backend="blockwise")
            served[label] = Served(patched, prompts, options.new, size)
    timed = in_turn(served, lambda name: served[name].serve(), repeats=options.repeats, least=1)
    by_what = {
        what: Timed({name: [1e3 * each[what] for each in one.seconds] for name, one in served.items()}, timed.is_quiet)
        for what in WHAT
    }
    rows = []
    for name, one in served.items():
        row: Row = {"requests": requests, "tokens": length, "policy": name}
        row["batch tokens"] = None if name == in_turns else size
        for what, of_what in by_what.items():
            seconds = of_what.ms(name) / 1e3
            row[what if what == "tokens/s" else f"{what} s"] = 1 / seconds if what == "tokens/s" else seconds
            row[f"{what}: of stock"] = times(of_what, STOCK, name)
            row[f"{what}: of open"] = times(of_what, OPEN, name)
        row["whole: of in turn"] = times(by_what["whole"], in_turns, name)
        report = handles[name].report() if name in handles else None
        row["open"], row["density"] = both(report, "open_fraction"), both(report, "realised_density")
        config = model.config
        kv = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        pages = 2 * kv * config.num_hidden_layers * DTYPES[options.dtype].itemsize * PAGE_SIZE * one.config.num_blocks
        rows.append(row | {"MiB": one.mib, "quiet": timed.is_quiet, "pages": pages / 2**20})
    return rows


def times(timed: Timed, base: str, name: str) -> float | None:
    """Say how many times as fast as another one is; None where that was not timed."""
    return timed.speedup(base, name)["speed-up"] if base in timed.samples else None


def load(options: argparse.Namespace, requests: int, length: int) -> tuple[Any, list[list[int]]]:
    """Load the model, and prompts that have nothing in common."""
    if options.model == "shipped":
        model, tokens = shipped_model(length)
        shifted = [torch.roll(tokens[0], 1 + number) for number in range(requests)]
        return model.to(options.device, DTYPES[options.dtype]), [tokens.tolist() for tokens in shifted]
    model, tokenizer = load_pretrained(options.model, dtype=DTYPES[options.dtype], local_files_only=True)
    tokens = prose(tokenizer, requests * length)[0]
    return model.to(options.device), [part.tolist() for part in tokens.split(length)]


def both(report: Any, what: str) -> str:
    """Say what prompts and new tokens show."""
    if report is None:
        return ""
    found = (getattr(report, what)(phase) for phase in ("prefill", "decode"))
    return " / ".join("-" if share != share else f"{share:.0%}" for share in found)


def figure(rows: list[Row]) -> Figure:
    """Draw the speed-ups against stock, a panel for each load."""
    loads = list(dict.fromkeys((row["requests"], row["tokens"]) for row in rows))
    drawn = Figure(figsize=(5 * len(loads), 4), layout="constrained")
    for axes, load in zip(drawn.subplots(1, len(loads), squeeze=False)[0], loads, strict=True):
        chosen = [row for row in rows if (row["requests"], row["tokens"]) == load]
        labels = [row["policy"].replace("`", "") for row in chosen]
        for shift, what in enumerate(WHAT):
            places = [place + 0.27 * (shift - 1) for place in range(len(chosen))]
            axes.barh(places, [row[f"{what}: of stock"] for row in chosen], 0.25, label=what)
        axes.set_yticks(range(len(chosen)), labels)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel="times as fast as the stock engine", title=f"{load[0]} requests of {load[1]:,} tokens")
    drawn.axes[0].legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    main()
