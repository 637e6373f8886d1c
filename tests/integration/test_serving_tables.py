"""Continuous batching as on a CUDA device: rows of all requests over page tables, decisions never read in a layer."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from serving import (
    MIXED,
    PROMPTS,
    alone,
    by_tables,
    counts,
    offloading_to_cpu,
    policy,
    prompt,
    serve,
    tokens,
    with_calibration,
)

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, StaticGate
from patchattn.backends.flex.compiled import forget
from patchattn.hf.pages import LayerPages
from patchattn.testing import tiny_model


@pytest.fixture(scope="module", autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    forget()
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.WARNING)  # pytest would format and keep every line
    yield
    trace.setLevel(level)
    forget()
    torch.compiler.reset()


def assert_served_like_alone(model, prompts, new, *, whole=False, compiler="eager", given=None, copies=1, **fields):
    """Compare with `generate`, with `whole` all by FlexAttention; returns the report and the rows of calls."""
    given = {"backend": "flex" if whole else "blockwise", "policy": policy()} | (given or {})
    with patchattn.patch(model, **given) as handle:
        calls = by_tables(handle, compiler, whole=whole)
        want = [alone(model, each, new) for each in prompts]
        wanted = counts(handle)
        handle.reset_report()
        outputs = serve(model, prompts, new, copies=copies, **fields)
    assert tokens(outputs) == [each for each in want for _ in range(copies)]
    if copies == 1:
        assert counts(handle) == wanted
        for phase in ("prefill", "decode"):
            of_all = [opened for (_, at), (_, opened) in wanted.items() if at == phase]
            assert sum(output.gates.open[phase] for output in outputs) == sum(map(sum, of_all))
    return handle.report(), calls


def test_rows_over_pages_are_those_of_generate():
    model, gathered = tiny_model("llama"), []
    # The moments of the last go on in its twelfth step; the second is too short to be asked.
    prompts = [PROMPTS[1], PROMPTS[2], prompt(280, seed=9)]
    read = LayerPages.read

    def noted(pages, sequence, *given):
        gathered.append(sequence.queries)
        return read(pages, sequence, *given)

    with mock.patch.object(LayerPages, "read", noted):
        report, calls = assert_served_like_alone(model, prompts, 14, given={"policy": policy(min_bulk=30)})
    assert 0.05 < report.open_fraction("decode") < 0.9
    assert not any(reason for reasons in report.rebuilt.values() for reason in reasons.values())
    # One call of each layer for all rows of a step, and no keys are gathered for it.
    assert calls.count(3) >= 3 * 9
    assert 1 not in gathered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "compiler"), [("llama", "eager"), ("gemma2", "aot_eager"), ("gpt_oss", "aot_eager"), ("qwen3", "eager")]
)
def test_families(family, compiler):
    """Functionalised where scores are capped and where there are sink logits; the others trace a part of the same."""
    report, _ = assert_served_like_alone(tiny_model(family), PROMPTS, 8, whole=True, compiler=compiler)
    for phase in ("prefill", "decode"):
        assert 0.05 < report.open_fraction(phase) < 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate",
    [
        MomentGate(threshold=0.1, estimate="guarded"),
        OracleGate(threshold=0.3),
        StaticGate(open_heads=((0, 1), (2, 4))),
        ClosedGate(),
    ],
    ids=lambda gate: gate.kind,
)
def test_gates(gate):
    assert_served_like_alone(tiny_model("llama"), PROMPTS, 8, given={"policy": policy(gate)}, max_batch_tokens=96)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"phases": {"decode"}}, {"phases": {"prefill"}}, {"layers": (1,)}, {"window_size": 1000}, {"sink_size": 0}],
    ids=lambda fields: next(iter(fields)),
)
def test_policies(fields):
    assert_served_like_alone(tiny_model("llama"), PROMPTS, 8, given={"policy": policy(**fields)})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"prices": True, "key_moments": False}, {"prices": False, "key_moments": True}])
def test_calibrations(fields):
    model = tiny_model("llama")
    report, _ = assert_served_like_alone(model, PROMPTS, 8, given=with_calibration(model, fields))
    assert 0.02 < report.open_fraction("decode") < 0.98


@pytest.mark.slow
def test_copies_go_on_from_the_moments_of_their_request():
    report, _ = assert_served_like_alone(tiny_model("llama"), PROMPTS, 8, copies=3)
    assert not any(report.rebuilt.values())


@pytest.mark.slow
def test_requests_that_share_their_first_pages():
    model, first = tiny_model("llama"), prompt(320)
    second = first[:200] + prompt(30, seed=9)
    with patchattn.patch(model, policy(), backend="blockwise") as handle:
        by_tables(handle)
        want = [alone(model, each) for each in (first, second)]
        handle.reset_report()
        fields = {"persistent_manager": True, "allow_block_sharing": True}
        assert tokens(serve(model, [first], **fields)) == want[:1]
        outputs = serve(model, [second, first], **fields)
        assert tokens(outputs) == want[::-1]
        assert outputs[0].gates.asked["prefill"] == (230 - 192) * 3 * 6


@pytest.mark.slow
@pytest.mark.parametrize("space", [0.0, 0.1], ids=["made anew", "kept on the CPU"])
def test_requests_that_were_evicted_go_on(space):
    model = tiny_model("llama")
    with offloading_to_cpu(), patchattn.patch(model, policy(), backend="blockwise") as handle:
        by_tables(handle)
        want = [alone(model, each, 40) for each in PROMPTS[:2]] * 3
        outputs = serve(model, PROMPTS[:2] * 3, 40, num_blocks=44, cpu_offload_space=space)
    assert tokens(outputs) == want


@pytest.mark.slow
def test_moments_that_stood_still_are_brought_up_to_the_query():
    # Asked only from 230 bulk keys on: 100 steps after the prompt, in which moments went on by a chunk.
    model = tiny_model("llama")
    report, _ = assert_served_like_alone(
        model, [prompt(180)], 130, given={"policy": policy(min_bulk={"prefill": 0, "decode": 230})}
    )
    assert 0 < report.open_fraction("decode") < 1


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [OpenGate(), MIXED, ClosedGate()], ids=lambda gate: gate.kind)
def test_on_a_gpu(gate):
    model = tiny_model("llama").cuda()
    with patchattn.patch(model, policy(gate), backend="flex"):
        want = [alone(model, each) for each in PROMPTS]
        assert tokens(serve(model, PROMPTS)) == want
