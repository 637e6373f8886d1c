"""Which gates are compared, where, and on how many documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ranking import FRACTIONS, threshold
from shipped import LENGTHS, WINDOWS
from store import Row

from patchattn import ClosedGate, MomentGate, OpenFractionTarget, OpenGate, OracleGate, RiskTarget, StaticGate
from patchattn.gates import Gate

DEFAULT = "0.6"
ESTIMATES = ("guarded", "saturating", "lognormal")


@dataclass(frozen=True)
class Setting:
    """One kind of document under one window.

    Args:
        kinds: What is asked for; a key of `shipped.KINDS_PER_1024`.
        length: Tokens.
        window: Tokens.
        documents: Numbers of the documents for every case.
        headline: Numbers of the documents for the cases that goals are stated for.
    """

    kinds: str
    length: int
    window: int
    documents: range
    headline: range

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells settings apart."""
        return (self.kinds, self.length, self.window)


FULL = Setting("facts", 4096, 256, range(8), range(20))
_DOCUMENTS = {1024: range(0, 16, 2), 2048: range(0, 8, 2), 4096: range(0, 4, 2)}
LEAN = [
    Setting(kinds, length, window, _DOCUMENTS[length], _DOCUMENTS[length])
    for kinds, windows in (("facts", WINDOWS), ("chains and lists", (256,)))
    for length in LENGTHS
    for window in windows
    if (kinds, length, window) != FULL.key
]


_FACTS_ONLY = ("static", "random pairs", "calibration/saturating", "budget, guarded", "budget, saturating")
"""Curves that other questions are left out of."""


@dataclass(frozen=True)
class Case:
    """One gate.

    Args:
        family: Name of the curve that it is a point of.
        setting: Which point.
        gate: The gate; None for the model without patchattn.
        random: Share of the pairs, or number of heads, to open at random in each document; None for no.
        headline: Whether goals are stated for it.
    """

    family: str
    setting: str
    gate: Gate | None = None
    random: float | None = None
    headline: bool = False


def cases(setting: Setting, found: dict[str, Any]) -> list[Case]:
    """List the gates of one setting; `found` is what `ranking` says about its length and window."""
    full = setting == FULL
    n_heads = len(found["heads"])
    listed = [Case("open", "", OpenGate(), headline=True), Case("closed", "", ClosedGate(), headline=True)]
    if full:
        listed.append(Case("stock", ""))
    for heads in (1, 2, 3, 5, 6, 9) if full else (3, 6):
        gate = StaticGate(open_heads=tuple(map(tuple, found["heads"][:heads])))
        listed.append(Case("static", _heads(heads), gate))
        answering = StaticGate(open_heads=tuple(map(tuple, found["heads_answering"][:heads])))
        if full:
            listed.append(Case("static, answering", _heads(heads), answering, headline=heads in (5, 6)))
    listed += [
        Case("random heads", f"{heads} of {n_heads}", OpenGate(), random=float(heads))
        for heads in ((1, 2, 3, 6, 9) if full else ())
    ]
    listed += [
        Case("random pairs", f"{fraction:.0%}", OpenGate(), random=fraction)
        for fraction in ((0.01, 0.03, 0.05, 0.1, 0.2, 0.3) if full else (0.1,))
    ]
    fractions = FRACTIONS if full else (0.1, 0.2)
    for fraction in fractions:
        share = threshold(found, "oracle", fraction)
        if share is not None:
            listed.append(Case("oracle", f"for {fraction:.0%}", OracleGate(threshold=share), headline=fraction == 0.15))
    if full:
        listed.append(Case("oracle", DEFAULT, OracleGate(threshold=0.6)))
    listed += _moment_cases(found, fractions, full=full)
    if setting.window == 256:
        listed += _targets(full=full)
    return [case for case in listed if setting.kinds == "facts" or case.family not in _FACTS_ONLY]


def _heads(count: int) -> str:
    return "1 head" if count == 1 else f"{count} heads"


def _moment_cases(found: dict[str, Any], fractions: tuple[float, ...], *, full: bool) -> Iterator[Case]:
    for number in ("0.2", "0.4", "0.6", "0.8") if full else ("0.6",):
        gate = MomentGate(threshold=float(number))
        yield Case("prompt/guarded", number, gate, headline=number != "0.2")
    for source in ("prompt", "calibration"):
        for estimate in ESTIMATES:
            name = f"{source}/{estimate}"
            if name not in found["quantiles"]:
                continue
            if full and name != "prompt/guarded":
                gate = MomentGate.model_validate({"threshold": 0.6, "moments": source, "estimate": estimate})
                yield Case(name, DEFAULT, gate)
            for fraction in fractions if estimate != "guarded" else ():
                share = threshold(found, name, fraction)
                if share is None or (source == "calibration" and not full and estimate == "lognormal"):
                    continue
                gate = MomentGate.model_validate({"threshold": share, "moments": source, "estimate": estimate})
                yield Case(name, f"for {fraction:.0%}", gate, headline=full and fraction == 0.15 and source == "prompt")


def _targets(*, full: bool) -> Iterator[Case]:
    for alpha in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3) if full else ():
        gate = MomentGate(threshold=RiskTarget(alpha=alpha))
        yield Case("risk, each head", f"{alpha}", gate, headline=0.1 <= alpha <= 0.25)
    for alpha in (0.05, 0.1, 0.15, 0.2) if full else ():
        gate = MomentGate(threshold=RiskTarget(alpha=alpha, scope="model"))
        yield Case("risk, mean over heads", f"{alpha}", gate)
    for estimate in ("guarded", "saturating"):
        for fraction in FRACTIONS[1:] if full else (0.1, 0.2):
            target = OpenFractionTarget(fraction=fraction)
            gate = MomentGate.model_validate({"threshold": target, "estimate": estimate})
            yield Case(f"budget, {estimate}", f"{fraction:.0%}", gate, headline=fraction == 0.15)


def expected(found: dict[int, dict[str, Any]]) -> dict[tuple[Any, ...], range]:
    """Name the documents of every gate in every setting; `found` is what `ranking` says, by length."""
    named: dict[tuple[Any, ...], range] = {}
    for setting in (FULL, *LEAN):
        for case in cases(setting, found[setting.length][str(setting.window)]):
            documents = setting.headline if case.headline else setting.documents
            named[(*setting.key, case.family, case.setting)] = documents
    return named


def wanted(rows: Iterable[Row], found: dict[int, dict[str, Any]]) -> list[Row]:
    """Leave out rows of documents or gates that the grid does not name (any more).

    Args:
        rows: Saved rows.
        found: What `ranking` says, by length.
    """
    named = expected(found)
    names = ("kinds", "length", "window", "family", "setting")
    return [row for row in rows if row["document"] in named.get(tuple(row[name] for name in names), ())]
