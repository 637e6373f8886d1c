"""One model under several policies, a cache at a time: timed, compiled with CUDA graphs, profiled."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from harness import Row, milliseconds
from model import OPEN, random_tokens
from model import POLICIES as WHOLE
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache
from whole import STOCK

import patchattn
from patchattn import MomentGate, Policy, StaticGate
from patchattn.hf.architecture import with_cache

CLOSED, GROUP, ASKED = "all closed, `min_bulk=0`", "1 KV head of each layer open", "asked, none opens"
POLICIES: dict[str, Policy | None] = {
    STOCK: None,
    "default": WHOLE["default"],
    GROUP: Policy(gate=StaticGate(open_heads=((0, 0),)), min_bulk=0),
    CLOSED: WHOLE[CLOSED],
    OPEN: WHOLE[OPEN],
    # No margin of random keys is as low: what asking costs, beside all closed.
    ASKED: Policy(gate=MomentGate(threshold=1e-4), min_bulk=0),
}
COMPILED = (STOCK, "default", GROUP, CLOSED)
"""Policies under which the decode step is compiled as a whole."""
LAYERS = 32
WARM_UP = 8192
"""Tokens of a first prompt: enough for every path, slabs and gates, to be taken."""
STEPS = 8
_ROOM = 128
TOP = 25


class Decoder:
    """A model under a policy that reads a prompt into a new cache and goes on from it; undone on exit.

    Args:
        options: Those of the stage.
        model: Stock model.
        policy: One of `POLICIES`.
        cache: `"dynamic"` or `"static"`.
        length: Tokens of the prompt.
    """

    def __init__(self, options: argparse.Namespace, model: Any, policy: str, cache: str, length: int) -> None:
        self.options, self.model, self.policy, self.kind, self.length = options, model, policy, cache, length
        self.tokens = random_tokens(length + _ROOM, model.config.vocab_size).to(options.device)
        self.positions = torch.arange(self.tokens.shape[1], device=options.device)[None]
        self.forward: Callable[..., Any] = model.forward
        self.handle: Any = None
        self.cache: Any = None
        self._undo = ExitStack()

    def __enter__(self) -> Decoder:
        """Patch the model."""
        policy = POLICIES[self.policy]
        if policy is not None:
            changed: dict[str, Any] = {"window_size": 64, "min_bulk": 0} if self.options.rehearse else {}
            if self.policy == GROUP:
                config = self.model.config
                group = range(config.num_attention_heads // config.num_key_value_heads)
                heads = tuple((layer, head) for layer in range(len(self.model.model.layers)) for head in group)
                changed["gate"] = StaticGate(open_heads=heads)
            self.handle = self._undo.enter_context(patchattn.patch(self.model, policy.model_copy(update=changed)))
        return self

    def __exit__(self, *error: object) -> None:
        """Unpatch it, and drop the cache."""
        self.cache = None
        self._undo.close()

    def prefill(self, length: int | None = None) -> None:
        """Read the prompt into a new cache."""
        config, self.at = self.model.config, length or self.length
        self.cache = None  # two of them may be more than there is room for
        self.cache = StaticCache(config, self.tokens.shape[1]) if self.kind == "static" else DynamicCache(config=config)
        self.model(self.tokens[:, : self.at], **with_cache(self.model, self.cache), use_cache=True, logits_to_keep=1)

    def step(self) -> None:
        """Read one token more."""
        given = with_cache(self.model, self.cache)
        given["position_ids"] = self.positions[:, self.at : self.at + 1]
        torch.compiler.cudagraph_mark_step_begin()
        self.forward(self.tokens[:, self.at : self.at + 1], **given, use_cache=True)
        self.at += 1

    def step_ms(self) -> float:
        """Time a step in milliseconds, after two to warm up."""
        self.step(), self.step()
        return milliseconds(self.step, self.options.device, STEPS)

    def timed(self) -> Row:
        """Time the first token and the steps after it, and say how much memory is held at most and what was open."""
        device = self.options.device
        self.prefill(min(self.length, WARM_UP))
        self.step()
        if self.handle is not None:
            self.handle.reset_report()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row: Row = {"first token s": milliseconds(self.prefill, device) / 1e3}
        row["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
        row["step ms"] = self.step_ms()
        if self.handle is not None:
            report = self.handle.report()
            row |= {"open": report.open_fraction("decode"), "density": report.realised_density("decode")}
            row |= {"prefill open": report.open_fraction("prefill")}
            row |= {"prefill density": report.realised_density("prefill")}
        return row

    def compiled(self) -> Row:
        """Compile the step with CUDA graphs and time it; skips are calls that could not be captured."""
        self.prefill()
        how: dict[str, Any] = {"backend": "eager"} if self.options.rehearse else {"mode": "reduce-overhead"}
        before = _counted()
        # A policy is a graph more of the same function.
        with torch._dynamo.config.patch(recompile_limit=64):
            self.forward = torch.compile(self.model.forward, fullgraph=True, **how)
            seconds = milliseconds(self.step, self.options.device) / 1e3
            row = {"compile s": seconds, "step ms": self.step_ms()}
        return row | {name: count - before[name] for name, count in _counted().items()}


def _counted() -> dict[str, int]:
    skipped = counters["inductor"]["cudagraph_skips"]
    return {"graphs": counters["stats"]["unique_graphs"], "CUDA graph skips": skipped}


def profiled(options: argparse.Namespace, call: Callable[[], None]) -> tuple[Row, str]:
    """Profile one call; returns counts and the longest kernels (on a CPU operators), and the profiler's own table."""
    on_cuda = options.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    call()
    with profile(activities=activities, acc_events=True) as profiler:  # torch 2.11 warns about its default
        call()
        if on_cuda:
            torch.cuda.synchronize(options.device)
    events, name = profiler.key_averages(), "self_device_time_total" if on_cuda else "self_cpu_time_total"
    spent = [(event, getattr(event, name) / 1e3) for event in events]
    # An operator has the time of the kernels it launched, too: only what ran on the device counts.
    spent = [(event, ms) for event, ms in spent if not on_cuda or str(event.device_type).endswith("CUDA")]
    top = sorted(spent, key=lambda pair: -pair[1])[:TOP]
    row: Row = {
        "launches": sum(event.count for event in events if re.match(r"cu(da)?(Graph)?Launch", event.key)),
        "operators": sum(event.count for event in events if event.key.startswith("aten::")),
        "ms": sum(ms for _, ms in spent),
        "top": [[event.key[:90], ms, event.count] for event, ms in top],
    }
    return row, events.table(sort_by=name, row_limit=TOP, max_name_column_width=70)
