"""Tests of `patchattn.hf.observe`."""

from __future__ import annotations

import torch

from patchattn import MomentGate, Policy, patch
from patchattn.hf.observe import observing
from patchattn.testing.models import tiny_model

POLICY = Policy(sink_size=4, window_size=16, min_bulk=0, gate=MomentGate(threshold=0.6))


@torch.no_grad()
def test_observers_see_every_gated_call_may_answer_it_and_go() -> None:
    model = tiny_model("llama")
    tokens = torch.randint(3, 60, (1, 200))
    with patch(model, POLICY) as handle:
        plain = model(tokens).logits
        seen: list[tuple[str, int]] = []

        def watch(layer, inputs, attend):
            seen.append(("inner", layer))
            assert inputs.query.shape[2] == 200
            return attend()

        def zero(layer, inputs, attend):
            seen.append(("outer", layer))
            attended = attend()
            attended.output.zero_()
            return attended

        with observing(handle, watch):
            assert torch.equal(model(tokens).logits, plain)
            with observing(handle, zero):
                assert not torch.equal(model(tokens).logits, plain)
            assert torch.equal(model(tokens).logits, plain)
        layers = list(handle.states)
        assert seen[: len(layers)] == [("inner", layer) for layer in layers]
        assert seen[len(layers) :][: 2 * len(layers)] == [
            (which, layer) for layer in layers for which in ("outer", "inner")
        ]
        count = len(seen)
        model(tokens)
        assert len(seen) == count
