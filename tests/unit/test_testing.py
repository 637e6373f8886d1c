"""`patchattn.testing`: the proof notices every kind of mistake and names its place, and leaves the model alone."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, StaticGate
from patchattn.backends import blockwise, reference
from patchattn.call.regions import Regions
from patchattn.hf import attention as hf_attention
from patchattn.hf import gated, patching
from patchattn.hf.mask import CausalMask
from patchattn.moments.prompt import PromptMoments
from patchattn.testing import ProvesNothingError, assert_equivalent, assert_within_budget, tiny_model
from patchattn.testing.dense import dense_attention, token_masks

STATIC = StaticGate(open_heads=((0, 1), (1, 2), (1, 5), (2, 0)))


def policy(gate: Any = STATIC, **fields: Any) -> Policy:
    return Policy(**({"sink_size": 4, "window_size": 32, "min_bulk": 0, "gate": gate} | fields))


def padded(lengths: tuple[int, ...] = (230, 190), seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 128, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(autouse=True)
def _no_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong backends reach the model, and right ones save the time."""
    monkeypatch.setattr(patching, "self_check", lambda *args, **kwargs: 0.0)


def snapshot(model: Any) -> Any:
    return (
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        model.config.to_dict() | {"attention": model.config._attn_implementation},
        model.training,
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.random.get_rng_state(),
    )


def assert_untouched(model: Any, before: Any) -> None:
    *same, weights, state = snapshot(model)
    assert same == list(before[:3])
    assert torch.equal(state, before[4])
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[3][name])


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        (MomentGate(threshold=0.3), torch.float32),
        (MomentGate(threshold=0.3, estimate="saturating"), torch.bfloat16),
        (OracleGate(threshold=0.3), torch.float16),
        (STATIC, torch.bfloat16),
        (ClosedGate(), torch.float32),
        (OpenGate(), torch.float32),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_a_right_model_passes_and_is_left_as_it_was(gate: Any, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = snapshot(model)
    result = assert_equivalent(model, policy(gate), padded(), new_tokens=2)
    assert_untouched(model, before)
    assert result.layers == (0, 1, 2)
    assert result.calls == 2 * 3 * 3
    assert result.tokens == 230 + 190 + 2 * 2
    assert set(result.open_fraction) == {"prefill", "decode"}
    assert 0 < result.layer_error <= 1
    assert 0 < result.logit_error <= 1
    assert result.decisions_checked
    assert "equal dense attention" in str(result)
    assert "blockwise" in str(result)


def test_random_tokens_reach_beyond_sink_window_and_break_even() -> None:
    result = assert_equivalent(tiny_model("qwen2", seed=1), policy(OracleGate(threshold=0.3), min_bulk=50))
    assert result.tokens == 4 + 32 + 50 + 3 * 128
    assert result.open_fraction["prefill"] < 1
    assert set(result.open_fraction) == {"prefill"}


def test_token_ids_alone_and_right_padding_are_accepted() -> None:
    given = padded((150,))
    assert_equivalent(tiny_model("llama"), policy(), given["input_ids"])
    flipped = {name: tensor.flip(1) for name, tensor in padded().items()}
    assert_equivalent(tiny_model("llama"), policy(), flipped, new_tokens=2)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_softcaps_sink_logits_latent_and_sliding_layers_are_no_obstacle(family: str) -> None:
    model = tiny_model(family)
    found = patchattn.check_support(model)
    assert isinstance(found, patchattn.Supported)
    assert assert_equivalent(model, policy(OracleGate(threshold=0.3)), padded(), new_tokens=1).layers == found.layers


def test_layers_and_phases_left_out_are_no_obstacle() -> None:
    gate = StaticGate(open_heads=((1, 2),))
    chosen = policy(gate, layers=(1,), phases=frozenset({"decode"}))
    result = assert_equivalent(tiny_model("llama"), chosen, padded(), new_tokens=2)
    assert result.layers == (1,)
    assert set(result.open_fraction) == {"decode"}


# Each way to break a backend is told the layer of the call, counted over the calls of one forward.
def broken_backend(change: Callable[..., Any], *, layer: int, queries: int | None = None) -> Callable[..., Any]:
    calls = [0]

    def attend(inputs: Any, mass: Any, threshold: Any) -> Any:
        at, calls[0] = calls[0] % 3, calls[0] + 1
        right = reference.attend(inputs, mass, threshold)
        if at != layer or queries not in (None, inputs.query.shape[2]):
            return right
        return change(inputs, mass, threshold, right)

    return attend


def use_backend(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Any]) -> None:
    monkeypatch.setattr(blockwise, "BACKEND", dataclasses.replace(blockwise.BACKEND, attend=attend))


