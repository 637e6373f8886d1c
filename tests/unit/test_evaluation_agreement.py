import math

import pytest
import torch

from patchattn import ClosedGate, OpenGate, Policy, demo, patch
from patchattn.evaluation.agreement import Agreement, Predictions
from patchattn.evaluation.loss import losses_and_logits

DENSE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
OTHER = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)


def test_by_hand():
    found = Predictions.of(DENSE.log()).agreement(OTHER.log())
    assert (found.tokens, found.agreed, found.top1) == (2, 1, 0.5)
    # 0.5 log(0.5 / 0.25) + 0.25 log(0.25 / 0.5) + 0 for the first token, nothing for the second.
    assert found.kl == pytest.approx(0.25 * math.log(2) / 2, abs=1e-3)


def test_half_precision_adds_next_to_nothing():
    logits = 3 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    other = logits + 0.05 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(1))
    dense = logits.double().log_softmax(-1)
    exact = (dense.exp() * (dense - other.double().log_softmax(-1))).sum(-1).mean().item()
    kept = Predictions.of(logits)
    assert kept.agreement(other).kl == pytest.approx(exact, rel=0.02)
    assert 0 <= kept.agreement(logits).kl < 1e-6


def test_impossible_tokens_add_nothing():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert Predictions.of(logits).agreement(torch.tensor([[0.0, 0.0, -5.0]])).kl == pytest.approx(
        math.log(1 + math.exp(-5) / 2), abs=1e-4
    )


def test_what_is_not_finite_is_not_hidden():
    assert not math.isfinite(Predictions.of(torch.zeros(1, 3)).agreement(torch.full((1, 3), math.nan)).kl)


def test_agreements_add_up_and_know_nothing_of_nothing():
    both = Agreement(4, 3, 0.5) + Agreement(6, 6, 0.1)
    assert (both.tokens, both.top1, both.kl) == (10, 0.9, pytest.approx(0.06))
    assert math.isnan(Agreement().top1)
    assert math.isnan(Agreement().kl)


def test_a_model_against_itself_and_under_a_policy(monkeypatch):
    model, tokenizer = demo.load()
    tokens = tokenizer(demo.sample_text()[:2000])["input_ids"][:500]
    after = range(100, 499, 3)
    dense = Predictions.of(losses_and_logits(model, tokens, after)[1])
    # Read in several calls, positions fall into different ones.
    monkeypatch.setattr("patchattn.evaluation.loss._MOST_LOGITS", 1)

    def found() -> Agreement:
        return dense.agreement(losses_and_logits(model, tokens, after)[1])

    same = found()
    with patch(model, Policy(window_size=32, min_bulk=0, gate=OpenGate())):
        opened = found()
    with patch(model, Policy(window_size=32, min_bulk=0, gate=ClosedGate())):
        closed = found()
    assert same.tokens == opened.tokens == closed.tokens == len(after)
    assert same.top1 > 0.97
    assert same.kl < 1e-3
    assert opened.kl < 1e-3 < closed.kl
    assert closed.top1 < opened.top1
