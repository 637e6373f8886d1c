"""Every backend equals the reference for any call and any decisions, also where keys are not finite.

But `flex`, which compiles anew for each shape; `tests/unit/test_flex.py` has its cases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from patchattn.backends import BackendName, load
from patchattn.backends.backend import Backend
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.gates.decision import all_open, forced
from patchattn.testing import assert_within_budget
from patchattn.testing.dense import dense_attention
from patchattn.testing.strategies import FINITE_KEYS, attention_inputs, cast, decisions, shapes

REFERENCE = load("reference")
BACKENDS = {name: load(name) for name in get_args(BackendName) if name not in ("reference", "flex")}
fast = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
every = pytest.mark.parametrize("backend", [REFERENCE, *BACKENDS.values()], ids=["reference", *BACKENDS])


def note_what_it_shows(inputs: AttentionInputs, opened: torch.Tensor) -> None:
    """Count what the examples were about; shown by --hypothesis-show-statistics."""
    asked = inputs.regions.asked[:, None].expand_as(opened)
    mixed = bool(opened[asked].any()) and not bool(opened[asked].all())
    event("open and closed" if mixed else "one kind of decision" if asked.any() else "nothing asked")


@fast
@pytest.mark.parametrize("decode", [True, None], ids=["decode", "any"])
@given(st.data())
def test_a_backend_equals_the_reference(backend: Backend, decode: bool | None, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(shape=shapes(decode=decode)))
    opened = data.draw(decisions(inputs))
    note_what_it_shows(inputs, opened)
    mass = forced(opened, inputs)
    if inputs.whole_groups:
        # Closed, but not for certain.
        mass = mass.clamp(min=torch.finfo(mass.dtype).min)
    expected, actual = (b.attend(inputs, mass, 0.0) for b in (REFERENCE, backend))
    assert torch.equal(actual.open, expected.open)
    left_out = ~expected.output.isfinite()
    got, want = (attended.output.masked_fill(left_out, 0) for attended in (actual, expected))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(st.data())
@settings(max_examples=settings().max_examples // 2)
def test_a_backend_is_within_the_error_budget(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    rounded = cast(data.draw(attention_inputs(key_kinds=FINITE_KEYS)), dtype)
    exact = cast(rounded, torch.float64)
    opened = data.draw(decisions(rounded))
    note_what_it_shows(rounded, opened)
    truth = REFERENCE.attend(exact, forced(opened, exact), 0.0).output
    plain, got = (b.attend(rounded, forced(opened, rounded), 0.0).output for b in (REFERENCE, backend))
    assert_within_budget(got, plain, truth)


@given(st.data())
def test_the_reference_equals_dense_attention_under_the_token_level_mask(data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(key_kinds=FINITE_KEYS))
    opened = data.draw(decisions(inputs))
    attended = REFERENCE.attend(inputs, forced(opened, inputs), 0.0)
    regions = inputs.regions
    want = dense_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        opened | regions.below[:, None],
        regions.valid,
        int(regions.query_slot),
        sink_size=regions.sink_size,
        window_size=regions.window_size,
        scale=inputs.scale,
        softcap=inputs.softcap,
        sink_logits=inputs.sink_logits,
    )
    real = regions.valid[:, regions.query_slots][:, None, :, None]
    torch.testing.assert_close(attended.output * real, want.output * real, rtol=1e-10, atol=1e-12)
    assert torch.equal(attended.open, opened & regions.asked[:, None])


@fast
@given(st.data())
@settings(max_examples=settings().max_examples // 2)
def test_dense_attention_equals_the_reference_with_all_gates_open(backend: Backend, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(key_kinds=FINITE_KEYS))
    want = REFERENCE.attend(inputs, all_open(inputs), 0.0).output
    torch.testing.assert_close(backend.dense(inputs), want, rtol=1e-9, atol=1e-10)


@every
@given(st.data())
@settings(max_examples=settings().max_examples // 2)
def test_permuting_the_batch_permutes_the_output(backend: Backend, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(key_kinds=FINITE_KEYS))
    opened = data.draw(decisions(inputs))
    order = torch.tensor(data.draw(st.permutations(range(inputs.query.shape[0]))))
    permuted = rows_of(inputs, order)
    want = backend.attend(inputs, forced(opened, inputs), 0.0)
    got = backend.attend(permuted, forced(opened[order], permuted), 0.0)
    assert torch.equal(got.open, want.open[order])
    torch.testing.assert_close(got.output, want.output[order], rtol=1e-11, atol=1e-12)


def rows_of(inputs: AttentionInputs, rows: torch.Tensor) -> AttentionInputs:
    parts = {name: getattr(inputs, name)[rows] for name in ("query", "key", "value")}
    return replace(inputs, **parts, regions=changed_regions(inputs, valid=inputs.regions.valid[rows]))


def changed_regions(inputs: AttentionInputs, **changes: Any) -> Regions:
    r = inputs.regions
    sizes = ("query_length", "sink_size", "window_size", "break_even")
    same = {name: getattr(r, name) for name in sizes}
    return Regions.of(**({"valid": r.valid, "query_slot": r.query_slot} | same | changes))


@every
@given(st.data())
@settings(max_examples=settings().max_examples // 2)
def test_left_padding_of_any_amount_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(key_kinds=FINITE_KEYS, shape=shapes(max_keys=250)))
    opened = data.draw(decisions(inputs))
    pad = data.draw(st.integers(1, 200) | st.sampled_from([63, 64, 127, 128]))
    # What lies in the padding is not zero.
    key, value = (torch.cat([x[:, :, :1].repeat(1, 1, pad, 1) * 7, x], dim=2) for x in (inputs.key, inputs.value))
    valid, slot = torch.nn.functional.pad(inputs.regions.valid, (pad, 0)), inputs.regions.query_slot + pad
    padded = replace(inputs, key=key, value=value, regions=changed_regions(inputs, valid=valid, query_slot=slot))
    want = backend.attend(inputs, forced(opened, inputs), 0.0)
    got = backend.attend(padded, forced(opened, padded), 0.0)
    assert torch.equal(got.open, want.open)
    torch.testing.assert_close(got.output, want.output, rtol=1e-11, atol=1e-12)


@fast
@given(st.data())
@settings(max_examples=settings().max_examples // 2)
def test_queries_in_several_calls_equal_one_call(backend: Backend, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(key_kinds=FINITE_KEYS))
    opened = data.draw(decisions(inputs))
    whole = backend.attend(inputs, forced(opened, inputs), 0.0)
    cut = data.draw(st.integers(0, inputs.query.shape[2] - 1))
    outputs, decided = [], []
    for begin, end in ((0, cut), (cut, inputs.query.shape[2])):
        if begin == end:
            continue
        regions = changed_regions(inputs, query_length=end - begin, query_slot=inputs.regions.query_slot + begin)
        part = replace(inputs, query=inputs.query[:, :, begin:end], regions=regions)
        attended = backend.attend(part, forced(opened[:, :, begin:end], part), 0.0)
        outputs.append(attended.output)
        decided.append(attended.open)
    assert torch.equal(torch.cat(decided, 2), whole.open)
    torch.testing.assert_close(torch.cat(outputs, 2), whole.output, rtol=1e-11, atol=1e-12)