def nudged(row: int, head: int, query: int, by: float = 1e-2) -> Callable[..., Any]:
    def change(inputs: Any, mass: Any, threshold: Any, right: Any) -> Any:
        output = right.output.clone()
        output[row, head, query] += by
        return dataclasses.replace(right, output=output)

    return change


@pytest.mark.parametrize(
    ("layer", "queries", "place"),
    [
        (1, 230, (1, 4, 211)),
        (0, 230, (0, 0, 0)),
        (2, 1, (1, 5, 0)),
    ],
    ids=["prefill", "first query", "decode"],
)
@pytest.mark.parametrize("by", [1e-2, float("nan")])
def test_the_first_wrong_layer_head_and_query_is_named(
    monkeypatch: pytest.MonkeyPatch, layer: int, queries: int, place: tuple[int, int, int], by: float
) -> None:
    row, head, query = place
    use_backend(monkeypatch, broken_backend(nudged(row, head, query, by), layer=layer, queries=queries))
    model = tiny_model("llama")
    before = snapshot(model)
    slot = query if queries > 1 else 230
    where = rf"all gates open: layer {layer}, batch row {row}, head {head}, query {slot} .* heads \[{head}\], 1 of"
    with pytest.raises(AssertionError, match=where):
        assert_equivalent(model, policy(), padded(), new_tokens=1)
    assert_untouched(model, before)


def other_regions(inputs: Any, **fields: int) -> Any:
    regions = dataclasses.replace(inputs.regions, **fields)
    return dataclasses.replace(inputs, regions=regions)


def without_padding(inputs: Any) -> Any:
    valid = torch.ones_like(inputs.regions.valid)
    regions = dataclasses.replace(inputs.regions, valid=valid, first=torch.zeros_like(inputs.regions.first))
    return dataclasses.replace(inputs, regions=regions)


def swapped_groups(inputs: Any) -> Any:
    return dataclasses.replace(inputs, key=inputs.key.flip(1), value=inputs.value.flip(1))


WRONG: dict[str, Callable[..., Any]] = {
    "window one short": lambda i, m, t, right: reference.attend(
        other_regions(i, window_size=i.regions.window_size - 1), m, t
    ),
    "sink one long": lambda i, m, t, right: reference.attend(other_regions(i, sink_size=i.regions.sink_size + 1), m, t),
    "padding ignored": lambda i, m, t, right: reference.attend(without_padding(i), m, t),
    "sink from the first slot": lambda i, m, t, right: reference.attend(
        dataclasses.replace(i, regions=dataclasses.replace(i.regions, first=torch.zeros_like(i.regions.first))), m, t
    ),
    "wrong KV head": lambda i, m, t, right: reference.attend(swapped_groups(i), m, t),
    "scale": lambda i, m, t, right: reference.attend(dataclasses.replace(i, scale=1.01 * i.scale), m, t),
    "decisions reported wrongly": lambda i, m, t, right: dataclasses.replace(right, open=right.open.roll(1, dims=1)),
    "decisions turned around": lambda i, m, t, right: reference.attend(i, -m, -t),
    "open where nothing is asked": lambda i, m, t, right: dataclasses.replace(right, open=torch.ones_like(right.open)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_backends_are_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use_backend(monkeypatch, broken_backend(WRONG[name], layer=1))
    with pytest.raises(AssertionError, match=r"layer 1, batch row \d, head \d, query \d") as caught:
        assert_equivalent(tiny_model("llama"), policy(), padded())
    assert not isinstance(caught.value, ProvesNothingError)


def test_wrong_thresholds_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, lambda inputs, mass, margin: reference.attend(inputs, mass, 0.0))
    with pytest.raises(AssertionError, match=r"policy's gates: layer 0.* (opens|closes), but in float64 its margin"):
        assert_equivalent(tiny_model("llama"), policy(OracleGate(threshold=0.3)), padded())


def test_a_gate_with_a_wrong_margin_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OracleGate, "margin", property(lambda gate: 0.0))
    with pytest.raises(AssertionError, match=r"policy's gates: layer 0.* (opens|closes), but in float64 its margin"):
        assert_equivalent(tiny_model("llama"), policy(OracleGate(threshold=0.3)), padded())


