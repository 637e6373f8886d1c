"""Patched models: the same in pieces as at once, in any order of the batch, with any padding, and undone exactly."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn import MinBulk, MomentGate, OracleGate, Policy, StaticGate
from patchattn.hf import patching
from patchattn.hf.architecture import with_cache
from patchattn.policy import phase_of
from patchattn.testing import gates_of_chunks, recorded_gates, replay_gates, tiny_model
from patchattn.testing.strategies import padded_batches, policies

SOME = settings(max_examples=max(1, settings().max_examples // 4))
FEW = settings(max_examples=max(1, settings().max_examples // 8))
LAYERS = 2
mixed_gates = st.sampled_from(
    [MomentGate(threshold=0.3), OracleGate(threshold=0.3), StaticGate(open_heads=((0, 1), (1, 2), (1, 5)))]
)


@pytest.fixture(autouse=True, scope="module")
def _no_self_check() -> Any:
    """Save the time of the self-check, which has tests of its own, at each of many patches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching, "self_check", lambda *args, **kwargs: 0.0)
        yield


@functools.cache
def model_of(family: str) -> Any:
    return tiny_model(family, num_hidden_layers=LAYERS).double()


families = st.sampled_from(["llama", "qwen2", "qwen3"])


@st.composite
def mixed_policies(draw: st.DrawFn) -> Policy:
    return Policy(
        sink_size=draw(st.sampled_from([0, 4, 17])),
        window_size=draw(st.sampled_from([1, 32, 65])),
        min_bulk=draw(st.sampled_from([0, 0, 40, MinBulk(prefill=40, decode=0)])),
        gate=draw(mixed_gates),
    )


def forward(model: Any, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, **more).logits


def note(gates: dict[int, list[Tensor]]) -> None:
    opened = torch.cat([call.flatten() for calls in gates.values() for call in calls])
    event("open and closed" if opened.any() and not opened.all() else "one kind of decision")


@given(families, mixed_policies(), padded_batches(min_length=100, max_length=260), st.data())
@SOME
def test_prefill_in_any_chunks_and_decode_equal_one_prefill(
    family: str, policy: Policy, batch: dict[str, Tensor], data: st.DataObject
) -> None:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length, model = ids.shape[1], model_of(family)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    decoded = data.draw(st.integers(0, 3))
    cuts = [cut for cut in cuts if cut < length - decoded] + list(range(length - decoded, length))
    pieces = [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]
    with patchattn.patch(model, policy, record="timeline") as handle:
        want = forward(model, ids, mask)
        gates = recorded_gates(handle)
    note(gates)
    static = data.draw(st.booleans())
    cache = StaticCache(config=model.config, max_cache_len=length + 9) if static else DynamicCache()
    with patchattn.patch(model, policy, record="timeline") as handle:
        # A call that can't reach beyond sink and window is dense and replays nothing.
        ends = [0, *cuts, length][1:]
        keys = [length + 9] * len(ends) if static else ends
        local = policy.sink_size + policy.window_size
        gated = [n - local >= max(1, policy.break_even(phase_of(piece))) for n, piece in zip(keys, pieces, strict=True)]
        expected = {
            layer: [part for part, ask in zip(gates_of_chunks(calls, pieces), gated, strict=True) if ask]
            for layer, calls in gates.items()
        }
        replay_gates(handle, expected)
        outputs = []
        for piece, end in zip(pieces, ends, strict=True):
            outputs.append(forward(model, ids[:, end - piece : end], mask[:, :end], **with_cache(model, cache)))
        replayed = recorded_gates(handle)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(outputs, 1)[real], want[real], rtol=0, atol=1e-8)
    for layer, calls in replayed.items():
        assert all(torch.equal(call, part) for call, part in zip(calls, expected[layer], strict=True))


@given(families, mixed_policies(), padded_batches(min_length=80, max_length=230), st.data())
@FEW
def test_permuting_the_batch_permutes_the_logits(
    family: str, policy: Policy, batch: dict[str, Tensor], data: st.DataObject
) -> None:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    model = model_of(family)
    with patchattn.patch(model, policy):
        want, got = forward(model, ids, mask), forward(model, ids[order], mask[order])
    real = mask[order].bool()
    torch.testing.assert_close(got[real], want[order][real], rtol=0, atol=1e-8)


@given(families, mixed_policies(), padded_batches(min_length=80, max_length=230), st.integers(1, 150))
@FEW
def test_left_padding_of_any_amount_changes_nothing(
    family: str, policy: Policy, batch: dict[str, Tensor], pad: int
) -> None:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more_ids, more_mask = (torch.nn.functional.pad(x, (pad, 0)) for x in (ids, mask))
    model = model_of(family)
    with patchattn.patch(model, policy, record="timeline") as handle:
        want, got = forward(model, ids, mask), forward(model, more_ids, more_mask)
        gates = recorded_gates(handle)
    torch.testing.assert_close(got[:, pad:][mask.bool()], want[mask.bool()], rtol=0, atol=1e-8)
    for calls in gates.values():
        assert torch.equal(calls[-1][:, :, pad:], calls[0]) if len(calls) == 2 else not calls[-1][:, :, :pad].any()


def everything_of(model: Any) -> dict[str, Any]:
    """Every attribute, hook, buffer, parameter and configuration field, by identity where it is an object."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "implementation": model.config._attn_implementation}
    for name, module in model.named_modules():
        found[name] = type(module)
        for attribute, content in vars(module).items():
            inside = list(content.items()) if isinstance(content, dict) else None
            found[f"{name}.{attribute}"] = inside if inside is not None else content
    found["private config"] = dict(vars(model.config))
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, content in before.items():
        if isinstance(content, list) and content and isinstance(content[0], tuple):
            assert [key for key, _ in content] == [key for key, _ in after[name]], name
            assert all(a is b for (_, a), (_, b) in zip(content, after[name], strict=True)), name
        else:
            assert content is after[name] or content == after[name], name


@given(
    families,
    st.sampled_from(["sdpa", "eager"]),
    policies(layers=LAYERS, heads=6, max_size=60),
    st.sampled_from(["forward", "generate", "exception", "nothing"]),
)
@SOME
def test_patch_then_unpatch_is_the_identity(family: str, original: str, policy: Policy, use: str) -> None:
    model = tiny_model(family, num_hidden_layers=LAYERS)
    model.set_attn_implementation(original)
    ids = torch.randint(2, 128, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    logits = forward(model, ids, mask)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = everything_of(model)
    try:
        with patchattn.patch(model, policy):
            assert patchattn.is_patched(model)
            assert list(model.state_dict()) == list(weights)
            if use == "forward":
                forward(model, ids, mask)
            elif use == "generate":
                model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
            elif use == "exception":
                forward(model, ids.new_full(ids.shape, 1000), mask)
    except IndexError:
        assert use == "exception"
    assert_same(before, everything_of(model))
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert torch.equal(forward(model, ids, mask), logits)
