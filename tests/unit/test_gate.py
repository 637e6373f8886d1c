"""The head gate: every kind, the direction of the threshold, and what opens in doubt."""

import math
from dataclasses import replace

import pytest
import torch

from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, ShapeError, StaticGate
from patchattn.backends.reference import attend
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores, masked_log_mass
from patchattn.call.regions import Regions
from patchattn.gates.base import Known
from patchattn.gates.decision import decide, forced
from patchattn.gates.moment import with_offsets


def make_inputs(length=400, softcap=None, sinks=False, pads=(0, 50), dtype=torch.float64, sink_size=4, window_size=32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    valid = torch.stack([torch.arange(length) >= pad for pad in pads])
    regions = Regions.of(valid, query_length=length, sink_size=sink_size, window_size=window_size)
    batch = len(pads)
    return AttentionInputs(
        2 * normal(batch, 6, length, 16),
        normal(batch, 2, length, 16),
        normal(batch, 2, length, 8),
        regions,
        0.25,
        softcap,
        normal(6) if sinks else None,
    )


def opened(gate, inputs):
    mass, _ = gate.weigh(inputs, Known(layer=1))
    return attend(inputs, mass, gate.margin).open


def test_open_closed_and_static_gates_do_as_they_say():
    inputs = make_inputs()
    asked = inputs.regions.asked[:, None].expand(-1, 6, -1)
    assert torch.equal(opened(OpenGate(), inputs), asked)
    assert not opened(ClosedGate(), inputs).any()
    got = opened(StaticGate(open_heads=((0, 1), (1, 4))), inputs)
    assert torch.equal(got[:, 4], asked[:, 4])
    assert not got[:, [0, 1, 2, 3, 5]].any()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_oracle_closes_exactly_where_the_local_share_reaches_the_threshold(softcap, sinks):
    inputs = make_inputs(softcap=softcap, sinks=sinks)
    scores = attention_scores(inputs)
    local = masked_log_mass(scores, inputs.regions.local_mask()[:, None], inputs.sink_logits).exp()
    bulk = masked_log_mass(scores, inputs.regions.bulk_mask()[:, None], None).exp()
    share = local / (local + bulk)
    got = opened(OracleGate(threshold=0.4), inputs)
    want = inputs.regions.asked[:, None] & (share < 0.4)
    assert torch.equal(got, want)
    assert got.any()
    assert not got[inputs.regions.asked[:, None].expand_as(got)].all()


def test_the_margin_is_the_logit_of_the_share():
    assert MomentGate(threshold=0.5).margin == pytest.approx(0.0)
    assert OracleGate(threshold=0.9).margin == pytest.approx(math.log(9))
    assert OpenGate().margin == 0.0


def test_queries_below_break_even_open_without_asking():
    inputs = make_inputs(pads=(0, 0))
    inputs = replace(inputs, regions=replace(inputs.regions, break_even=100))
    n_bulk = inputs.regions.n_bulk[:, None].expand(-1, 6, -1)
    assert not opened(ClosedGate(), inputs).any()
    assert torch.equal(opened(OpenGate(), inputs), n_bulk >= 100)
    below = (n_bulk > 0) & (n_bulk < 100)
    want = attend(make_inputs(pads=(0, 0)), forced(below, inputs), 0.0).output
    got = attend(inputs, forced(torch.zeros_like(below), inputs), 0.0).output
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("local", "bulk", "opens"),
    [
        (0.0, -1.0, False),
        (0.0, 1.0, True),
        (torch.nan, 0.0, True),
        (0.0, torch.nan, True),
        (torch.inf, 0.0, True),
        (-torch.inf, 0.0, True),
        (torch.inf, torch.inf, True),
        (torch.nan, -torch.inf, False),
        (torch.inf, -torch.inf, False),
        (0.0, -torch.inf, False),
    ],
)
def test_a_margin_that_is_not_finite_opens_unless_closed_for_certain(local: float, bulk: float, opens: bool):
    masses = (torch.tensor(mass).view(1, 1, 1) for mass in (local, bulk))
    assert decide(*masses, torch.tensor([[True]]), 0.0).item() is opens


def test_groups_open_as_a_whole_in_decode_but_for_heads_that_are_closed_for_certain():
    # One query, two KV heads of three query heads: open, closed, closed for certain; closed, closed, closed.
    bulk = torch.tensor([5.0, -5.0, -torch.inf, -5.0, -5.0, torch.finfo(torch.float32).min]).view(1, 6, 1)
    asked, local = torch.tensor([[True]]), torch.zeros(1, 6, 1)
    assert decide(local, bulk, asked, 0.0).flatten().tolist() == [True, False, False, False, False, False]
    assert decide(local, bulk, asked, 0.0, 2).flatten().tolist() == [True, True, False, False, False, False]
    assert not decide(local, bulk, ~asked, 0.0, 2).any()
    # NaN opens its group, and a head that is never worth it opens with its group.
    bulk[0, 3, 0] = torch.nan
    assert decide(local, bulk, asked, 0.0, 2).flatten().tolist()[3:] == [True, True, True]
    never = with_offsets(torch.tensor([[[3.0], [torch.inf]]]), torch.tensor([[-torch.inf], [-torch.inf]]))
    assert never.isfinite().all()
    assert not decide(torch.zeros(1, 2, 1), never, asked, 0.0).any()
    inputs = replace(make_inputs(), whole_groups=True)
    assert inputs.opens_groups is None


def test_replaying_decisions_gives_the_same_output():
    inputs = make_inputs(sinks=True)
    gate = MomentGate(threshold=0.4)
    first = attend(inputs, gate.weigh(inputs, Known())[0], gate.margin)
    again = attend(inputs, forced(first.open, inputs), 0.0)
    assert torch.equal(first.open, again.open)
    assert torch.equal(first.output, again.output)
    assert 0 < first.open.sum() < inputs.regions.asked.sum() * 6


def test_rows_without_keys_are_zero_and_open_equals_scaled_dot_product_attention():
    inputs = make_inputs()
    out = attend(inputs, forced(torch.ones(2, 6, 400, dtype=torch.bool), inputs), 0.0).output
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=inputs.regions.causal_mask()[:, None],
        scale=0.25,
        enable_gqa=True,
    )
    torch.testing.assert_close(out[0], want[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out[1, :, 50:], want[1, :, 50:], rtol=1e-11, atol=1e-11)
    assert (out[1, :, :50] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.zeros(2, 5, 400, 16)},
        {"query": torch.zeros(2, 6, 400, 8)},
        {"query": torch.zeros(2, 6, 399, 16)},
        {"query": torch.zeros(2, 6, 400, 16, dtype=torch.float32)},
        {"key": torch.zeros(1, 2, 400, 16)},
        {"value": torch.zeros(2, 2, 399, 8)},
        {"key": torch.zeros(2, 400, 16)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(change):
    good = make_inputs()
    parts = {"query": good.query, "key": good.key, "value": good.value}
    parts |= {
        name: tensor if tensor.dtype == torch.float32 and name == "query" else tensor.double()
        for name, tensor in change.items()
    }
    if "query" in change and change["query"].shape == (2, 6, 400, 16):
        parts["query"] = change["query"]
    with pytest.raises(ShapeError):
        AttentionInputs(parts["query"], parts["key"], parts["value"], good.regions, 0.25)
