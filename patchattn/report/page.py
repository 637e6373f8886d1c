"""The page of a report: one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from patchattn.policy import Policy
from patchattn.report.counts import LayerCounts
from patchattn.report.timeline import Timeline

_TEMPLATE = Path(__file__).with_name("template")
# Anything that could end the script element, or that old parsers take for the end of a line.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


@runtime_checkable
class KnowsRisks(Protocol):
    """What a page asks of a `patchattn.Calibration`."""

    def risk_curve(self, policy: Policy, heads: Mapping[int, int]) -> dict[str, Any]:
        """Return the points of the curve of what a risk costs, for these numbers of query heads by layer."""
        ...


def page_of(
    title: str,
    plain: str,
    facts: dict[str, Any],
    timeline: Timeline | None,
    texts: Sequence[str] | None,
    risk: dict[str, Any] | None,
) -> str:
    """Fill the template.

    Args:
        title: Heading.
        plain: The report as text, for readers without scripts.
        facts: What was counted, JSON-ready.
        timeline: Decisions by token; None leaves them out.
        texts: Text of each token of the timeline; None leaves the text out.
        risk: The curve of what a risk costs; None leaves it out.
    """
    shown = {"timeline": None if timeline is None else _timeline(timeline, texts), "risk": risk}
    data = {"title": title, **facts, **shown}
    parts = {
        "TITLE": html.escape(title),
        "PLAIN": html.escape(plain),
        "STYLE": _part("style.css"),
        "SCRIPT": _part("script.js"),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES),
    }
    # In one go, so that nothing in one part is taken for the place of another.
    pieces = _part("page.html").split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _part(name: str) -> str:
    return (_TEMPLATE / name).read_text(encoding="utf-8")


def view_of(counts: Collection[LayerCounts], savings: dict[str, int] | None) -> dict[str, Any]:
    """Return what the page shows of one phase or both.

    Args:
        counts: Of each layer.
        savings: Estimated work of attention, None where it is not known.
    """
    return {
        "open": [c.open_pairs for c in counts],
        "asked": [c.asked for c in counts],
        "below": [c.below_break_even for c in counts],
        "scored": [c.scored_keys for c in counts],
        "causal": [c.causal_keys for c in counts],
        "calls": sum(c.gated_calls for c in counts),
        "savings": savings,
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
