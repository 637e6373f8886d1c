"""The page of a report: one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchattn.errors import CalibrationError, CalibrationMismatchError, ReportError
from patchattn.gates import MomentGate
from patchattn.gates.thresholds import RiskTarget
from patchattn.policy import Phase

if TYPE_CHECKING:
    from patchattn.calibration.calibration import Calibration
    from patchattn.report.report import GateReport
    from patchattn.report.timeline import Timeline

_TEMPLATE = Path(__file__).with_name("template")
_VIEWS: dict[str, Phase | None] = {"both": None, "prefill": "prefill", "decode": "decode"}
# Anything that could end the script element, or that old parsers take for the end of a line.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page_of(
    report: GateReport,
    timeline: Timeline | None,
    texts: Sequence[str] | None,
    calibration: Calibration | None,
    title: str,
) -> str:
    """Fill the template.

    Args:
        report: What was counted.
        timeline: Decisions by token; None leaves them out.
        texts: Text of each token of the timeline; None leaves the text out.
        calibration: Gives the curve of what a risk costs; None leaves it out.
        title: Heading.

    Raises:
        CalibrationMismatchError: The calibration is of other layers or heads, or of another sink or window.
    """
    data = {
        "title": title,
        "backend": report.backend,
        "notes": report.notes(),
        "policy": report.policy.model_dump(mode="json"),
        "layers": [[layer, len(next(iter(found.values())).open_pairs)] for layer, found in report.layers.items()],
        "views": {view: _view(report, phase) for view, phase in _VIEWS.items()},
        "dense": [[reason, calls] for reason, calls in report.dense_calls_by_reason().items()],
        "timeline": None if timeline is None else _timeline(timeline, texts),
        "risk": None if calibration is None else _risk(report, calibration),
    }
    parts = {
        "TITLE": html.escape(title),
        "PLAIN": html.escape(str(report)),
        "STYLE": _part("style.css"),
        "SCRIPT": _part("script.js"),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES),
    }
    # In one go, so that nothing in one part is taken for the place of another.
    pieces = _part("page.html").split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _part(name: str) -> str:
    return (_TEMPLATE / name).read_text(encoding="utf-8")


def _view(report: GateReport, phase: Phase | None) -> dict[str, Any]:
    """Numbers of one phase or both; None for what is not known."""
    counts = [[c for name, c in by_phase.items() if phase in (None, name)] for by_phase in report.layers.values()]
    savings = report.savings(phase) if report.layers.keys() <= report.shapes.keys() else None
    return {
        "open": [[sum(pairs) for pairs in zip(*(c.open_pairs for c in found), strict=True)] for found in counts],
        "asked": [sum(c.asked for c in found) for found in counts],
        "below": [sum(c.below_break_even for c in found) for found in counts],
        "scored": [sum(c.scored_keys for c in found) for found in counts],
        "causal": [sum(c.causal_keys for c in found) for found in counts],
        "calls": sum(c.gated_calls for found in counts for c in found),
        "savings": None if savings is None else vars(savings),
    }


def _timeline(timeline: Timeline, texts: Sequence[str] | None) -> dict[str, Any]:
    return {
        "heads": timeline.heads,
        "phases": [[phase, len(list(run))] for phase, run in groupby(timeline.phases)],
        "bits": base64.b64encode(_packed(timeline.open.T)).decode(),
        "texts": texts,
    }


def _packed(rows: Tensor) -> bytes:
    """Pack rows of bits into whole bytes, the first bit lowest."""
    n_rows, n_bits = rows.shape
    n_bytes = -(-n_bits // 8)
    bits = torch.zeros(n_rows, 8 * n_bytes, dtype=torch.uint8)
    bits[:, :n_bits] = rows
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return bytes((bits.view(n_rows, n_bytes, 8) * weights).sum(-1).to(torch.uint8).flatten().tolist())


def _risk(report: GateReport, calibration: Calibration) -> dict[str, Any]:
    """Missed mass against open fraction on the calibration's documents, for risks and for one threshold."""
    from patchattn.calibration.calibration import Calibration

    if not isinstance(calibration, Calibration):
        raise ReportError(
            f"Expected a patchattn.Calibration, got {type(calibration).__name__}.",
            fix="pass patchattn.Calibration.from_pretrained(...)",
        )
    calibration.check_policy(report.policy)
    measured, gate = calibration.manifest, report.policy.gate
    heads = {len(counts.open_pairs) for found in report.layers.values() for counts in found.values()}
    if not set(report.layers) <= set(measured.layers) or heads - {measured.fingerprint.query_heads}:
        raise CalibrationMismatchError(
            f"The calibration measured layers {list(measured.layers)} of {measured.fingerprint.query_heads} query "
            f"heads; the report has layers {list(report.layers)} of {sorted(heads)} heads.",
            fix="use the calibration of the model that was run",
        )
    estimate = gate.estimate if isinstance(gate, MomentGate) and gate.estimate in measured.estimates else None
    index = [measured.layers.index(layer) for layer in report.layers] or list(range(len(measured.layers)))

    def point(margins: Tensor) -> list[float]:
        found = calibration.expected(margins, estimate=estimate)
        return [float(found.open_fraction[index].mean()), float(found.missed_mass[index].mean())]

    shape = calibration.tensors["oracle_open_fraction"].shape
    alphas = [round(alpha, 5) for alpha in torch.logspace(-3.5, -0.5, 31).tolist()]
    targets = []
    for alpha in alphas:
        try:
            margins = calibration.thresholds(RiskTarget(alpha=alpha), estimate=estimate)
        except CalibrationError:
            continue  # So few documents can't carry so small a risk; the page names the number of documents.
        targets.append([alpha, *point(margins)])
    return {
        "model": measured.model,
        "documents": measured.n_documents,
        "targets": targets,
        "one": [[float(m), *point(m.expand(shape))] for m in calibration.tensors["margins"]],
    }
