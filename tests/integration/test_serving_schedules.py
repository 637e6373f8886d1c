"""Any schedule of requests, with a cache too small for all, gives the tokens of a dense model; nothing leaks."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import mmap
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from serving import MIXED, PROMPTS, alone, finished, offloading_to_cpu, policy, prompt, running, serve, tokens
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import patchattn
from patchattn import OpenGate
from patchattn.hf.pages import RequestMemory
from patchattn.testing import tiny_model

NEW = 12
# A schedule that hangs would hang at each attempt to make it smaller.
NOT_SHRUNK = (Phase.explicit, Phase.generate)


@functools.cache
def patched(gate: Any) -> Any:
    """A model in float64, where no other order of sums changes a token."""
    model = tiny_model("llama", dtype=torch.float64)
    patchattn.patch(model, policy(gate, window_size=8, sink_size=2), backend="blockwise")
    return model


@functools.cache
def stock() -> Any:
    return tiny_model("llama", dtype=torch.float64)


@functools.cache
def expected(gate: Any, tokens: tuple[int, ...]) -> list[int]:
    return alone(stock() if isinstance(gate, OpenGate) else patched(gate), list(tokens), NEW)


@st.composite
def schedules(draw: st.DrawFn, most: int = 8) -> tuple[list[list[int]], list[int], set[int], int, dict[str, Any]]:
    """Prompts, how many tokens each asks for, which are cancelled, copies of each, and a configuration."""
    bases = [prompt(150, seed) for seed in range(2)]
    prompts, new = [], []
    for number in range(draw(st.integers(1, most))):
        shared = draw(st.sampled_from([0, 16, 33, 96, 140]))
        own = draw(st.integers(1, 60))
        prompts.append(draw(st.sampled_from(bases))[:shared] + prompt(own, seed=10 + number))
        new.append(draw(st.integers(1, NEW)))
    cancelled = draw(st.sets(st.integers(0, len(prompts) - 1), max_size=len(prompts) // 2))
    copies = draw(st.sampled_from([1, 1, 2, 3]))
    fields = {
        "num_blocks": draw(st.sampled_from([28, 34, 64])),
        "page_size": 8,
        "max_batch_tokens": draw(st.sampled_from([17, 40, 200])),
        "allow_block_sharing": draw(st.booleans()),
        "scheduler_type": draw(st.sampled_from(["fifo", "prefill_first"])),
        "cpu_offload_space": draw(st.sampled_from([0.0, 0.0, 0.1])),
    }
    return prompts, new, cancelled, copies, fields


def run(gate: Any, schedule: tuple[list[list[int]], list[int], set[int], int, dict[str, Any]]) -> bool:
    """Run a schedule, compare every request that finishes, and see that nothing is left; say if any was evicted."""
    prompts, new, cancelled, copies, fields = schedule
    names = [f"request {number}" for number in range(len(prompts))]
    # Before the engine runs: its thread seeds torch anew.
    wanted = {
        name: expected(gate, tuple(prompts[number]))[: new[number]]
        for number in set(range(len(prompts))) - cancelled
        for name in [names[number], *(f"{names[number]}__child#{copy}" for copy in range(copies - 1))]
    }
    offload, evicted = OffloadingManager.offload_requests, []

    def noted(manager: Any) -> bool:
        evicted.append(len(manager.scheduler.starved_requests))
        return offload(manager)

    with (
        offloading_to_cpu(),
        mock.patch.object(OffloadingManager, "offload_requests", noted),
        running(patched(gate), copies=copies, **fields) as manager,
    ):
        for name, each, count in zip(names, prompts, new, strict=True):
            manager.add_request(each, request_id=name, max_new_tokens=count)
        for number in cancelled:
            manager.cancel_request(names[number])
        found = finished(manager, set(wanted))
        memories = manager.patchattn_memories
    assert {name: found[name].error for name in wanted} == dict.fromkeys(wanted)
    assert {name: found[name].generated_tokens for name in wanted} == wanted
    assert not memories
    return any(evicted)


@pytest.mark.parametrize("gate", [pytest.param(OpenGate(), marks=pytest.mark.slow), MIXED], ids=["open", "moment"])
@given(schedules())
@settings(max_examples=settings().max_examples // 12, phases=NOT_SHRUNK)
def test_any_schedule_gives_the_tokens_of_one_request_at_a_time(gate, schedule) -> None:
    event("evicted" if run(gate, schedule) else "room for all")


@pytest.mark.slow
@pytest.mark.parametrize("gate", [OpenGate(), MIXED], ids=["open", "moment"])
def test_two_hundred_requests(gate) -> None:
    draw = torch.Generator().manual_seed(5)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=draw))

    bases = [prompt(150, seed) for seed in range(4)]
    prompts = [bases[number(4)][: number(140)] + prompt(1 + number(60), seed=at) for at in range(200)]
    new, cancelled = [1 + number(NEW) for _ in prompts], {at for at in range(200) if number(10) == 0}
    fields = {"num_blocks": 80, "page_size": 8, "max_batch_tokens": 64, "allow_block_sharing": True}
    for scheduler, space in (("fifo", 0.1), ("prefill_first", 0.0)):
        assert run(
            gate, (prompts, new, cancelled, 2, fields | {"scheduler_type": scheduler, "cpu_offload_space": space})
        )


@pytest.mark.parametrize(
    "space", [0.0, pytest.param(0.1, marks=pytest.mark.slow)], ids=["made anew", "kept on the CPU"]
)
@pytest.mark.parametrize("scheduler", ["fifo", pytest.param("prefill_first", marks=pytest.mark.slow)])
def test_a_request_that_was_evicted_goes_on(space, scheduler) -> None:
    model, prompts = tiny_model("llama", dtype=torch.float64), PROMPTS[:2] * 3
    to_cpu, soft = [], []
    move = OffloadingManager._offload_to_cpu

    def noted(manager: Any, victims: Any, *given: Any) -> Any:
        moved = move(manager, victims, *given)
        (to_cpu if moved else soft).append(len(victims))
        return moved

    with patchattn.patch(model, policy(), backend="blockwise") as handle:
        want = [alone(model, each, 40) for each in prompts]
        handle.reset_report()
        with offloading_to_cpu(), mock.patch.object(OffloadingManager, "_offload_to_cpu", noted):
            outputs = serve(model, prompts, 40, num_blocks=44, scheduler_type=scheduler, cpu_offload_space=space)
        assert tokens(outputs) == want
    assert bool(to_cpu) == (space > 0)
    assert bool(soft) == (space == 0)
    assert 0.2 < handle.report().open_fraction() < 0.9


def live() -> int:
    gc.collect()
    return sum(type(each) is RequestMemory for each in gc.get_objects())


def test_nothing_is_left_of_requests_that_are_done() -> None:
    model = tiny_model("llama")
    with patchattn.patch(model, policy(), backend="blockwise"):
        with running(model, max_requests_per_batch=4) as manager:
            for _ in range(3):
                finished(manager, {manager.add_request(each) for each in PROMPTS})
                # What the engine has of its last step.
                assert live() <= 4
            manager.cancel_request(manager.add_request(PROMPTS[0], max_new_tokens=700))
            name = manager.add_request(PROMPTS[1], max_new_tokens=700)
            while name not in manager.patchattn_memories:
                time.sleep(0.01)
            manager.cancel_request(name)
            while manager.batch_processor.has_pending_requests():
                time.sleep(0.01)
            assert live() <= 4
        assert not manager.patchattn_memories
        assert live() == 0


@pytest.mark.slow
def test_requests_that_fail_at_the_end_leave_nothing() -> None:
    model = tiny_model("llama")
    with patchattn.patch(model, policy(), backend="blockwise"):
        with running(model) as manager:
            name = manager.add_request(PROMPTS[1], max_new_tokens=700)
            while name not in manager.patchattn_memories:
                time.sleep(0.01)
            manager.stop(block=True, hard_stop=True)
            output = finished(manager, {name})[name]
            assert "before this request completed" in output.error
            assert output.gates.asked["prefill"] > 0
        del manager
    assert live() == 0


def resident() -> float:
    """MiB that the process holds, without what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of the process")
