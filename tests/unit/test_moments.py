"""Moments by example: what they are and what they predict; the properties are in tests/property/test_moments.py."""

import math

import pytest
import torch
from transformers import DynamicCache

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.hf.cache import reach_query, store_moments
from patchattn.moments.gaussian import CHUNK, KeyMoments, log_mass_of_gaussian
from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt


def keys(n, dim=8, seed=0, mean=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return (torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + mean).to(dtype)


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a.count, b.count)
    torch.testing.assert_close(a.mean, b.mean, **tolerance)
    torch.testing.assert_close(a.covariance, b.covariance, **tolerance)


def test_moments_are_mean_and_population_covariance():
    x = keys(50, mean=3.0)
    moments = KeyMoments.of(x)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0))


def test_masked_keys_do_not_count_even_if_they_are_nan():
    x = keys(50)
    valid = torch.arange(50) % 3 > 0
    want = KeyMoments.of(x[valid])
    x[~valid] = torch.nan
    assert_same(KeyMoments.of(x, valid), want)


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_bfloat16_keys_with_a_large_mean_keep_their_covariance(mean):
    x = keys(4096, mean=mean, dtype=torch.bfloat16)
    merged = KeyMoments.of(x[:128])
    for part in x[128:].split(128):
        merged = merged.merge(KeyMoments.of(part))
    assert_same(
        KeyMoments(merged.count.double(), merged.mean.double(), merged.covariance.double()),
        KeyMoments.of(x.double()),
        rtol=1e-3,
        atol=1e-3,
    )


def test_log_mass_without_spread_is_exact():
    n, mean = torch.tensor([1, 10, 1000]), torch.tensor([0.5, -3.0, 40.0])
    for estimate in ("lognormal", "saturating", "guarded"):
        got = log_mass_of_gaussian(n, mean, torch.zeros(3), estimate=estimate)
        torch.testing.assert_close(got, n.log() + mean)


def test_both_estimates_agree_below_the_freezing_point_and_the_saturating_is_smaller_above():
    n = torch.tensor(100)
    critical = 2 * math.log(100)
    variance = torch.linspace(0, 4 * critical, 200, dtype=torch.float64)
    lognormal = log_mass_of_gaussian(n, torch.zeros_like(variance), variance, estimate="lognormal")
    saturating = log_mass_of_gaussian(n, torch.zeros_like(variance), variance, estimate="saturating")
    guarded = log_mass_of_gaussian(n, torch.zeros_like(variance), variance, estimate="guarded")
    below = variance <= critical
    torch.testing.assert_close(lognormal[below], saturating[below])
    assert torch.equal(guarded[below], saturating[below])
    assert (guarded[~below] == torch.inf).all()
    assert (saturating[~below] < lognormal[~below]).all()
    assert (saturating.diff() > 0).all()
    assert saturating.diff().max() < 0.3  # continuous at the freezing point


def test_the_saturating_estimate_is_near_the_mass_of_real_gaussian_draws():
    generator = torch.Generator().manual_seed(0)
    for spread in (0.5, 2.0, 6.0):
        draws = spread * torch.randn(400, 1000, generator=generator, dtype=torch.float64)
        truth = draws.logsumexp(1).mean()
        got = log_mass_of_gaussian(
            torch.tensor(1000), torch.zeros(1).double(), torch.full((1,), spread**2).double(), estimate="saturating"
        )
        assert abs(got.item() - truth.item()) < 0.15 * max(spread, 1.0) * math.log(1000) ** 0.5


def test_no_keys_have_no_mass_and_bad_moments_give_nan():
    zero = torch.zeros(1)
    assert log_mass_of_gaussian(torch.tensor([0]), zero, zero).item() == -math.inf
    assert log_mass_of_gaussian(torch.tensor([5]), zero + torch.nan, zero).isnan().all()


def test_softcap_bounds_the_mean_and_shrinks_the_spread():
    n, mean, variance = torch.tensor(10), torch.tensor([50.0]), torch.tensor([4.0])
    assert log_mass_of_gaussian(n, mean, variance, softcap=5.0).item() == pytest.approx(5 + math.log(10), abs=1e-3)


def problem(batch=2, heads=4, kv_heads=2, length=700, dim=16, pads=(0, 77), seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, length, dim, generator=generator, dtype=torch.float64) * 1.5 + 3
    valid = torch.stack([torch.arange(length) >= pad for pad in pads])
    return query, key, valid


