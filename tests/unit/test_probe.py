"""The probe: sums over documents, what is fitted to them, and the prices by the margins that it gives."""

from __future__ import annotations

import math

import pytest
import torch

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import exact_attention
from patchattn.call.regions import Regions
from patchattn.measuring import probe as module
from patchattn.measuring.prices import Priced
from patchattn.measuring.probe import Probe, directions
from patchattn.measuring.statistics import MARGINS, Settings, Totals
from patchattn.moments.prompt import bulk_log_mass_from_prompt

HIDDEN, HEADS, LENGTH = 12, 4, 1200
KNOWN = slice(36 + 127, None)
SETTINGS = Settings((0,), HEADS, 2, 8, key_moments=False, oracle_margin=0.4)


def made_up(cost_of, seed: int = 0, *, length: int = LENGTH, spread: float = 1.0, scale: float = 0.3) -> Priced:
    """Prices that a function makes of hidden states, [query, hidden], and margins, [heads, query]."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, length, 8, generator=generator) for heads in (HEADS, 2, 2))
    regions = Regions.of(torch.ones(1, length), query_length=length, sink_size=4, window_size=32)
    inputs = AttentionInputs(query, key, value, regions, scale)
    hidden = spread * torch.randn(1, length, HIDDEN, generator=generator)
    _, local, _ = exact_attention(inputs)
    margin = bulk_log_mass_from_prompt(inputs, estimate="lognormal")[0] - local
    cost = torch.where(regions.asked[:, None], cost_of(hidden[0].double(), margin[0].double()), 0)
    return Priced(inputs, hidden, local, cost)


PLANTED = torch.randn(HEADS, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def planted(hidden, margin):
    # A slope of each head's own.
    slopes = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)[:, None]
    return (slopes * margin.nan_to_num() + PLANTED @ hidden.T - 4).exp()


def fitted(documents, estimate="lognormal"):
    probe = Probe(Totals(SETTINGS), HIDDEN, estimate)
    for priced in documents:
        probe.fit_to(0, priced)
    return probe


def test_a_planted_log_price_is_found_and_margins_are_put_on_the_grid() -> None:
    documents = [made_up(planted, seed) for seed in range(8)]
    probe = fitted(documents)
    tensors = probe.tensors(probe._totals.sums)
    slopes = torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None]
    torch.testing.assert_close(tensors["probe"][0].float(), (PLANTED / slopes).float(), rtol=0.05, atol=0.05)
    margins = []
    for priced in documents:
        mass = bulk_log_mass_from_prompt(priced.inputs, estimate="lognormal")[0][0]
        said = tensors["probe"][0].float() @ priced.hidden[0].T + tensors["probe_offset"][0][:, None]
        margins.append((priced.local[0] - mass - said)[:, KNOWN])
    margin = torch.stack(margins)
    on_grid = margin / tensors["probe_scale"][0][:, None]
    for of_heads in (on_grid.mean((0, 2)), on_grid.std((0, 2))):
        torch.testing.assert_close(of_heads, torch.full((HEADS,), 3.0), rtol=0, atol=1e-2)
    # The margin orders the pairs of a head by their price.
    cost = torch.stack([priced.cost[0, :, KNOWN] for priced in documents]).float()
    for head in range(HEADS):
        both = torch.stack([margin[:, head].flatten(), cost[:, head].log().flatten()])
        assert torch.corrcoef(both)[0, 1] < -0.99


def test_sums_of_two_processes_and_of_documents_in_any_order_are_those_of_all() -> None:
    documents = [made_up(planted, seed, length=400) for seed in range(4)]
    whole, tensors = fitted(documents), None
    parts = [fitted(documents[:1]), fitted(documents[:0:-1])]
    for probe in (whole, *parts):
        tensors = whole.tensors(whole._totals.sums) if tensors is None else tensors
        for priced in {whole: documents, parts[0]: documents[2:], parts[1]: documents[:2]}[probe]:
            probe.price_with(tensors, 0, priced)
    for name, want in whole._totals.sums.items():
        got = parts[0]._totals.sums[name] + parts[1]._totals.sums[name]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)
    added = {name: sum(part._totals.sums[name] for part in parts) for name in whole._totals.sums}
    for name, want in tensors.items():
        torch.testing.assert_close(whole.tensors(added)[name], want, msg=name)


def test_prices_are_means_over_tokens_of_what_each_rung_closes() -> None:
    priced = made_up(planted, length=400)
    probe = fitted([made_up(planted, 1)])
    tensors = probe.tensors(probe._totals.sums)
    probe.price_with(tensors, 0, priced)
    mass = bulk_log_mass_from_prompt(priced.inputs, estimate="lognormal")[0][0]
    said = tensors["probe"][0].float() @ priced.hidden[0].T + tensors["probe_offset"][0][:, None]
    margin, n_asked = (priced.local[0] - mass - said) / tensors["probe_scale"][0][:, None], 400 - 36
    for rung, threshold in ((0, -math.inf), (20, MARGINS[19]), (40, MARGINS[39]), (len(MARGINS) + 1, math.inf)):
        closed = margin >= threshold
        closed[:, 36:] |= rung == 0
        closed[:, :36] = False
        want = torch.where(closed, priced.cost[0], 0).sum(-1) / 400
        got = probe._totals.sums["price"][0, :, rung]
        if 0 < rung <= len(MARGINS):
            # Rounding may move a pair over a rung.
            torch.testing.assert_close(got, want, rtol=0.02, atol=1e-9)
        else:
            torch.testing.assert_close(got, want)
        opened = 1 - closed.sum(-1).double() / n_asked
        torch.testing.assert_close(probe._totals.sums["priced_open_fraction"][0, :, rung], opened, rtol=0, atol=3e-3)


def test_a_head_whose_price_does_not_depend_on_the_margin_is_probed_all_the_same() -> None:
    documents = [made_up(lambda hidden, margin: (PLANTED @ hidden.T - 4).exp(), seed) for seed in range(4)]
    probe = fitted(documents)
    tensors = probe.tensors(probe._totals.sums)
    found = tensors["probe"][0].double() * module._LEAST_SLOPE
    torch.testing.assert_close(found, PLANTED, rtol=0.05, atol=0.05)
    # Margins then spread twenty times as far as prices, and still the grid parts nearly all of them.
    assert (tensors["probe_scale"] > 10).all()
    probe.price_with(tensors, 0, documents[0])
    opened = probe._totals.sums["priced_open_fraction"][0]
    # Before the first chunk of keys is full, all are open.
    assert (opened[:, 1] < 127 / (LENGTH - 36) + 0.01).all()
    assert (opened[:, -2] > 0.99).all()


def test_features_that_never_change_and_prices_that_never_are_do_no_harm() -> None:
    def of(cost, seed):
        priced = made_up(cost, seed)
        priced.hidden[..., 0], priced.hidden[..., 1] = 1000.0, 0.0
        return priced

    for cost in (planted, lambda hidden, margin: torch.zeros_like(margin)):
        probe = fitted([of(cost, seed) for seed in range(4)])
        tensors = probe.tensors(probe._totals.sums)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        probe.price_with(tensors, 0, of(cost, 5))
        margin = probe._totals.sums["priced_open_fraction"][0]
        assert ((margin > 0.1) & (margin < 0.9)).any(-1).all() or cost is not planted


def test_more_directions_than_a_probe_looks_at_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DIRECTIONS", 6)
    drawn = directions(HIDDEN)
    assert drawn.shape == (HIDDEN, 6)
    torch.testing.assert_close(drawn.T @ drawn, torch.eye(6))
    assert torch.equal(drawn, directions(HIDDEN))
    inside = (drawn.double() @ drawn.double().T @ PLANTED.T).T

    def price(hidden, margin):
        return (margin.nan_to_num() + inside @ hidden.T).exp()

    probe = fitted([made_up(price, seed) for seed in range(6)])
    tensors = probe.tensors(probe._totals.sums)
    torch.testing.assert_close(tensors["probe"][0].double(), inside, rtol=0.05, atol=0.05)


def test_a_layer_whose_pairs_are_all_unknown_is_left_to_the_margin() -> None:
    probe = fitted([made_up(planted, length=100)])
    tensors = probe.tensors(probe._totals.sums)
    assert not tensors["probe"].any()
    assert tensors["probe_offset"].isfinite().all()
    assert (tensors["probe_scale"] == module._LEAST_SCALE).all()
    probe.price_with(tensors, 0, made_up(planted, length=100))
    # Where nothing is known all but the last resort is open.
    assert probe._totals.sums["priced_open_fraction"][0, :, 0].eq(0).all()
    assert probe._totals.sums["priced_open_fraction"][0, :, 1:].eq(1).all()


def test_the_guarded_estimate_is_fitted_also_where_it_opens() -> None:
    documents = [made_up(planted, seed, scale=1.2) for seed in range(4)]
    mass = bulk_log_mass_from_prompt(documents[0].inputs, estimate="guarded")[0][0, :, KNOWN]
    assert mass.isfinite().all(0).float().mean() < 0.9
    found = []
    for estimate in ("guarded", "lognormal"):
        probe = fitted(documents, estimate)
        found.append(probe.tensors(probe._totals.sums))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    probe.price_with(found[0], 0, documents[0])


def test_hidden_states_that_are_very_small_leave_weights_finite() -> None:
    documents = [made_up(lambda hidden, m: planted(1e6 * hidden, m), seed, spread=1e-6) for seed in range(4)]
    probe = fitted(documents)
    tensors = probe.tensors(probe._totals.sums)
    assert tensors["probe"].isfinite().all()
    assert tensors["probe"].abs().max() > 1e4