def test_a_thousand_requests_leave_memory_flat(caplog: pytest.LogCaptureFixture) -> None:
    # Records of errors keep the frames in which they were raised.
    caplog.set_level(logging.CRITICAL, logger="ContinuousBatchingLogger")
    model, held = tiny_model("llama"), []
    with patchattn.patch(model, policy(), backend="blockwise"):
        with running(model, new=4, allow_block_sharing=True) as manager:
            for hundred in range(10):
                names = {manager.add_request(prompt(20 + 17 * at % 180, seed=100 * hundred + at)) for at in range(80)}
                names |= {manager.add_request(each) for each in ([], prompt(2000)) for _ in range(5)}
                for seed in range(10):
                    manager.cancel_request(manager.add_request(prompt(150, seed), max_new_tokens=300))
                finished(manager, names)
                while manager.batch_processor.has_pending_requests():
                    time.sleep(0.01)
                held.append(resident())
                assert live() <= 100
        assert live() == 0
    assert held[-1] - held[4] < 2


def test_streams() -> None:
    model = tiny_model("llama")
    with patchattn.patch(model, policy(), backend="blockwise"):
        want = alone(model, PROMPTS[0])
        with running(model) as manager:
            outputs = list(manager.request_id_iter(manager.add_request(PROMPTS[0], streaming=True)))
    assert [output.generated_tokens for output in outputs] == [want[: count + 1] for count in range(8)]
    assert [output.gates.asked["decode"] for output in outputs] == [18 * count for count in range(8)]
    assert len({output.gates.asked["prefill"] for output in outputs}) == 1
    opened = [output.gates.open["decode"] for output in outputs]
    assert opened == sorted(opened)
    assert 0 < outputs[-1].gates.open_fraction() < 1


@pytest.mark.slow
def test_handlers_get_the_gates_too() -> None:
    model = tiny_model("llama")

    async def handled(manager: Any) -> list[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        for name in ("one", "two"):
            manager.register_result_handler(name, queue.put_nowait)
        for name, each in zip(("one", "two"), PROMPTS, strict=False):
            manager.add_request(each, request_id=name, streaming=name == "two")
        outputs = []
        while sum(output.is_finished() for output in outputs) < 2:
            outputs.append(await asyncio.wait_for(queue.get(), 60))
        return outputs

    with patchattn.patch(model, policy(), backend="blockwise"):
        want = [alone(model, each) for each in PROMPTS[:2]]
        with running(model) as manager:
            outputs = asyncio.run(handled(manager))
    last = {output.request_id: output for output in outputs if output.is_finished()}
    assert [last[name].generated_tokens for name in ("one", "two")] == want
    assert len(outputs) == 1 + 8
    assert all(output.gates.asked["prefill"] > 0 for output in outputs)
