"""Put patchattn's gates and presses of kvpress through one protocol.

kvpress needs transformers before 5.3, so its presses are measured in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from context import POLICY, SINK, WINDOW, Context, Job, Measurement, calibration, load
from matplotlib.figure import Figure
from page import Page, beside_dense, draw_intervals, filled, told
from studies.kvpress.protocol import FOLLOWING, Row, asked_documents, context_of, digest, put_through
from torch import Tensor

from patchattn import ClosedGate, MomentGate, OpenFractionTarget, OpenGate, StaticGate, patch
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.evaluation.statistics import Interval
from patchattn.gates import Gate
from patchattn.hf.observe import observing

LOCAL = SINK + WINDOW
PRESSES = ("StreamingLLM", "SnapKV", "ExpectedAttention")
STYLES = {
    "patchattn, moment gate, calibrated": ("tab:blue", "o-"),
    "patchattn, moment gate": ("tab:cyan", "o-"),
    "patchattn, static": ("tab:purple", "D"),
    "patchattn, closed": ("black", "D"),
    "StreamingLLM": ("tab:grey", "s-"),
    "SnapKV": ("tab:orange", "s-"),
    "ExpectedAttention": ("tab:red", "s-"),
}


def gates() -> dict[tuple[str, str], Gate]:
    """Name patchattn's gates by method and setting."""
    moment = "patchattn, moment gate"
    return {
        ("dense", ""): OpenGate(),
        ("patchattn, closed", ""): ClosedGate(),
        ("patchattn, static", "8 heads"): StaticGate.from_calibration(calibration(), heads=8),
        (moment, "threshold 0.6"): MomentGate(estimate="guarded"),
        (moment, "threshold 0.2"): MomentGate(threshold=0.2, estimate="guarded"),
        (f"{moment}, calibrated", "budget 10%"): MomentGate(
            threshold=OpenFractionTarget(fraction=0.1), estimate="guarded"
        ),
        (f"{moment}, calibrated", "budget 25%"): MomentGate(
            threshold=OpenFractionTarget(fraction=0.25), estimate="guarded"
        ),
        (f"{moment}, calibrated", "budget 50%"): MomentGate(
            threshold=OpenFractionTarget(fraction=0.5), estimate="guarded"
        ),
    }


def jobs(_: Context) -> list[Job]:
    """List gates, then presses."""
    kept = [(press, f"{share:.0%} kept", "later") for press in PRESSES for share in (0.08, 0.25, 0.5)]
    known = [(press, "25% kept", "known") for press in PRESSES[1:]]
    return [*((*gate, "later") for gate in gates()), *kept, *known]


def measure(context: Context, method: str, setting: str, question: str) -> Row:
    """Measure one row, that of a press in the environment of kvpress."""
    if method not in PRESSES:
        return measure_gate(Row(method, setting, question), gates()[method, setting])
    python = context.options["kvpress_python"]
    if python is None:
        raise ValueError(f"{method} is measured in an environment with kvpress: give --kvpress-python.")
    command = [python, Path(__file__).with_name("protocol.py"), method, setting, question]
    measured = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Row(**json.loads(measured.splitlines()[-1]))


def measure_gate(row: Row, gate: Gate) -> Row:
    """Measure one gate, and how many keys it attends to while it answers."""
    scored, attended, loaded = [], [], []

    def observer(_: int, inputs: AttentionInputs, attend: Any) -> Attended:
        found = attend()
        begin = inputs.key.shape[2] - inputs.query.shape[2]
        if begin:
            attended.append(share_of_keys(found.open, begin))
            loaded.append(share_of_keys(found.open.unflatten(1, (-1, inputs.group_size)).any(2), begin))
        else:
            scored.append(share_of_keys(found.open, begin))
        return found

    policy = POLICY.model_copy(update={"gate": gate})
    with patch(load()[0], policy, calibration=calibration()) as handle:
        put_through(row, nullcontext, asking=observing(handle, observer))
    row.prefill, row.attended, row.read = mean(scored), mean(attended), mean(loaded)
    return row


def share_of_keys(opened: Tensor, begin: int) -> float:
    """Share of the causal keys that pairs attend to; over a whole context, weighted by their number.

    Args:
        opened: [1, heads, query] bool.
        begin: Position of the first query.
    """
    causal = torch.arange(begin + 1, begin + opened.shape[2] + 1).float()
    keys = torch.where(opened, causal, causal.clamp(max=LOCAL))
    return (keys / (causal if begin else causal.mean())).mean().item()


ROWS = Measurement("kvpress", Row, ("method", "setting", "question"), jobs, measure)
MEASURED = (ROWS,)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Take the environment of kvpress."""
    parser.add_argument("--kvpress-python", type=Path, help="Python of an environment with kvpress, for its presses")


def page(context: Context) -> Page:
    """Show what is kept at which share of keys, where questions come later and where they are known.

    Raises:
        ValueError: The two environments tokenize the documents differently, so their rows can't be compared.
    """
    rows = ROWS.rows(context)
    if {row.documents for row in rows} != {digest()}:
        raise ValueError("Rows were measured on documents that are tokenized differently, so they can't be compared.")
    dense = rows[0]
    beside = [told(row, dense) for row in sorted(rows, key=lambda row: (-row.attended, row.method))]
    later, known = ([row for row in beside if row.question == question] for question in ("later", "known"))
    markdown = filled(
        globals(),
        FOLLOWING=FOLLOWING,
        count=len(asked_documents()),
        facts=len(asked_documents()[0].questions),
        dense=dense,
        context=round(mean(len(context_of(one)) for one in asked_documents())),
        later=later,
        known=known,
        known_asked=known[0].asked,
    )
    formats = {"number": ".4f", "losses": ".5f", "seconds": ".1f"}
    return Page(markdown, draw(later, known, dense), {"kvpress": list(map(vars, rows))}, formats=formats)


def draw(later: list[Any], known: list[Any], dense: Row) -> Figure:
    """Draw facts and text loss against the share of keys attended to."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    facts, loss = figure.subplots(1, 2)
    for method, (colour, style) in STYLES.items():
        of_method = [row for row in reversed(later) if row.method == method]
        paid, look = [row.attended for row in of_method], {"color": colour, "fmt": style}
        draw_intervals(facts, paid, [row.facts for row in of_method], label=method, **look)
        changes = [Interval(*(100 * end for end in row.loss)) for row in of_method]
        draw_intervals(loss, paid, changes, **look)
        for row in known:
            if row.method == method:
                look |= {"fmt": "s:", "fillstyle": "none", "label": f"{method}, question known"}
                draw_intervals(facts, [row.attended], [row.facts], **look)
    facts.set_title("Looking up facts", fontsize=10)
    loss.set_title("Plain text after the context", fontsize=10)
    facts.set(xlabel="keys attended to while answering, %", xlim=(0, 100))
    loss.set(xlabel="keys attended to, %, as on the left", xlim=(0, 100))
    return beside_dense(figure, dense)
