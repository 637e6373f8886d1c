"""Which gates are compared where, and how one of them is scored on one document."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from context import LENGTHS, SINK, WINDOWS, Context, Job, Measurement, calibration, document, load
from studies.gates.ranking import FRACTIONS, RANKINGS, Ranking

import patchattn
from patchattn import MomentGate, OracleGate, RiskTarget, StaticGate
from patchattn.evaluation.answers import teacher_forced
from patchattn.gates import Gate
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


class Case(NamedTuple):
    """One gate, a point of a curve: `family` and `setting` name it. Goals are stated for `headline` ones.

    No gate means the model without patchattn. `random` is a share of the pairs, or a number of heads, that opens.
    """

    family: str
    setting: str
    gate: Gate | None
    headline: bool = False
    random: float = 0


def cases(place: Place, found: Ranking) -> list[Case]:
    """List the gates of one place, whose thresholds and heads come from its ranking."""
    return [case for case in _cases(place, found) if place[0] == "facts" or case.family not in _FACTS_ONLY]


def _cases(place: Place, found: Ranking) -> Iterator[Case]:
    full, fractions = place == FULL, FRACTIONS if place == FULL else (0.1, 0.2)
    opened = patchattn.OpenGate()
    yield Case("open", "", opened, headline=True)
    yield Case("closed", "", patchattn.ClosedGate(), headline=True)
    if full:
        yield Case("stock", "", None)
    for count in (1, 2, 3, 5, 6, 9) if full else (3, 6):
        name = "1 head" if count == 1 else f"{count} heads"
        yield Case("static", name, StaticGate(open_heads=tuple(found.heads[:count])))
        if full:
            gate = StaticGate(open_heads=tuple(found.heads_answering[:count]))
            yield Case("static, answering", name, gate, headline=count in (5, 6))
    for count in (1, 2, 3, 6, 9) if full else ():
        yield Case("random heads", f"{count} of {len(found.heads)}", opened, random=count)
    for share in (0.01, 0.03, 0.05, 0.1, 0.2, 0.3) if full else (0.1,):
        yield Case("random pairs", f"{share:.0%}", opened, random=share)
    thresholds = {
        family: {f: share for f in fractions if (share := found.threshold(family, f)) is not None}
        for family in found.quantiles
    }
    for fraction, share in thresholds.pop("oracle").items():
        yield Case("oracle", f"for {fraction:.0%}", OracleGate(threshold=share), headline=fraction == 0.15)
    if full:
        yield Case("oracle", "0.6", OracleGate(threshold=0.6))
    for share in (0.2, 0.4, 0.6, 0.8) if full else (0.6,):
        yield Case("prompt/guarded", f"{share}", MomentGate(threshold=share, estimate="guarded"), headline=share != 0.2)
    for family, shares in thresholds.items():
        source, estimate = family.split("/")
        gate = MomentGate.model_validate({"threshold": 0.6, "moments": source, "estimate": estimate})
        if full and family != "prompt/guarded":
            yield Case(family, "0.6", gate)
        # Below its floor, which is high, a guarded gate has no threshold.
        if estimate == "guarded" or (family == "calibration/lognormal" and not full):
            continue
        for fraction, share in shares.items():
            headline = full and fraction == 0.15 and source == "prompt"
            yield Case(family, f"for {fraction:.0%}", gate.model_copy(update={"threshold": share}), headline)
    for alpha in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3) if full else ():
        gate = MomentGate(threshold=RiskTarget(alpha=alpha), estimate="guarded")
        yield Case("risk, each head", f"{alpha}", gate, headline=0.1 <= alpha <= 0.25)
    for alpha in (0.05, 0.1, 0.15, 0.2) if full else ():
        gate = MomentGate(threshold=RiskTarget(alpha=alpha, scope="model"), estimate="guarded")
        yield Case("risk, mean over heads", f"{alpha}", gate)
    for estimate in ("guarded", "saturating") if place[2] == 256 else ():
        for fraction in FRACTIONS[1:] if full else fractions:
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
    counts: tuple[int, ...]
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
    one, counts = document(kinds, length, f"gates/{index}"), (0, 0, 0, 0)
    listed = cases(place, RANKINGS.done(context)[length, window])
    case = next(case for case in listed if case[:2] == (family, setting))
    if case.gate is None:
        found = teacher_forced(model, [one])
    else:
        policy = patchattn.Policy(sink_size=SINK, window_size=window, min_bulk=0, gate=case.gate)
        measured = calibration() if window == calibration().manifest.window_size else None
        with patchattn.patch(model, policy, calibration=measured) as handle:
            if case.random:
                replay_gates(handle, at_random(model, case.random, place, f"{family}/{setting}/{place}/{index}"))
            found = teacher_forced(model, [one])
        total = reduce(add, handle.report().counts("prefill").values())
        counts = (sum(total.open_pairs), total.asked_pairs, total.scored_keys, total.causal_keys)
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
