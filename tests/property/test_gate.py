"""What holds for every gate: masses add up, thresholds are monotone, and closing moves the output within its bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from patchattn import MomentGate, OracleGate
from patchattn.backends.reference import attend
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores, exact_masses, masked_log_mass
from patchattn.gates.base import Known
from patchattn.gates.decision import decide, forced, is_open
from patchattn.testing.strategies import FINITE_KEYS, attention_inputs, gates, shapes

SOME = settings(max_examples=max(1, settings().max_examples // 2))
calls = attention_inputs(shape=shapes(max_keys=300))
finite_calls = attention_inputs(shape=shapes(max_keys=300), key_kinds=FINITE_KEYS)


def decided(inputs: AttentionInputs, gate: Any) -> torch.Tensor:
    return attend(inputs, gate.weigh(inputs, Known())[0], gate.margin).open


@given(finite_calls)
@SOME
def test_log_masses_of_sink_window_and_bulk_add_up_to_the_full_log_sum_exp(inputs: AttentionInputs) -> None:
    scores, regions = attention_scores(inputs), inputs.regions
    whole = masked_log_mass(scores, regions.causal_mask()[:, None], inputs.sink_logits)
    bulk = exact_masses(inputs)[0].bulk
    local = masked_log_mass(scores, regions.local_mask()[:, None], inputs.sink_logits)
    # The window is what is local without a sink; the sink is what is left of the local keys.
    window_mask = replace(regions, sink_size=0).local_mask()
    window = masked_log_mass(scores, window_mask[:, None], None)
    sink = masked_log_mass(scores, (regions.local_mask() & ~window_mask)[:, None], inputs.sink_logits)
    for parts in ([local, bulk], [sink, window, bulk]):
        torch.testing.assert_close(torch.stack(parts).logsumexp(0), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [MomentGate, OracleGate])
@given(calls, st.lists(st.floats(1e-9, 1 - 1e-9), min_size=2, max_size=2, unique=True).map(sorted), st.data())
@SOME
def test_a_higher_threshold_never_closes_a_pair(
    make: Any, inputs: AttentionInputs, shares: list[float], data: st.DataObject
) -> None:
    estimate: dict[str, Any] = {}
    if make is MomentGate:
        estimate["estimate"] = data.draw(st.sampled_from(["guarded", "saturating", "lognormal"]))
    low, high = (decided(inputs, make(threshold=share, **estimate)) for share in shares)
    assert not (low & ~high).any()
    event("more open" if (high & ~low).any() else "all open" if low.any() else "all closed")


@given(calls, gates(layers=1, heads=1))
@SOME
def test_only_pairs_that_were_asked_open(inputs: AttentionInputs, gate: Any) -> None:
    opened = decided(inputs, gate)
    assert not (opened & ~inputs.regions.asked[:, None]).any()


@given(st.lists(st.tuples(*[st.sampled_from([-math.inf, -1.0, 0.0, 2.0, math.inf, math.nan])] * 2), min_size=1))
def test_doubt_opens(masses: list[tuple[float, float]]) -> None:
    local, bulk = (torch.tensor(column)[None, None] for column in zip(*masses, strict=True))
    asked = torch.ones(1, len(masses), dtype=torch.bool)
    opened = decide(local, bulk, asked, 0.0)
    certain = bulk == -math.inf
    assert not opened[certain].any()
    assert opened[~certain & ~(local - bulk).isfinite()].all()
    assert not decide(local, bulk, ~asked, 0.0).any()


@given(finite_calls)
@SOME
def test_closing_moves_the_output_by_at_most_twice_the_missed_share(inputs: AttentionInputs) -> None:
    everything = torch.ones(inputs.query.shape[:3], dtype=torch.bool)
    scores, regions = attention_scores(inputs), inputs.regions
    assume(regions.asked.any())
    dense, local = (attend(inputs, forced(opened, inputs), 0.0).output for opened in (everything, ~everything))
    # Without local keys at all, nothing is left to be close to.
    judged = (regions.asked & regions.local_mask().any(-1))[:, None].expand_as(everything)
    bulk_mass = exact_masses(inputs)[0].bulk
    missed = (bulk_mass - masked_log_mass(scores, regions.causal_mask()[:, None], inputs.sink_logits)).exp()
    weights = (scores.masked_fill(~regions.bulk_mask()[:, None], -torch.inf) - bulk_mass[..., None]).exp()
    value = inputs.value.repeat_interleave(inputs.group_size, dim=1)
    bulk = torch.where(bulk_mass.isfinite()[..., None], weights @ value, 0)
    moved = (dense - local).norm(dim=-1)
    largest = value.norm(dim=-1).amax()
    tight = missed * (bulk.norm(dim=-1) + local.norm(dim=-1))
    assert (moved <= tight + 1e-9 * largest)[judged].all()
    assert (tight <= 2 * missed * largest * (1 + 1e-9))[judged].all()
    event(f"share missed up to {10 * math.ceil(10 * float(missed[judged].max())) if judged.any() else 0}%")


MASSES = st.floats(width=32) | st.sampled_from([math.inf, -math.inf, math.nan, 0.0])


@given(MASSES, MASSES, st.sampled_from([0.0, 1.5, -3.0]))
def test_one_pair_is_decided_as_many_are(local: float, bulk: float, threshold: float) -> None:
    # Away from the border, where float32 rounds the difference.
    assume(not math.isfinite(local - bulk) or abs(local - bulk - threshold) > 1e-3 * (1 + abs(local)))
    masses = (torch.tensor([[[mass]]]) for mass in (local, bulk))
    many = decide(*masses, torch.tensor([[True]]), threshold)
    assert many.item() is is_open(local, bulk, threshold)