def test_stale_moments_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    load_moments = gated.load_moments

    def forgetful(*args: Any) -> PromptMoments | None:
        kept = load_moments(*args)
        return kept and dataclasses.replace(kept, total=kept.total * 0, outer=kept.outer * 0)

    monkeypatch.setattr(gated, "load_moments", forgetful)
    with pytest.raises(AssertionError, match=r"policy's gates: .*\(decode\) (opens|closes)"):
        assert_equivalent(tiny_model("llama"), policy(MomentGate(threshold=0.3)), padded((420,)), new_tokens=4)


def test_a_lost_padding_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = CausalMask.regions

    def unpadded(mask: CausalMask, *call: Any) -> Regions:
        known = regions(mask, *call)
        return dataclasses.replace(known, valid=torch.ones_like(known.valid), first=torch.zeros_like(known.first))

    monkeypatch.setattr(CausalMask, "regions", unpadded)
    with pytest.raises(AssertionError, match="layer 0, batch row 1"):
        assert_equivalent(tiny_model("llama"), policy(), padded())


def test_a_difference_outside_the_layers_shows_in_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_inputs = hf_attention.AttentionInputs
    monkeypatch.setattr(
        hf_attention,
        "AttentionInputs",
        lambda q, k, v, r, scale, *rest: attention_inputs(q, k, v, r, 1.1 * scale, *rest),
    )
    with pytest.raises(AssertionError, match=r"logits of batch row \d at token \d+ .* what they are given: scale"):
        assert_equivalent(tiny_model("llama"), policy(), padded())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"policy": policy(min_bulk="auto")}, r"don't reach beyond .* = 296"),
        ({"policy": policy(window_size=300)}, r"don't reach beyond .* = 304"),
        ({"policy": policy(OracleGate(threshold=1e-6))}, r"all \d+ pairs .* closed. Raise the gate's threshold"),
        ({"policy": policy(OracleGate(threshold=1 - 1e-9))}, r"all \d+ pairs .* open. Lower the gate's threshold"),
        ({"policy": policy(phases=frozenset({"decode"}))}, "phases are .*Set new_tokens"),
        ({"policy": policy(window_size=225), "new_tokens": 5}, r"around the gate .*'short': 1.* use longer inputs"),
        (
            {"policy": policy(window_size=220), "inputs": {name: x[1:] for name, x in padded((229, 220)).items()}},
            "nothing about prefill: no query has more than .* = 224 keys",
        ),
    ],
    ids=["min_bulk", "window", "all closed", "all open", "decode only", "short prefill", "padded prefill"],
)
def test_a_run_that_proves_nothing_says_what_to_change(change: dict[str, Any], complaint: str) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ProvesNothingError, match=f"proves nothing.*{complaint}|{complaint}"):
        assert_equivalent(model, **({"inputs": padded((229,))} | change))
    assert_untouched(model, before)