def by_definition(query, key, valid, sink, window, b, slot, estimate):
    """The estimate at one query, from the definition: the first full chunks of bulk keys, counted one by one."""
    kv_heads, dim = key.shape[1], key.shape[3]
    first = int(valid[b].nonzero()[0])
    n_bulk = slot - first + 1 - sink - window
    if n_bulk <= 0:
        return torch.full((query.shape[1],), -torch.inf, dtype=torch.float64)
    covered = n_bulk // CHUNK * CHUNK
    if covered == 0:
        return torch.full((query.shape[1],), torch.inf, dtype=torch.float64)
    moments = KeyMoments.of(key[b, :, first + sink : first + sink + covered])
    q = query[b, :, slot].view(kv_heads, -1, dim)
    return moments.log_mass(q, torch.tensor(n_bulk), scale=dim**-0.5, estimate=estimate).flatten()


@pytest.mark.parametrize("estimate", ["guarded", "saturating", "lognormal"])
@pytest.mark.parametrize(("sink", "window"), [(4, 64), (0, 1), (16, 128)])
def test_prompt_moments_follow_their_definition(sink, window, estimate):
    query, key, valid = problem()
    regions = Regions.of(valid, query_length=700, sink_size=sink, window_size=window)
    mass, _ = bulk_log_mass_from_prompt(AttentionInputs(query, key, key, regions, 16**-0.5), estimate=estimate)
    for b in range(2):
        first = int(regions.first[b])
        edges = [
            0,
            sink + window - 1,
            sink + window,
            sink + window + CHUNK - 2,
            sink + window + CHUNK - 1,
            400,
            550,
            622,
        ]
        for slot in (first + position for position in edges):
            want = by_definition(query, key, valid, sink, window, b, slot, estimate)
            torch.testing.assert_close(mass[b, :, slot], want, rtol=1e-9, atol=1e-9)


def test_a_bounded_step_that_is_too_small_opens_instead_of_guessing():
    query, key, valid = problem(pads=(0, 0))
    regions = Regions.of(valid, query_length=1, sink_size=4, window_size=64)
    inputs = AttentionInputs(query[:, :, -1:], key, key, regions, 0.25)
    mass, _ = bulk_log_mass_from_prompt(inputs, max_chunks=1)
    assert (mass == torch.inf).all()
    mass, state = bulk_log_mass_from_prompt(inputs)
    again, _ = bulk_log_mass_from_prompt(inputs, state, max_chunks=1)
    assert mass.isfinite().all()
    assert torch.equal(mass, again)


@pytest.mark.parametrize("estimate", ["guarded", "saturating", "lognormal"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("left", [0, 77])
def test_a_step_of_decode_is_the_mass_of_the_covered_keys(estimate, softcap, left):
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, n, 8, generator=draw).double() for heads, n in ((6, 1), (2, 500)))
    valid = torch.ones(2, 500, dtype=torch.bool)
    valid[1, :left] = False
    regions = Regions.of(valid, query_length=1, sink_size=4, window_size=32)
    state = None
    frozen = 0
    # The same state at another scale: what is kept of the last step must not be used.
    for scale in (0.3, 1.5, 0.3):
        inputs = AttentionInputs(query, key, key, regions, scale, softcap)
        mass, state = bulk_log_mass_from_prompt(inputs, state, estimate=estimate)
        for row, first in enumerate((0, left)):
            n_bulk = 500 - 32 - 4 - first
            covered = key[row, :, first + 4 : first + 4 + n_bulk // CHUNK * CHUNK]
            want = KeyMoments.of(covered).log_mass(
                query[row].view(2, 3, 8), torch.tensor(n_bulk), scale=scale, softcap=softcap, estimate=estimate
            )
            torch.testing.assert_close(mass[row], want.view(6, 1), rtol=1e-10, atol=1e-10)
            frozen += int(want.isinf().sum())
    assert (frozen > 0) == (estimate == "guarded")


def test_a_cache_knows_whether_its_moments_reach_the_first_query():
    cache, keys = DynamicCache(), torch.zeros(1, 2, 100, 8)
    cache.update(keys, keys, 0)
    assert not reach_query(cache, 0, 1, 101), "none were kept"
    store_moments(cache, 0, PromptMoments.empty(keys), (4, 32), 100)
    assert reach_query(cache, 0, 1, 101)
    assert not reach_query(cache, 0, 1, 103), "two tokens came between"
    assert not reach_query(cache, 0, 1, 100), "a token was taken back"
    assert not reach_query(None, 0, 1, 101)
