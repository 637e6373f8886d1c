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
from patchattn.measuring.values import Valuing, values_of
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
    [
        pytest.param("llama", 1, 4, 12, marks=pytest.mark.slow),
        pytest.param("llama", 0, 1, 15, marks=pytest.mark.slow),
        pytest.param("llama", 2, 0, 20, marks=pytest.mark.slow),
        pytest.param("gemma2", 1, 2, 14, marks=pytest.mark.slow),
        ("gpt_oss", 2, 3, 16),
    ],
)
def test_a_price_is_the_second_order_divergence_of_closing_the_pair(family, layer, head, query):
    model = tiny_model(family, dtype=torch.float64)
    ids = ids_of()
    step = 1e-3
    # KL is step^2 times the price for a small step, and the third order is taken away by going both ways.
    expected = sum(divergence(model, ids, layer, head, query, sign * step) for sign in (1, -1)) / (2 * step**2)
    drawn_prices = torch.stack([prices(model, (layer,), ids, seed)[layer][0, head, query] for seed in range(300)])
    error = float(drawn_prices.std() / math.sqrt(len(drawn_prices)))
    assert expected > 0
    assert abs(float(drawn_prices.mean()) - expected) < 4 * error
    assert error < 0.25 * expected


class Recorder:
    """In place of a probe: margins that are drawn, and what comes of the pairs."""

    def __init__(self, heads, length):
        generator = torch.Generator().manual_seed(0)
        self.drawn = torch.randn(3, 1, heads, length, generator=generator, dtype=torch.float64)
        self.slopes = {}

    def margin(self, tensors, layer, inputs, hidden, local):
        return self.drawn[layer]

    def add_slopes(self, layer, margin, slope):
        self.slopes[layer] = slope


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_slope_is_that_of_the_divergence_along_a_pair(family):
    model = tiny_model(family, dtype=torch.float64)
    layers, ids = check_support(model).layers, ids_of(40)
    recorder = Recorder(6, len(ids))
    Valuing(model, layers, LOCAL, recorder, {}, torch.zeros(len(layers), 6)).value(ids)
    first = sum(LOCAL)

    def divergence(layer, head, query, step):
        from patchattn.backends.reference import attend

        def gated(at, inputs, dense):
            bulk = torch.where(recorder.drawn[at] >= 0, -math.inf, math.inf)
            closed, found = (attend(inputs, mass, 0.0).output for mass in (torch.full_like(bulk, -math.inf), bulk))
            if at == layer:
                found[0, head, query] += step * (closed - dense().output)[0, head, query]
            return Attended(found, inputs.regions.asked[:, None].expand(found.shape[:3]), torch.tensor(0))

        with torch.no_grad():
            wanted = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            with seen_by(gated, model, layers, local=LOCAL):
                other = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        return float((wanted.exp() * (wanted - other)).sum(-1).mean())

    for layer, head, query in [(layers[0], 1, 15), (layers[0], 4, 30), (layers[-1], 0, 20), (layers[-1], 5, 33)]:
        # Norms compute in float32, so that a smaller step says less.
        up, down = (divergence(layer, head, query, sign * 1e-2) for sign in (1, -1))
        slope = float(recorder.slopes[layer][head, query - first])
        assert slope == pytest.approx((up - down) / 2e-2, rel=0.01, abs=5e-6)


def test_values_are_slopes_and_half_of_the_curvature():
    # Three pairs of one head, which move the log-probabilities together: KL = (sum of x over closed pairs)^2 / 2.
    x = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    # Rungs close all three, the first two, the first, none; the gated model closes two.
    closed = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.float64)
    price, slope = closed @ (x.square() / 2), closed @ (x * (x[0] + x[1]))
    found = values_of(price[None, None], slope[None, None], torch.tensor([[1]]))[0, 0]

    def kl(pairs):
        return (closed[pairs] @ x).square() / 2

    # Single steps from the gated model are exact: closing the third pair, or opening the second or the first.
    torch.testing.assert_close(found[0] - found[1], kl(0) - kl(1))
    torch.testing.assert_close(found[1] - found[2], kl(1) - kl(2))
    torch.testing.assert_close(found[2] - found[3], kl(1) - x[1].square() / 2)
    assert found[3] == 0


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
