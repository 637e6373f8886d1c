"""Tests of `patchattn.call.masses`: exact masses in slabs are those of the masks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from patchattn.backends import reference
from patchattn.call import masses, with_graph
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions


def call(padding: str, queries: int, softcap: float | None, *, sinks: bool) -> AttentionInputs:
    torch.manual_seed(0)
    keys = 150
    valid = torch.ones(2, keys, dtype=torch.bool)
    if padding != "none":
        valid[1, :21] = False
    if padding == "holes":
        valid[0, 40:47] = valid[1, 90:93] = False
    regions = Regions.of(valid, query_length=queries, sink_size=3, window_size=20)
    query, key, value = (torch.randn(2, heads, n, 8).double() for heads, n in ((4, queries), (2, keys), (2, keys)))
    return AttentionInputs(query, key, value, regions, 0.7, softcap, torch.randn(4) if sinks else None)


@pytest.mark.parametrize("rows", [1 << 8, 1 << 20])
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("padding", ["none", "before", "holes"])
@pytest.mark.parametrize(
    ("queries", "softcap", "sinks"), [(150, None, False), (150, 2.0, True), (50, None, True), (1, None, False)]
)
def test_exact_masses_and_attention_are_those_of_the_masks(
    rows, looks, padding, queries, softcap, sinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masses, "_SCORES_PER_SLAB_ON_HOST", rows)
    monkeypatch.setattr(masses, "host_may_read", lambda _: looks)
    inputs = call(padding, queries, softcap, sinks=sinks)
    scores = masses.attention_scores(inputs)
    for window, found in zip((1, 20, 60), masses.exact_masses(inputs, (1, 20, 60)), strict=True):
        regions = replace(inputs.regions, window_size=window)
        local, bulk = regions.local_mask()[:, None], regions.bulk_mask()[:, None]
        torch.testing.assert_close(found.local, masses.masked_log_mass(scores, local, inputs.sink_logits))
        torch.testing.assert_close(found.bulk, masses.masked_log_mass(scores, bulk, None))
        torch.testing.assert_close(found.largest_bulk, scores.masked_fill(~bulk, -torch.inf).amax(-1))
    own = masses.exact_masses(inputs)[0]
    output, local, bulk = masses.exact_attention(inputs)
    torch.testing.assert_close(local, own.local)
    torch.testing.assert_close(bulk, own.bulk)
    seen = inputs.regions.causal_mask()[:, None]
    whole = masses.masked_log_mass(scores, seen, inputs.sink_logits)[..., None]
    weights = (scores.masked_fill(~seen, -torch.inf) - whole).exp().nan_to_num(0)
    expected = (weights.unflatten(1, (2, 2)) @ inputs.value[:, :, None]).flatten(1, 2)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, False), (None, True)])
def test_attention_with_a_graph_is_attention_and_has_its_gradient(softcap, sinks, monkeypatch) -> None:
    # Several parts.
    monkeypatch.setattr(with_graph, "_ROWS", 7)
    generator, length = torch.Generator().manual_seed(0), 40

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    regions = Regions.of(torch.ones(1, length), query_length=length, sink_size=3, window_size=9)
    given = [normal(1, heads, length, 8).requires_grad_() for heads in (6, 2, 2)]
    inputs = AttentionInputs(*given, regions, 0.3, softcap, normal(6) if sinks else None)
    weight = normal(1, 6, length, 8)
    for attend, mass in ((with_graph.dense_with_graph, math.inf), (with_graph.local_with_graph, -math.inf)):
        expected = reference.attend(inputs, torch.full((1, 6, length), mass, dtype=torch.float64), 0.0).output
        found = attend(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        of_found, of_expected = (torch.autograd.grad((x * weight).sum(), given) for x in (found, expected))
        for one, other in zip(of_found, of_expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
