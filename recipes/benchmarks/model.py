"""Whole models: time to the first token, tokens per second and memory, stock with either cache and patched.

python recipes/benchmarks/model.py
python recipes/benchmarks/model.py --models FOLDER --dtypes bf16 fp32
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import (
    CLOCKS,
    RESULTS,
    Row,
    Timed,
    arguments,
    command_line,
    in_turn,
    kept_by,
    milliseconds,
    prepare,
    progress,
    save,
)
from peak import resident_peak
from problems import DTYPES, prose, shipped_model
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from whole import CACHES, NOTES, OPEN, PHASES, STOCK, amdahl, compared, faster_stock, whole_model_figure

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, Policy, demo
from patchattn.evaluation.rows import Store
from patchattn.hf.architecture import with_cache
from patchattn.hf.loading import load_pretrained, random_model

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336} | _HEADS,
    "qwen3-8b": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288} | _HEADS,
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": None}
    | _HEADS,
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
NARROW = "window 1,024"
POLICIES = {
    OPEN: Policy(gate=OpenGate(), min_bulk=0),
    "default": Policy(),
    "default, `min_bulk=0`": Policy(min_bulk=0),
    NARROW: Policy(window_size=1024),
    "threshold 0.6, `min_bulk=0`": Policy(gate=MomentGate(threshold=0.6), min_bulk=0),
    "all closed, `min_bulk=0`": Policy(gate=ClosedGate(), min_bulk=0),
}
WARM_UP = 64
MIB = 2**20
Cell = tuple[str, str]  # policy and cache


@dataclass
class Measured:
    """Rows of one model, dtype and length, as they are kept until all are there."""

    command: str
    model: str
    dtype: str
    length: int
    rows: list[Row]


class Watched(NamedTuple):
    """What the first call of a cell shows beside its time."""

    attention: float
    mib: float


def main() -> None:
    """Measure what a run that was broken off has not, and write the table."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--models", nargs="+", default=["shipped"], help=f"shipped, a folder, or {', '.join(SHAPES)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--layers", type=int, default=2, help="layers of the models with random weights")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=16, help="decode steps in one timed call")
    parser.add_argument("--budget", type=float, default=30, help="seconds for a phase, which two repeats may exceed")
    parser.add_argument("--window", type=int, help="window of all policies, in place of the default one")
    parser.add_argument("--llama", type=Path, metavar="GGUF", help="the same model for llama.cpp, to be timed beside")
    parser.add_argument("--llama-python", default=sys.executable, help="Python that has llama-cpp-python")
    options = prepare(parser.parse_args(), cpu={"dtypes": ["fp32"]}, cuda={"dtypes": ["bf16"]})
    for model in options.models:
        if model not in ("shipped", *SHAPES) and not Path(model, "config.json").exists():
            parser.error(f"{model} has no config.json: give a folder of a model, shipped, or {', '.join(SHAPES)}")
    if options.llama and not options.llama.exists():
        parser.error(f"there is no file {options.llama}")
    is_real = not {*options.models} <= {"shipped", *SHAPES}
    name = "real_model" if is_real else "whole_model"
    store = Store((options.out or RESULTS) / f"{options.name or name}.jsonl", Measured)
    with torch.no_grad():
        todo = cases(options, store)
        if not todo and not kept_by(store):
            parser.error(f"none of the lengths {options.lengths} is within the context of a model: give shorter ones")
        for case in progress(todo, lambda case: f"{Path(case[0]).name}, {case[1]}, {case[2]:,} tokens"):
            store.add(Measured(command_line(), *case, rows=timed_rows(options, *case)))
    rows = [row for kept in kept_by(store) for row in kept.rows]
    title = "A real model" if is_real else "Whole models"
    save(options, name, title, rows, NOTES.format(**vars(options)), whole_model_figure(rows))
    store.path.unlink()


def cases(options: argparse.Namespace, store: Store[Measured]) -> list[tuple[str, str, int]]:
    """List models, dtypes and lengths that are to be measured, without those beyond a model's context."""
    done = {(kept.model, kept.dtype, kept.length) for kept in kept_by(store)}
    every = itertools.product(options.models, options.dtypes, sorted(options.lengths))
    return [case for case in every if case not in done and case[2] <= context(options, case[0])]


def decoded(options: argparse.Namespace) -> int:
    """Return the most tokens that follow a prompt: one to warm up, and every repeat goes on where it was left."""
    return 1 + 2 * options.repeats * options.steps


