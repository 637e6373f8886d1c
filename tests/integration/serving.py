"""What the tests of continuous batching share. Importing it skips a file where transformers is too old to serve."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators", reason="needs transformers 5.24")

from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import offloading_manager

from patchattn import MomentGate, Policy
from patchattn.backends import flex
from patchattn.backends.backend import TableBackend
from patchattn.backends.flex.table import attend_table_with

MIXED = MomentGate(threshold=0.1)
LENGTHS = (320, 230, 40, 177)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 120, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]


def policy(gate: Any = MIXED, **fields: Any) -> Policy:
    return Policy(**({"sink_size": 4, "window_size": 32, "min_bulk": 0, "gate": gate} | fields))


def greedy(new: int | None = 8, copies: int = 1) -> GenerationConfig:
    # Copies are drawn, from one token.
    several = {"num_return_sequences": copies, "do_sample": True, "top_k": 1} if copies > 1 else {"do_sample": False}
    return GenerationConfig(max_new_tokens=new, eos_token_id=-1, pad_token_id=0, **several)


def config(**fields: Any) -> ContinuousBatchingConfig:
    """A small cache; requests share nothing, and prompts longer than 128 tokens come in pieces."""
    small = {"num_blocks": 64, "max_batch_tokens": 128, "page_size": 16, "allow_block_sharing": False}
    return ContinuousBatchingConfig(**(small | fields))


def serve(
    model: Any,
    prompts: list[list[int]],
    new: int | None = 8,
    *,
    copies: int = 1,
    persistent_manager: bool = False,
    **fields: Any,
) -> list[Any]:
    """The outputs of `generate_batch`."""
    found = model.generate_batch(
        prompts,
        generation_config=greedy(new, copies),
        continuous_batching_config=config(**fields),
        persistent_manager=persistent_manager,
    )
    return list(found.values())


def tokens(outputs: list[Any]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


@torch.no_grad()
def alone(model: Any, prompt: list[int], new: int = 8) -> list[int]:
    """What `generate` writes."""
    ids = torch.tensor([prompt], device=model.device)
    sizes = {"max_new_tokens": new, "min_new_tokens": new}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **sizes)[
        0, len(prompt) :
    ].tolist()


def counts(handle: Any) -> dict[Any, Any]:
    """Pairs asked and open, of each layer, phase and head."""
    layers = handle.report().layers
    return {
        (layer, phase): (found.asked, found.open_pairs)
        for layer, phases in layers.items()
        for phase, found in phases.items()
    }


@contextlib.contextmanager
def running(
    model: Any, new: int | None = 8, *, copies: int = 1, hard_stop: bool = True, **fields: Any
) -> Iterator[Any]:
    """A manager that runs; at the end requests that go on are failed, or with `hard_stop=False` waited for."""
    manager = model.init_continuous_batching(greedy(new, copies), config(**fields))
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, hard_stop=hard_stop)


def by_tables(handle: Any, compiler: Any = "eager", *, whole: bool = False) -> list[int]:
    """Let a patched model attend in rows over pages as on a CUDA device; with `whole` in all else, too.

    Returns how many rows each call has, which grows.
    """
    calls: list[int] = []

    def attend(inputs: Any, *given: Any) -> Any:
        calls.append(len(inputs.table.rows))
        return attend_table_with(inputs, *given, compiler=compiler)

    for state in handle.states.values():
        state.by_table = TableBackend(attend, lambda *_: None)
        if whole:
            state.attend = partial(flex.attend_with, compiler=compiler)
            state.weighed = partial(flex.weigh_and_attend_with, compiler=compiler)
    return calls


def finished(manager: Any, ids: set[str]) -> dict[str, Any]:
    """Wait for the last outputs of some requests."""
    found, until = {}, time.monotonic() + 60
    while not ids <= found.keys():
        assert time.monotonic() < until, f"{ids - found.keys()} did not finish"
        output = manager.get_result(timeout=0.2)
        if output is not None and output.is_finished():
            found[output.request_id] = output
    return found


class _NothingPinned:
    """torch for the engine's offloading, which wants memory that only a GPU can pin."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.empty(*sizes, **options)


def with_calibration(model: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What a model is patched with that was measured with prices, or with moments of other text."""
    from test_priced import aimed_at, measured

    calibration = measured(model, **fields)
    gate = aimed_at(calibration).gate if fields["prices"] else MomentGate(threshold=0.1, moments="calibration")
    return {"policy": policy(gate), "calibration": calibration}


def offloading_to_cpu() -> Any:
    """Let the engine offload requests on a machine without a GPU."""
    return mock.patch.object(offloading_manager, "torch", _NothingPinned())
