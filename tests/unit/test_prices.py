"""Prices of pairs, against the divergence that closing them brings."""

from __future__ import annotations

import math

import pytest
import torch

from patchattn import check_support
from patchattn.call.inputs import Attended
from patchattn.errors import CalibrationError
from patchattn.measuring.prices import Pricing, drawn
from patchattn.measuring.reading import seen_by
from patchattn.testing import tiny_model
from patchattn.testing.models import FAMILIES, HYBRID_FAMILIES

LOCAL = (2, 8)
TOKENS = 24


def ids_of(length: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 127, (length,), generator=torch.Generator().manual_seed(seed))


def prices(model, layers, ids, seed=0, local=LOCAL):
    found = []
    Pricing(model, layers, local, lambda layer, priced: found.append((layer, priced.cost))).price(ids, seed)
    # Each once, the last layer first.
    assert [layer for layer, _ in found] == sorted(layers, reverse=True)
    return dict(found)


def divergence(model, ids, layer, head, query, step):
    """KL in nats, summed over tokens, of moving one pair's output by a part of what closing it would change."""
    from patchattn.backends.reference import attend

    def moved(at, inputs, dense):
        output = dense().output
        if at == layer:
            closed = attend(inputs, torch.full(inputs.query.shape[:3], -math.inf, dtype=torch.float64), 0.0).output
            output = output.clone()
            output[0, head, query] += step * (closed - output)[0, head, query]
        return Attended(output, inputs.regions.asked[:, None].expand(inputs.query.shape[:3]), torch.tensor(0))

    with torch.no_grad():
        dense = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        with seen_by(moved, model, check_support(model).layers, local=LOCAL):
            other = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return float((dense.exp() * (dense - other)).sum())


@pytest.mark.parametrize(
    ("family", "layer", "head", "query"),
    [("llama", 0, 1, 15), ("llama", 1, 4, 12), ("llama", 2, 0, 20), ("gemma2", 1, 2, 14), ("gpt_oss", 2, 3, 16)],
)
def test_a_price_is_the_second_order_divergence_of_closing_the_pair(family, layer, head, query):
    model = tiny_model(family, dtype=torch.float64)
    ids = ids_of()
    step = 1e-3
    # KL is step^2 times the price for a small step, and the third order is taken away by going both ways.
    expected = sum(divergence(model, ids, layer, head, query, sign * step) for sign in (1, -1)) / (2 * step**2)
    layers = check_support(model).layers
    drawn_prices = torch.stack([prices(model, layers, ids, seed)[layer][0, head, query] for seed in range(300)])
    error = float(drawn_prices.std() / math.sqrt(len(drawn_prices)))
    assert expected > 0
    assert abs(float(drawn_prices.mean()) - expected) < 4 * error
    assert error < 0.25 * expected


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID_FAMILIES])
def test_every_family_can_be_priced_and_is_left_as_it_was(family):
    model = tiny_model(family)
    layers, ids = check_support(model).layers, ids_of(120)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    before = model(input_ids=ids[None]).logits
    found = prices(model, layers, ids, local=(4, 32))
    assert set(found) == set(layers)
    for cost in found.values():
        assert cost.shape[0] == 1
        assert cost.shape[2] == 120
        assert (cost >= 0).all()
        assert not cost[..., :36].any()
        assert cost[..., 36:].any()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert torch.equal(model(input_ids=ids[None]).logits, before)


def test_the_same_seed_gives_the_same_prices_and_another_gives_others():
    model, ids = tiny_model("llama"), ids_of(120)
    one, same, other = (prices(model, (1,), ids, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_checkpoints_do_not_change_prices(monkeypatch):
    from patchattn.measuring import prices as module

    model, ids = tiny_model("gemma2", dtype=torch.float64), ids_of(120)
    checkpointed = prices(model, (1, 2), ids)
    monkeypatch.setattr(module, "_layers_around", lambda _: [])
    plain = prices(model, (1, 2), ids)
    for layer, cost in plain.items():
        torch.testing.assert_close(checkpointed[layer], cost, rtol=1e-9, atol=0)


def test_labels_are_drawn_from_the_prediction():
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]]).expand(4000, 3)
    labels = drawn(logits, torch.Generator().manual_seed(0))
    assert not (labels == 2).any()
    assert abs(float((labels == 1).double().mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)


def test_a_model_that_cannot_run_backward_is_refused_with_the_reason():
    model = tiny_model("llama")

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("packed weights have no gradient")

    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, output: Opaque.apply(output))
    with pytest.raises(CalibrationError, match=r"can't run backward.*packed weights have no gradient"):
        prices(model, (0, 1, 2), ids_of(60))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda _module, _args, output: output * math.inf)
    with pytest.raises(CalibrationError, match="not finite"):
        prices(model, (0, 1, 2), ids_of(60))
