"""Compare thresholds from a calibration with one threshold for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from context import ROOT, Context, Measurement, document, load
from page import Page, filled, lines

from patchattn import MomentGate, OpenFractionTarget, OpenGate, RiskTarget, StaticGate, patch
from patchattn.calibration import Calibration
from patchattn.evaluation.answers import teacher_forced
from patchattn.evaluation.page import with_interval
from patchattn.evaluation.statistics import share
from patchattn.gates import Gate

DOCUMENTS, LENGTH = 8, 4096
FORM = "| {gate} | {open:.1%} | {facts} | {text_loss:.4f} |"


@dataclass(frozen=True)
class Row:
    """One gate: open fraction in prefill, facts answered exactly of those asked, text loss in nats per token."""

    gate: str
    open: float
    right: int
    asked: int
    text_loss: float


@cache
def calibration() -> Calibration:
    """Return the shipped calibration, for the model in bfloat16."""
    return Calibration.from_pretrained(ROOT / "calibrations" / "patchattn-demo")


@cache
def gates() -> dict[str, Gate]:
    """Name the gates to compare; what matters most comes first."""
    return {
        "dense": OpenGate(),
        "one threshold, 0.6": MomentGate(threshold=0.6),
        "risk 0.05 for each head": MomentGate(threshold=RiskTarget(alpha=0.05)),
        "risk 0.05, mean over heads": MomentGate(threshold=RiskTarget(alpha=0.05, scope="model")),
        "budget 43%": MomentGate(threshold=OpenFractionTarget(fraction=0.43)),
        "budget 25%": MomentGate(threshold=OpenFractionTarget(fraction=0.25)),
        "one threshold, 0.25": MomentGate(threshold=0.25),
        "8 static heads of the calibration": StaticGate.from_calibration(calibration(), heads=8),
        "risk 0.1 for each head": MomentGate(threshold=RiskTarget(alpha=0.1)),
    }


def measure(_: Context, gate: str) -> Row:
    """Score the model with one gate."""
    documents = [document("facts", LENGTH, f"calibrated/{at}") for at in range(DOCUMENTS)]
    policy = calibration().policy.model_copy(update={"gate": gates()[gate], "min_bulk": 0})
    model, _ = load(torch.bfloat16)
    with patch(model, policy, calibration=calibration()) as handle:
        found = teacher_forced(model, documents)
    opened = handle.report().open_fraction("prefill")
    return Row(gate, opened, found.right["fact"], found.asked["fact"], found.text_loss)


ROWS = Measurement("calibrated", Row, ("gate",), lambda _: [(gate,) for gate in gates()], measure)
MEASURED = (ROWS,)


def page(context: Context) -> Page:
    """Show what each gate opens and keeps."""
    rows = ROWS.rows(context)
    listed = [vars(row) | {"facts": with_interval(share(row.right, row.asked), ".3f")} for row in rows]
    text = filled(
        "calibrated", length=LENGTH, asked=rows[0].asked, manifest=calibration().manifest, rows=lines(FORM, listed)
    )
    return Page(text)