def context(options: argparse.Namespace, name: str) -> float:
    """Return how many tokens a model reads; those with random weights read any number."""
    if name in SHAPES:
        return math.inf
    folder = demo.model_folder() if name == "shipped" else name
    return getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", math.inf)


@functools.lru_cache(maxsize=1)
def load(name: str, longest: int, layers: int, dtype: str, device: torch.device) -> tuple[Any, torch.Tensor]:
    """Load the shipped model or one from a folder, or make one of a real shape; returns it and tokens [1, longest]."""
    if name == "shipped":
        model, tokens = shipped_model(longest)
    elif name in SHAPES:
        sizes = {"num_hidden_layers": layers, "vocab_size": 4096, "max_position_embeddings": longest}
        model = random_weights(name, DTYPES[dtype], device, **sizes)
        tokens = random_tokens(longest, sizes["vocab_size"])
    else:
        model, tokenizer = load_pretrained(name, dtype=DTYPES[dtype], local_files_only=True)
        tokens = prose(tokenizer, longest)
    return model.to(device, DTYPES[dtype]), tokens.to(device)


def random_weights(name: str, dtype: torch.dtype, device: torch.device, **fields: Any) -> Any:
    """Make a model of a real shape with random weights, on the device, in evaluation mode."""
    shape = {**SHAPES[name], **fields}
    with device:
        return random_model(shape.pop("model_type"), shape, has_images=False, seed=0, dtype=dtype).to(device)


def random_tokens(length: int, vocabulary: int) -> torch.Tensor:
    """Draw tokens [1, length]."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


class Readers:
    """Stock and patched twins of one model that read the same text, each with both caches.

    Args:
        models: Stock and patched models by policy.
        tokens: [1, prompt and all that may follow].
        prompt: How many of the tokens are read at once.
    """

    def __init__(self, models: dict[str, Any], tokens: torch.Tensor, prompt: int) -> None:
        self.models, self.tokens, self.prompt = models, tokens, prompt
        self.cells = list(itertools.product(models, CACHES))
        self.caches: dict[Cell, Any] = {}
        self.at = dict.fromkeys(self.cells, prompt)

    def prefill(self, cell: Cell) -> None:
        """Read the prompt into a new cache; the first one is kept."""
        model, cache = self.models[cell[0]], self.new_cache(cell)
        model(self.tokens[:, : self.prompt], **with_cache(model, cache), use_cache=True, logits_to_keep=1)
        self.caches.setdefault(cell, cache)

    def decode(self, cell: Cell, steps: int) -> None:
        """Read on, token by token."""
        model = self.models[cell[0]]
        for place in range(self.at[cell], self.at[cell] + steps):
            model(self.tokens[:, place : place + 1], **with_cache(model, self.caches[cell]), use_cache=True)
        self.at[cell] += steps

    def fill_other_caches(self) -> None:
        """Copy what is in dynamic caches to static ones that no prompt was read into, and take a step with each cache.

        Moments that should be beside a copy are taken from its keys in that step.
        """
        for cell in set(self.cells) - set(self.caches):
            dynamic = self.caches[cell[0], "dynamic"]
            if any(layer.is_sliding for layer in dynamic.layers):
                self.prefill(cell)
                continue
            self.caches[cell] = self.new_cache(cell)
            for new, filled in zip(self.caches[cell].layers, dynamic.layers, strict=True):
                new.update(filled.keys, filled.values)
        for cell in self.cells:
            self.decode(cell, 1)

    def new_cache(self, cell: Cell) -> Any:
        """Make a cache; a static one has room for all tokens."""
        config = self.models[cell[0]].config
        return StaticCache(config, self.tokens.shape[1]) if cell[1] == "static" else DynamicCache(config=config)

    def mib(self, cell: Cell) -> float:
        """Return the size of a cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.caches[cell].layers) / MIB


