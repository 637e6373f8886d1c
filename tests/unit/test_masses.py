"""Tests of `patchattn.call.masses`: exact masses in slabs are those of the masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patchattn.call import masses
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
