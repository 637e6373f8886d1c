"""Compare thresholds from a calibration with one threshold for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from context import Answered, Context, Measurement, calibration, documents, load
from page import Page, filled

from patchattn import MomentGate, OpenFractionTarget, OpenGate, RiskTarget, StaticGate, patch
from patchattn.evaluation.answers import teacher_forced
from patchattn.gates import Gate

DOCUMENTS = 8


@dataclass(frozen=True)
class Row(Answered):
    """One gate: open fraction in prefill, facts answered exactly of those asked, text loss in nats per token."""

    gate: str
    open: float
    right: int
    asked: int
    text_loss: float


@cache
def gates() -> dict[str, Gate]:
    """Name the gates to compare; what matters most comes first."""
    return {
        "dense": OpenGate(),
        "one threshold, 0.6": MomentGate(threshold=0.6, estimate="guarded"),
        "risk 0.05 for each head": MomentGate(threshold=RiskTarget(alpha=0.05), estimate="guarded"),
        "risk 0.05, mean over heads": MomentGate(threshold=RiskTarget(alpha=0.05, scope="model"), estimate="guarded"),
        "budget 43%": MomentGate(threshold=OpenFractionTarget(fraction=0.43), estimate="guarded"),
        "budget 25%": MomentGate(threshold=OpenFractionTarget(fraction=0.25), estimate="guarded"),
        "one threshold, 0.25": MomentGate(threshold=0.25, estimate="guarded"),
        "8 static heads of the calibration": StaticGate.from_calibration(calibration("bfloat16"), heads=8),
        "risk 0.1 for each head": MomentGate(threshold=RiskTarget(alpha=0.1), estimate="guarded"),
    }


def measure(_: Context, gate: str) -> Row:
    """Score the model with one gate."""
    measured, (model, _) = calibration("bfloat16"), load(torch.bfloat16)
    policy = measured.policy.model_copy(update={"gate": gates()[gate], "min_bulk": 0})
    with patch(model, policy, calibration=measured) as handle:
        found = teacher_forced(model, documents("calibrated", DOCUMENTS))
    opened = handle.report().open_fraction("prefill")
    return Row(gate, opened, found.right["fact"], found.asked["fact"], found.text_loss)


ROWS = Measurement("calibrated", Row, ("gate",), lambda _: [(gate,) for gate in gates()], measure)
MEASURED = (ROWS,)


def page(context: Context) -> Page:
    """Show what each gate opens and keeps."""
    rows, manifest = ROWS.rows(context), calibration("bfloat16").manifest
    return Page(filled(globals(), asked=rows[0].asked, manifest=manifest, rows=rows))
