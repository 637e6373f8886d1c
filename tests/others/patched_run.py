"""Runs one test of transformers, on models as they are or with every model patched, and says what happened."""

from __future__ import annotations

import functools
import unittest
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from common_tests import load
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import PreTrainedModel, set_seed

import patchattn
from patchattn import OpenGate, Policy
from patchattn.hf import patching

# Small enough that the gates are asked on the short sequences of these tests.
POLICY = Policy(sink_size=2, window_size=4, min_bulk=0, gate=OpenGate())

# Hundreds of models are patched that are all of the same shape: the check of the backend is most of that.
_check_once = mock.patch.object(patching, "self_check", functools.cache(patching.self_check))


@dataclass
class Run:
    """What one test did.

    Args:
        errors: What it raised; empty if it passed or was skipped.
        skipped: Why it was skipped, or None.
        outputs: The first output of every forward pass of a model, in order, at real tokens.
        left_alone: Why models were not patched, by class.
        gated_calls: How many attention calls went through gates.
        open_fractions: How many of the gates were open, of each model that asked any.
    """

    errors: list[BaseException] = field(default_factory=list)
    skipped: str | None = None
    outputs: list[torch.Tensor | None] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    gated_calls: int = 0
    open_fractions: set[float] = field(default_factory=set)


class _Result(unittest.TestResult):
    """Keeps exceptions, where unittest keeps their text."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def addError(self, test: Any, err: Any) -> None:
        self.run.errors.append(err[1])

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.run.errors.append(err[1])

    def addSkip(self, test: Any, reason: str) -> None:
        self.run.skipped = reason


def run(case: unittest.TestCase, *, patched: bool, only: str | None = None) -> Run:
    """Run one test from the same seed.

    Args:
        case: The test.
        patched: Whether models are patched at their first forward pass.
        only: The attention implementation of the models that are; None means all. Others stay as they are.
    """
    done = Run()
    set_seed(0)
    load().global_rng.seed(0)
    with warnings.catch_warnings(record=True):
        # Their warnings are their own; some tests look for one.
        warnings.simplefilter("always")
        with _check_once, _watch(done, patched=patched, only=only):
            case.run(_Result(done))
    return done


@contextmanager
def _watch(done: Run, *, patched: bool, only: str | None) -> Iterator[None]:
    """Keep the outputs of every outermost forward pass, and patch models before their first one."""
    inside: list[Any] = []
    handles: list[patchattn.PatchHandle] = []

    def enter(module: Any, args: Any) -> None:
        if not isinstance(module, PreTrainedModel):
            return
        inside.append(module)
        wanted = patched and only in (None, module.config._attn_implementation)
        if len(inside) == 1 and wanted and not patchattn.is_patched(module):
            support = patchattn.check_support(module)
            if support:
                handles.append(patchattn.patch(module, POLICY))
            else:
                done.left_alone[type(module).__name__] = str(support)

    def leave(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(module, PreTrainedModel):
            return
        inside.pop()
        # None after an exception.
        if not inside and output is not None:
            done.outputs.append(_kept(output, kwargs.get("attention_mask")))

    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for handle in handles:
            report = handle.report()
            counts = [counts for by_phase in report.layers.values() for counts in by_phase.values()]
            gated_calls = sum(one.gated_calls for one in counts)
            if gated_calls:
                done.gated_calls += gated_calls
                done.open_fractions.add(report.open_fraction())
            handle.unpatch()


def _kept(output: Any, mask: Any) -> torch.Tensor | None:
    """Return the first output, or None where it is no tensor; of padding tokens nothing is promised."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(first, torch.Tensor):
        return None
    first = first.detach().clone()
    is_real = isinstance(mask, torch.Tensor) and mask.shape == first.shape[:2]
    return first[mask.bool()] if is_real else first