def timed_rows(options: argparse.Namespace, name: str, dtype: str, length: int) -> list[Row]:
    """Time stock and all policies in turn: a prefill, and decode steps after it."""
    longest = int(min(context(options, name), max(options.lengths) + decoded(options)))
    model, tokens = load(name, longest, options.layers, dtype, options.device)
    prompt = min(length, longest - decoded(options))
    tokens = tokens[:, : prompt + decoded(options)]
    policies = POLICIES
    if options.window:
        window = {"window_size": options.window}
        policies = {label: policy.model_copy(update=window) for label, policy in POLICIES.items() if label != NARROW}
    models = {STOCK: model} | {label: twin(model) for label in policies}
    handles = {label: patchattn.patch(models[label], policy) for label, policy in policies.items()}
    for each in models.values():
        each(tokens[:, :WARM_UP])
    beside = llama_cpp(options, tuple(tokens[0, : prompt + options.steps].tolist()), prompt)
    readers = Readers(models, tokens, prompt)
    rows: list[Row] = []
    for phase in PHASES:
        passes, cells, call = options.steps, readers.cells, lambda cell: readers.decode(cell, options.steps)
        if phase == "prefill":
            # Patched models read a prompt alike into either cache, as the default shows: the others are spared it.
            cells = [cell for cell in cells if cell[1] == "dynamic" or cell[0] in (STOCK, "default")]
            passes, call = 1, readers.prefill
        else:
            readers.fill_other_caches()
        for handle in handles.values():
            handle.reset_report()
        timed, watched = watching(options, cells, call)
        best, shared = faster_stock(timed), {"model": Path(name).name, "dtype": dtype, "length": length}
        shared |= {"tokens": prompt, "phase": phase}
        for cell in cells:
            row = shared | {"policy": cell[0], "cache": cell[1]} | speed(phase, timed.ms(cell) / passes)
            row |= compared(timed, cell) | dict.fromkeys(("attention", "open", "density", "limit"))
            if cell[0] == STOCK:
                row["attention"] = watched[cell].attention
            else:
                report = handles[cell[0]].report()
                row |= {"open": report.open_fraction(phase), "density": report.realised_density(phase)}
                row["limit"] = amdahl(watched[best].attention, row["density"])
            # A decode step begins with a cache that is there already.
            row["MiB"] = watched[cell].mib + (readers.mib(cell) if phase == "decode" else 0)
            rows.append(row | {"quiet": timed.is_quiet})
        if beside:
            ms = statistics.median(beside[phase])
            row = shared | {"policy": f"llama.cpp, {options.llama.stem}", "cache": "float16"} | speed(phase, ms)
            rows.append(row | {"speed-up": timed.ms(best) / passes / ms, "MiB": beside["MiB"]})
    return rows


def speed(phase: str, ms: float) -> Row:
    """Say how long the first token takes, or how many follow in a second."""
    is_first = phase == "prefill"
    return {"first token s": ms / 1e3 if is_first else None, "tokens/s": None if is_first else 1e3 / ms}


def watching(
    options: argparse.Namespace, cells: list[Cell], call: Callable[[Cell], None]
) -> tuple[Timed, dict[Cell, Watched]]:
    """Time cells in turn, and watch the first call of each: a clock around its attention, and the memory it takes."""
    device, now = options.device, CLOCKS[options.clock]
    watched: dict[Cell, Watched] = {}

    def timed(cell: Cell) -> float:
        if cell in watched:
            return milliseconds(lambda: call(cell), device, 1, now)
        found: list[float] = []
        with attention_watched(device, now) as spent:
            mib = peak_of(lambda: found.append(milliseconds(lambda: call(cell), device, 1, now)), device)
        watched[cell] = Watched(sum(spent) / found[0], mib)
        return found[0]

    return in_turn(cells, timed, repeats=options.repeats, least=2, budget=options.budget, clock=options.clock), watched


@contextmanager
def attention_watched(device: torch.device, now: Callable[[], float]) -> Iterator[list[float]]:
    """Put a clock around stock attention, layer by layer; yields the milliseconds of each call so far."""
    original, spent = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attention(*given: Any, **named: Any) -> Any:
        found: list[Any] = []
        spent.append(milliseconds(lambda: found.append(original(*given, **named)), device, 1, now))
        return found[0]

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield spent
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def peak_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the most memory that a call takes beside what was there before it, in MiB."""
    if device.type != "cuda":
        return resident_peak(call)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def llama_cpp(options: argparse.Namespace, tokens: tuple[int, ...], prompt: int) -> dict[str, Any]:
    """Let llama.cpp read the same tokens with as many threads, in a process of its own, if it is asked for."""
    if not options.llama:
        return {}
    asked = {"file": str(options.llama), "threads": torch.get_num_threads(), "repeats": 2}
    return _llama_cpp(options.llama_python, json.dumps(asked | {"prompt": prompt, "tokens": tokens}))


@functools.cache
def _llama_cpp(python: str, asked: str) -> dict[str, Any]:
    """Ask once, for the dtypes of all others are the same to it."""
    command = [python, Path(__file__).with_name("llama.py")]
    made = subprocess.run(command, check=True, input=asked, stdout=subprocess.PIPE, text=True)
    return json.loads(made.stdout.splitlines()[-1])


def twin(model: Any) -> Any:
    """Copy a model without copying its weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


if __name__ == "__main__":
    main()
