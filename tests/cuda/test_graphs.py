"""Whether a decode step with a static cache can be one CUDA graph, compiled as transformers compiles it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from llama import made_on_fake_device, move_to_fake_device, tiny_llama
from recorder import Compiled, compiling
from torch import Tensor
from transformers import StaticCache

import patchattn
from patchattn.backends.flex.compiled import forget
from patchattn.hf.architecture import with_cache

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")]
LENGTH = 2048


@dataclass
class Capture:
    """What Inductor says of capturing its graphs: why not, and how many tensors each replay copies into its memory."""

    refused: list[str] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)


@contextlib.contextmanager
def capturing() -> Iterator[tuple[Compiled, Capture]]:
    """Record what is compiled and captured, under a fake mode. Nothing is captured in parts, nor for one length."""
    from torch._inductor import compile_fx, cudagraph_utils, output_code

    capture = Capture()

    def capture_one(
        run: Callable[..., Any],
        static_input_idxs: Sequence[int] = (),
        *,
        placeholders: Sequence[Any] = (),
        mutated_input_idxs: Sequence[int] = (),
        **_: Any,
    ) -> Callable[..., Any]:
        changed = set(mutated_input_idxs) - set(static_input_idxs)
        if changed:  # torch finds these when it runs
            capture.refused.append(cudagraph_utils.get_mutation_stack_trace(placeholders, sorted(changed)))
        capture.copied.append(len(placeholders) - len(static_input_idxs))
        return run

    with (
        mock.patch.object(compile_fx, "cudagraphify", capture_one),
        mock.patch.object(output_code, "log_cudagraph_skip_and_bump_counter", capture.refused.append),
        torch._inductor.config.patch({"graph_partition": False, "triton.cudagraph_skip_dynamic_graphs": True}),
        compiling() as compiled,
    ):
        yield compiled, capture


def test_a_step_with_a_static_cache_can_be_captured():
    model = tiny_llama(2, 2 * LENGTH)
    compile_one = torch.compile

    def compile_eagerly(function: Any, **how: Any) -> Any:
        return compile_one(function, **how | {"backend": "eager"})

    forget()
    with capturing() as (compiled, capture), made_on_fake_device(), torch.no_grad():
        move_to_fake_device(model)
        with mock.patch("patchattn.hf.patching.self_check"):
            patchattn.patch(model, patchattn.Policy(window_size=256, min_bulk=0), backend="flex")
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 64)
        for entry in cache.layers:
            entry.cumulative_length = torch.zeros((), dtype=torch.long, device="cuda")  # a constant would be real
        tokens = torch.zeros(1, LENGTH, dtype=torch.long, device="cuda")
        with mock.patch.object(torch, "compile", compile_eagerly):
            model(tokens, logits_to_keep=1, **with_cache(model, cache))
        step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
        kept = [moments_of(cache)]
        for at in (LENGTH, LENGTH + 1):
            positions = torch.full((1, 1), at, dtype=torch.long, device="cuda")
            step(tokens[:, :1], position_ids=positions, **with_cache(model, cache))
            kept.append(moments_of(cache))
    print(f"\nstep of 2 layers: {compiled}")
    assert len(compiled.graphs) == 1
    assert not compiled.graphs[0].waits
    assert not capture.refused
    # The token and its position. A moment among them would be an output of the replay before, which is overwritten.
    assert capture.copied == [2]
    assert kept[0] == kept[1] == kept[2]


def moments_of(cache: StaticCache) -> list[int]:
    """Say which tensors the cache's moments are."""
    return [id(part) for entry in cache.layers for part in entry._patchattn_moments.parts]


def go_to_the_host(x: Tensor) -> Tensor:
    return x.cpu().sin().to(x.device)


def keep_in_a_timeline(x: Tensor) -> Tensor:
    torch.ops.patchattn.keep(x, x > 0, x.sum().long(), "decode")
    return x + 1


@pytest.mark.parametrize(
    ("step", "dynamic", "reason"),
    [
        (go_to_the_host, False, "cpu device"),
        (lambda x: x.add_(1), False, "mutated inputs (1 instances)"),
        (lambda x: x + 1, True, "symbolic shapes"),
        (lambda x: x.nonzero(), False, "incompatible op"),
        (keep_in_a_timeline, False, "incompatible op patchattn.keep"),
    ],
)
def test_the_check_can_fail(step: Callable[[Tensor], Tensor], dynamic: bool, reason: str):
    with capturing() as (_, capture), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x = torch.empty(8, 64, device="cuda")
        with contextlib.suppress(torch._subclasses.fake_tensor.DynamicOutputShapeException):
            torch.compile(step, fullgraph=True, mode="reduce-overhead", dynamic=dynamic)(x)
    assert len(capture.refused) == 1
    assert reason in capture.refused[0]
