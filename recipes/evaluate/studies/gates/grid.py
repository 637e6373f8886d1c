"""Which gates are compared where, and how one of them is scored on one document."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from context import LENGTHS, SINK, WINDOWS, Context, Job, Measurement, calibration, document, load
from studies.gates.ranking import FRACTIONS, RANKINGS, Ranking

import patchattn
from patchattn import MomentGate, OpenGate, Policy, StaticGate
from patchattn.evaluation.answers import teacher_forced
from patchattn.policy import Gate
from patchattn.testing.replay import replay_gates

Place = tuple[str, int, int]
"""What is asked for, a key of `KINDS_PER_1024`; length and window in tokens."""

FULL: Place = ("facts", 4096, 256)
PLACES: list[Place] = [FULL]
PLACES += [("facts", length, window) for length in LENGTHS for window in WINDOWS if (length, window) != FULL[1:]]
PLACES += [("chains and lists", length, 256) for length in LENGTHS]

DOCUMENTS = {1024: range(0, 16, 2), 2048: range(0, 8, 2), 4096: range(0, 4, 2)}
DOCUMENTS_OF_FULL, HEADLINE_DOCUMENTS = range(8), range(20)
"""Numbers of the documents at `FULL`: for all gates, and for those that goals are stated for."""

_FACTS_ONLY = ("static", "random pairs", "calibration/saturating", "budget, guarded", "budget, saturating")
"""Families that other questions are left out of."""


@dataclass(frozen=True)
class Case:
    """One gate: a point, `setting`, of a curve, `family`.

    Args:
        family: Name of the curve.
        setting: Which point.
        gate: The gate; None for the model without patchattn.
        random: Share of the pairs, or number of heads, to open at random in each document; 0 for no.
        headline: Whether goals are stated for it.
    """

    family: str
    setting: str
    gate: Gate | None = None
    random: float = 0
    headline: bool = False


def cases(place: Place, found: Ranking) -> list[Case]:
    """List the gates of one place, whose thresholds and heads come from its ranking."""
    full = place == FULL
    listed = [*_without_moments(found, full=full), *_moment_gates(found, full=full)]
    if place[2] == 256:
        listed += _targets(full=full)
    return [case for case in listed if place[0] == "facts" or case.family not in _FACTS_ONLY]


def _without_moments(found: Ranking, *, full: bool) -> Iterator[Case]:
    yield Case("open", "", OpenGate(), headline=True)
    yield Case("closed", "", patchattn.ClosedGate(), headline=True)
    if full:
        yield Case("stock", "")
    for count in (1, 2, 3, 5, 6, 9) if full else (3, 6):
        name = "1 head" if count == 1 else f"{count} heads"
        yield Case("static", name, StaticGate(open_heads=tuple(found.heads[:count])))
        if full:
            gate = StaticGate(open_heads=tuple(found.heads_answering[:count]))
            yield Case("static, answering", name, gate, headline=count in (5, 6))
    for count in (1, 2, 3, 6, 9) if full else ():
        yield Case("random heads", f"{count} of {len(found.heads)}", OpenGate(), random=count)
    for share in (0.01, 0.03, 0.05, 0.1, 0.2, 0.3) if full else (0.1,):
        yield Case("random pairs", f"{share:.0%}", OpenGate(), random=share)
    for fraction in FRACTIONS if full else (0.1, 0.2):
        share = found.threshold("oracle", fraction)
        if share is not None:
            yield Case(
                "oracle", f"for {fraction:.0%}", patchattn.OracleGate(threshold=share), headline=fraction == 0.15
            )
    if full:
        yield Case("oracle", "0.6", patchattn.OracleGate(threshold=0.6))


def _moment_gates(found: Ranking, *, full: bool) -> Iterator[Case]:
    for threshold in (0.2, 0.4, 0.6, 0.8) if full else (0.6,):
        yield Case("prompt/guarded", f"{threshold}", MomentGate(threshold=threshold), headline=threshold != 0.2)
    for family in found.quantiles:
        source, _, estimate = family.partition("/")

        def gate(threshold: float, source: str = source, estimate: str = estimate) -> Gate:
            return MomentGate.model_validate({"threshold": threshold, "moments": source, "estimate": estimate})

        if full and family not in ("oracle", "prompt/guarded"):
            yield Case(family, "0.6", gate(0.6))
        if estimate in ("", "guarded") or (family == "calibration/lognormal" and not full):
            continue
        for fraction in FRACTIONS if full else (0.1, 0.2):
            share = found.threshold(family, fraction)
            if share is not None:
                headline = full and fraction == 0.15 and source == "prompt"
                yield Case(family, f"for {fraction:.0%}", gate(share), headline=headline)


def _targets(*, full: bool) -> Iterator[Case]:
    for alpha in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3) if full else ():
        gate = MomentGate(threshold=patchattn.RiskTarget(alpha=alpha))
        yield Case("risk, each head", f"{alpha}", gate, headline=0.1 <= alpha <= 0.25)
    for alpha in (0.05, 0.1, 0.15, 0.2) if full else ():
        yield Case(
            "risk, mean over heads", f"{alpha}", MomentGate(threshold=patchattn.RiskTarget(alpha=alpha, scope="model"))
        )
    for estimate in ("guarded", "saturating"):
        for fraction in FRACTIONS[1:] if full else (0.1, 0.2):
            gate = MomentGate(threshold=patchattn.OpenFractionTarget(fraction=fraction), estimate=estimate)
            yield Case(f"budget, {estimate}", f"{fraction:.0%}", gate, headline=fraction == 0.15)


@dataclass
class Scored:
    """One gate on one document: right answers and questions by kind, and text loss in nats per token.

    `counts` are open pairs, pairs asked, keys scored and causal keys, in prefill.
    """

    place: Place
    family: str
    setting: str
    document: int
    counts: tuple[int, int, int, int]
    right: dict[str, int]
    asked: dict[str, int]
    loss: float


def _jobs(context: Context) -> list[Job]:
    found = RANKINGS.done(context)
    jobs, listed = [], {place: cases(place, found[place[1:]]) for place in PLACES}
    for place in PLACES:
        for index in DOCUMENTS_OF_FULL if place == FULL else DOCUMENTS[place[1]]:
            jobs += [(place, case.family, case.setting, index) for case in listed[place]]
    for index in HEADLINE_DOCUMENTS[len(DOCUMENTS_OF_FULL) :]:
        jobs += [(FULL, case.family, case.setting, index) for case in listed[FULL] if case.headline]
    return jobs


def _measure(context: Context, place: Place, family: str, setting: str, index: int) -> Scored:
    model, (kinds, length, window) = load()[0], place
    one = document(kinds, length, f"gates/{index}")
    listed = cases(place, RANKINGS.done(context)[length, window])
    case = next(case for case in listed if (case.family, case.setting) == (family, setting))
    if case.gate is None:
        found, counts = teacher_forced(model, [one]), (0, 0, 0, 0)
    else:
        policy = Policy(sink_size=SINK, window_size=window, min_bulk=0, gate=case.gate)
        measured = calibration() if window == calibration().manifest.window_size else None
        with patchattn.patch(model, policy, calibration=measured) as handle:
            if case.random:
                replay_gates(handle, at_random(model, case.random, place, f"{family}/{setting}/{place}/{index}"))
            found = teacher_forced(model, [one])
        layers = [phases["prefill"] for phases in handle.report().layers.values()]
        counts = (
            sum(sum(layer.open_pairs) for layer in layers),
            sum(layer.asked * len(layer.open_pairs) for layer in layers),
            sum(layer.scored_keys for layer in layers),
            sum(layer.causal_keys for layer in layers),
        )
    return Scored(place, family, setting, index, counts, found.right, found.asked, found.text_loss)


def at_random(model: Any, how_many: float, place: Place, seed: str) -> dict[int, list[torch.Tensor]]:
    """Draw the decisions for one document: a number of whole heads, or a share of single pairs."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    _, length, window = place
    if how_many >= 1:
        opened = torch.zeros(layers * heads, dtype=torch.bool)
        opened[random.Random(seed).sample(range(layers * heads), int(how_many))] = True
        drawn = opened.view(layers, 1, heads, 1).expand(layers, 1, heads, length)
    else:
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
        drawn = torch.rand((layers, 1, heads, length), generator=generator) < how_many
    return {layer: [drawn[layer] & (torch.arange(length) >= SINK + window)] for layer in range(layers)}


SCORED = Measurement("gates", Scored, ("place", "family", "setting", "document"), _jobs, _measure)
