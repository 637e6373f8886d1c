"""The estimates and the arithmetic of the study `towards_the_oracle`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.call.regions import Regions

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "recipes" / "evaluate"
SINK, WINDOW, KEYS, DIM = 4, 16, 420, 8


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"studies.towards_the_oracle.{name}")


@pytest.fixture
def inputs() -> AttentionInputs:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, KEYS, DIM, generator=draw) for heads in (4, 2, 2))
    regions = Regions.plain(SINK, WINDOW, KEYS, 1, KEYS, torch.device("cpu"))
    return AttentionInputs(query, key, value, regions, scale=0.5)


def parts(study: Any, inputs: AttentionInputs) -> list[Any]:
    rows = study("seeing").rows_of(inputs, 1)
    return [far for _, far in study("estimates").by_chunks(inputs, rows)]


def test_reading_every_key_gives_the_exact_mass(study: Any, inputs: AttentionInputs) -> None:
    estimates = study("estimates")
    found = torch.cat([estimates.read(far, estimates.exact_scores(far)).mass for far in parts(study, inputs)], 2)
    exact = exact_masses(inputs)[0].bulk[:, :, study("seeing").rows_of(inputs, 1)]
    torch.testing.assert_close(found.flatten(0, 1), exact[0])


def test_looks_are_exact_where_they_leave_nothing_out(study: Any, inputs: AttentionInputs) -> None:
    estimates = study("estimates")
    spreads = torch.eye(DIM, dtype=torch.float64).expand(2, -1, -1) + 0.3
    basis = estimates.Basis.of(spreads, spreads.flip(1))
    far = parts(study, inputs)[-1]
    scores = estimates.exact_scores(far)
    whole = estimates.read(far, scores)
    torch.testing.assert_close(estimates.sketch(far, basis, DIM).mass, whole.mass, atol=1e-4, rtol=1e-4)
    everything = estimates.ajar(far, scores, torch.zeros(*scores.shape[:3], far.chunks * 2))
    chosen = estimates.ajar(far, scores, estimates.by_scores(far, scores))
    assert (chosen.mass >= everything.mass - 1e-5).all(), "the best blocks hold most"
    assert (chosen.mass <= whole.mass + 1e-5).all()
    n = far.chunks * 128
    in_full = far._replace(key=far.key[:, :n], value=far.value[:, :n], n=torch.full_like(far.n, n))
    whole = estimates.read(in_full, estimates.exact_scores(in_full))
    one_by_one = estimates.boxes(in_full, 1)
    torch.testing.assert_close(one_by_one.mass, whole.mass)
    torch.testing.assert_close(one_by_one.output, whole.output)
    labels = estimates.clustered(far.key, 2)
    assert {*labels.unique().tolist()} == {0, 1}
    one = estimates.clusters(in_full, torch.zeros_like(labels), 1)
    moments = estimates.KeyMoments.of(in_full.key)
    mean = torch.einsum("hgtd,hd->hgt", far.query, moments.mean)
    variance = torch.einsum("hgtd,hd->hgt", far.query.square(), moments.covariance.diagonal(dim1=1, dim2=2))
    mass = estimates.log_mass_of_gaussian(torch.tensor(n), mean, variance, estimate="saturating")
    torch.testing.assert_close(one.mass, mass, atol=1e-4, rtol=1e-4)


def test_bounds_are_never_below_the_scores(study: Any, inputs: AttentionInputs) -> None:
    estimates = study("estimates")
    for far in parts(study, inputs):
        scores = estimates.exact_scores(far)[..., far.full].unflatten(-1, (-1, estimates.AJAR)).amax(-1)
        assert (estimates.by_bounds(far) >= scores - 1e-5).all()


def slowly_rising(total: Tensor, count: Tensor) -> list[float]:
    blocks: list[list[float]] = []
    for pair in zip(total.tolist(), count.tolist(), strict=True):
        blocks.append([*pair, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    return [block[0] / block[1] for block in blocks for _ in range(int(block[2]))]


def test_steps_rise_and_fit_best(study: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    total, count = torch.rand(3, 12, generator=draw).double(), torch.randint(1, 9, (3, 12), generator=draw).double()
    found = study("ranking").rising(total, count)
    for head in range(3):
        assert found[head].tolist() == pytest.approx(slowly_rising(total[head], count[head]))


def drawn_pairs(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    worth = torch.randn(3, 600, generator=draw)
    scale = torch.tensor([1e-5, 1e-7, 1e-9])[:, None]
    noise = torch.randn(3, 600, generator=draw)
    price = scale * worth.exp()
    return {
        "price": price,
        "probe": worth + noise,
        "margin": noise,
        "sketch 8, change": 2 * worth + 4 * noise,
        "sketch 8, margin": torch.randn(3, 600, generator=draw),
        "price, ajar by bounds": price / 10,
        "spread": torch.rand(3, 600, generator=draw) * 2,
        "n": torch.arange(128, 2528, 4),
    }


def test_what_ranks_better_leaves_less(study: Any) -> None:
    ranking = study("ranking")
    priced, judged = [drawn_pairs(at) for at in range(3)], drawn_pairs(9)
    listed = ranking.candidates(64)
    probe = ranking.Ranker(listed["probe"], priced)

    def left(name: str, by: str = "open") -> float:
        first = probe if listed[name].asked != "everywhere" else None
        return ranking.left_at(ranking.Ranker(listed[name], priced, first).judge(judged), by, (0.17,))[0]

    exact, both, alone, noise = (
        left(name) for name in ("exact price", "probe, and change by sketch of 8", "probe", "margin")
    )
    assert exact < both < alone < noise, "the sum of the two features knows the worth nearly exactly"
    assert both <= left("probe, sketch of 8 where unsure") < alone
    # With a tenth of the price left for a fraction of the keys, the third state is better than the other two.
    assert left("probe, ajar by bounds", "read") < left("probe", "read")
    # Nothing is read in no time: looking is paid for.
    assert left("probe, and change by sketch of 8", "read") > both


def test_shares_of_keys_and_prices_are_counted(study: Any) -> None:
    ranking = study("ranking")
    found = drawn_pairs(0)
    found["price"] = found["price"].clamp(max=1e-5)
    ranker = ranking.Ranker(ranking.candidates(64)["exact price"], [found])
    at = float(found["price"].flatten().sort().values[900])
    is_open, is_ajar, reads = ranker.decide(found, at)
    assert is_open.sum() == 3 * 600 - 901
    assert not is_ajar.any()
    torch.testing.assert_close(reads, is_open + 1.0, check_dtype=False)
    outcome = ranker.judge(found)
    assert outcome.left[-1] == pytest.approx(float(found["price"].double().sum()))
    assert (np.diff(outcome.left) >= 0).all()
    assert (np.diff(outcome.open) <= 0).all()


def test_half_of_the_heads_decide_like_all(study: Any) -> None:
    ranking = study("ranking")
    found = drawn_pairs(0)
    for name in ("probe, ajar by bounds", "probe, sketch of 8 where unsure"):
        ranker = ranking.Ranker(
            ranking.candidates(64)[name], [found], ranking.Ranker(ranking.candidates(64)["probe"], [found])
        )
        some = {key: values[1:] if values.dim() == 2 else values for key, values in found.items()}
        for whole, part in zip(
            ranker.decide(found, 1e-6), ranker.of_heads(slice(1, 3)).decide(some, 1e-6), strict=True
        ):
            torch.testing.assert_close(whole[1:], part)


class Decided:
    """A ranker that decides the same of all pairs."""

    def __init__(self, is_open: bool, is_ajar: bool) -> None:
        self._states = is_open, is_ajar

    def of_heads(self, heads: slice) -> Decided:
        assert heads == slice(0, 4)
        return self

    def decide(self, found: dict[str, Tensor], _: float) -> tuple[Tensor, Tensor, Tensor]:
        shape = found["probe"].shape
        is_open, is_ajar = (torch.full(shape, state) for state in self._states)
        return is_open, is_ajar, is_open.double()


@pytest.mark.parametrize(("is_open", "is_ajar"), [(True, False), (False, False), (False, True)])
def test_layers_attend_as_is_decided(study: Any, inputs: AttentionInputs, is_open: bool, is_ajar: bool) -> None:
    patched, identity = study("patched"), torch.eye(DIM, dtype=torch.float64).expand(2, -1, -1)
    basis = {0: study("estimates").Basis.of(identity, identity)}

    def margin(*_: object) -> Tensor:
        return torch.zeros(1, 4, KEYS)

    ranker = Decided(is_open, is_ajar)
    gated = patched.Gated(ranker, 0.0, (), ("scores",), basis, margin, {0: torch.zeros(1, KEYS, 1)})
    output = gated(0, inputs, lambda: None).output
    dense, (closed, _) = patched.dense(inputs), patched.closed_attention(inputs)
    rows = study("seeing").rows_of(inputs, 1)
    others = torch.ones(KEYS, dtype=torch.bool)
    others[rows] = False
    torch.testing.assert_close(output[:, :, others], dense[:, :, others])
    if not is_ajar:
        torch.testing.assert_close(output[:, :, rows], (dense if is_open else closed)[:, :, rows])
    else:
        # The best blocks bring most rows nearer to dense attention.
        nearer = (output - dense).norm(dim=-1) < (closed - dense).norm(dim=-1)
        assert nearer[:, :, rows].double().mean() > 0.8
    assert gated.counts[0] == is_open
    assert gated.counts[1] == is_ajar
