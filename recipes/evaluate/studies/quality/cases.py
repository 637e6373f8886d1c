"""Which gates and presses are compared, and the heads that static gates keep open."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from patchattn import ClosedGate, MomentGate, OpenFractionTarget, OpenGate, OracleGate, RiskTarget, StaticGate
from patchattn.calibration import Calibration
from patchattn.gates import Gate

Head = tuple[int, int]

GUARDED = (0.3, 0.45, 0.6, 0.75, 0.9)
STATIC_SHARES = (0.3, 0.15)
BUDGETS = (0.17, 0.3, 0.22, 0.13, 0.1)
IN_DECODE = (0.22, 0.3, 0.17)
"""Budgets by price under which what is appended is read in decode, too."""

DRAWN = "static, drawn"
DENSELY = "context read densely"
WHOLE_GROUPS, HEADS_ALONE = "price of the output, whole groups", "price of the output, heads alone"

NO_PRESS = "no press"
SCORERS = ("StreamingLLM", "SnapKV", "ExpectedAttention")
HEADWISE = "DuoAttention"
PRESSES = (*SCORERS, HEADWISE)
SHARES = (0.75, 0.5, 0.25)
"""Of the keys that presses keep, and of the heads that keep all of theirs."""


class Rankings(NamedTuple):
    """(layer, query head) pairs, those that the oracle opens most often first.

    Args:
        mass: By all queries of the contexts.
        answering: By the queries of the questions, over all tasks.
        by_task: By the queries of the questions of one task.
    """

    mass: list[Head]
    answering: list[Head]
    by_task: dict[str, list[Head]]

    def of_other(self, task: str) -> list[Head]:
        """Return the heads of the task after one."""
        tasks = sorted(self.by_task)
        return self.by_task[tasks[(tasks.index(task) + 1) % len(tasks)]]

    def drawn(self) -> list[Head]:
        """Return the heads in an order that was drawn."""
        return random.Random(0).sample(sorted(self.mass), len(self.mass))


class Case(NamedTuple):
    """One gate, a point of a curve: `family` and `setting` name it.

    Args:
        family: Kind of the gate.
        setting: What tells gates of one kind apart.
        gate: The gate; None where its heads have to be ranked first.
        reads_densely: Decides about what is appended only, as presses do.
        in_decode: What is appended is read token by token, as what is generated is.
        whole_groups: As in `Policy`.
    """

    family: str
    setting: str
    gate: Gate | None
    reads_densely: bool = False
    in_decode: bool = False
    whole_groups: bool = False


def cases(rankings: Rankings | None, task: str, calibration: Calibration | None) -> Iterator[Case]:
    """List the gates in the order of how much they matter.

    Args:
        rankings: Heads for static gates; None if they are not known.
        task: The task that is judged: `static, other task` has its heads from the next one.
        calibration: For thresholds that need one; None for none.
    """
    yield Case("all open", "", OpenGate())
    yield Case("all closed", "", ClosedGate())
    yield Case("guarded", "0.6", MomentGate(threshold=0.6, estimate="guarded"))
    for threshold in (0.8, 0.6, 0.7):
        yield Case("log-normal", f"{threshold}", MomentGate(threshold=threshold))
    for threshold in (0.8, 0.6):
        yield Case(f"log-normal, {DENSELY}", f"{threshold}", MomentGate(threshold=threshold), reads_densely=True)
    if calibration is not None and calibration.manifest.prices is not None:
        for fraction in BUDGETS:
            gate = MomentGate(threshold=OpenFractionTarget(fraction=fraction))
            yield Case("price of the output", f"{fraction:.0%}", gate)
        n_heads = len(calibration.heads_by_price())
        for share in STATIC_SHARES:
            gate = StaticGate.from_calibration(calibration, heads=round(share * n_heads), by="price")
            yield Case("static, by price", f"{share:.0%} of heads", gate)
    elif calibration is not None:
        for alpha in (0.05, 0.1):
            yield Case("risk, each head", f"{alpha}", MomentGate(threshold=RiskTarget(alpha=alpha)))
        for fraction in (0.1, 0.2):
            target = OpenFractionTarget(fraction=fraction)
            yield Case("budget", f"{fraction:.0%}", MomentGate(threshold=target))
    for family, heads, shares in (
        (f"static, {DENSELY}", lambda known: known.answering, STATIC_SHARES[:1]),
        ("static, answering", lambda known: known.answering, STATIC_SHARES),
        ("static, by mass", lambda known: known.mass, STATIC_SHARES),
        ("static, other task", lambda known: known.of_other(task), STATIC_SHARES[:1]),
        (DRAWN, lambda known: known.drawn(), STATIC_SHARES[:1]),
    ):
        for share in shares:
            gate = rankings and StaticGate(open_heads=tuple(heads(rankings)[: round(share * len(rankings.mass))]))
            yield Case(family, f"{share:.0%} of heads", gate, reads_densely=DENSELY in family)
    for threshold in GUARDED:
        if threshold != 0.6:
            yield Case("guarded", f"{threshold}", MomentGate(threshold=threshold, estimate="guarded"))
    yield Case("saturating", "0.6", MomentGate(threshold=0.6, estimate="saturating"))
    for threshold in (0.4, 0.9):
        yield Case("log-normal", f"{threshold}", MomentGate(threshold=threshold))
    yield Case("oracle", "0.6", OracleGate(threshold=0.6))
    if calibration is not None and calibration.manifest.prices is not None:
        for fraction, (family, whole) in itertools.product(IN_DECODE, ((WHOLE_GROUPS, True), (HEADS_ALONE, False))):
            gate = MomentGate(threshold=OpenFractionTarget(fraction=fraction))
            yield Case(family, f"{fraction:.0%}", gate, in_decode=True, whole_groups=whole)


def presses() -> list[tuple[str, str]]:
    """Name the presses of kvpress as lines of a table are named: family and setting."""
    scored = [(name, f"{share:.0%} kept") for name in SCORERS for share in SHARES]
    return [(NO_PRESS, ""), *scored, *((HEADWISE, f"{share:.0%} of heads") for share in SHARES)]