def test_calls_that_go_around_the_gate_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_attention, "CausalMask", int)
    monkeypatch.setattr(patching, "original_attention", lambda *args: around)

    def around(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return query.transpose(1, 2).contiguous() * 0, None

    monkeypatch.setattr(patchattn.testing.equivalence, "_compare_logits", lambda *args: 0.0)
    with pytest.raises(ProvesNothingError, match=r"went around the gate .*'mask': 1"):
        assert_equivalent(tiny_model("llama"), policy(), padded())


@pytest.mark.parametrize(
    ("change", "kind", "complaint"),
    [
        (
            {"inputs": {"input_ids": torch.ones(1, 99).long(), "token_type_ids": torch.ones(1)}},
            ValueError,
            "token_type",
        ),
        ({"inputs": {"attention_mask": torch.ones(1, 99).long()}}, ValueError, "input_ids"),
        ({"inputs": torch.ones(99).long()}, ValueError, r"\(99,\)"),
        ({"inputs": torch.ones(1, 99).long(), "length": 7}, ValueError, "length"),
        ({"new_tokens": -1}, ValueError, "new_tokens"),
        ({"length": 5000}, ValueError, "4096 positions"),
        ({"model": tiny_model("llama").double()}, ValueError, "float64"),
        ({"model": tiny_model("llama").train()}, ValueError, "eval"),
        ({"model": torch.nn.Linear(2, 2)}, patchattn.UnsupportedModelError, "PreTrainedModel"),
        ({"policy": {"window_size": 3}}, patchattn.PolicyError, "dict"),
        ({"backend": "triton"}, patchattn.BackendError, "triton"),
    ],
    ids=lambda value: None,
)
def test_what_can_not_be_used_is_refused(change: dict[str, Any], kind: type[Exception], complaint: str) -> None:
    arguments = {"model": tiny_model("llama"), "policy": policy()} | change
    with pytest.raises(kind, match=complaint):
        assert_equivalent(**arguments)


def test_a_patched_model_is_refused_and_stays_patched() -> None:
    model = tiny_model("llama")
    with patchattn.patch(model):
        with pytest.raises(patchattn.PatchStateError, match="already"):
            assert_equivalent(model)
        assert patchattn.is_patched(model)


def test_token_masks_follow_the_definition() -> None:
    real = torch.tensor([[False, False, True, True, True, True, True, True]])
    local, bulk, n_bulk = token_masks(real, 0, range(8), sink_size=1, window_size=2)
    assert local[0, 7].nonzero()[:, 0].tolist() == [2, 6, 7]
    assert bulk[0, 7].nonzero()[:, 0].tolist() == [3, 4, 5]
    assert n_bulk[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_dense_attention_in_slabs_is_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, heads, 50, 8, dtype=torch.float64) for heads in (4, 2, 2))
    everything = torch.ones(1, 4, 50, dtype=torch.bool)
    parts = (query, key, value, everything, torch.ones(1, 50, dtype=torch.bool), 0)
    sizes: dict[str, Any] = {"sink_size": 2, "window_size": 5, "scale": 0.3}
    whole = dense_attention(*parts, **sizes)
    monkeypatch.setattr(patchattn.testing.dense, "_SCORES_PER_SLAB", 7 * 4 * 50)
    slabs = dense_attention(*parts, **sizes)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    for got in (whole, slabs):
        torch.testing.assert_close(got.output, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slabs.bulk_log_mass, whole.bulk_log_mass, rtol=1e-12, atol=1e-12)


def test_the_budget_is_exact() -> None:
    truth = torch.tensor([4.0], dtype=torch.float64)
    plain = truth.float() * (1 + 1e-6)
    budget = 2 * (float(plain.double() - truth) + torch.finfo(torch.float32).eps * 4)
    assert_within_budget((truth + 0.9 * budget).float(), plain, truth)
    for wrong in (truth + 1.2 * budget, truth * torch.nan, truth * torch.inf):
        with pytest.raises(AssertionError):
            assert_within_budget(wrong.float(), plain, truth)


def test_only_the_strategies_need_hypothesis() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
import patchattn.testing
try:
    import patchattn.testing.strategies
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "pip install hypothesis" in result.stdout


def test_a_copy_proves_the_same() -> None:
    model = tiny_model("llama")
    results = [assert_equivalent(twin, policy(), padded()) for twin in (model, copy.deepcopy(model))]
    assert results[0] == results[1]
