"""What the gates did: counts per layer and head, as text, dictionary, pictures and a page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from patchattn.errors import ReportError
from patchattn.policy import PHASES, Phase, Policy
from patchattn.report import pictures
from patchattn.report.counts import LayerCounts, over_layers, ratio
from patchattn.report.drafts import DraftCounts
from patchattn.report.page import KnowsRisks, page_of, view_of
from patchattn.report.savings import HeadShape, Savings, of_keys
from patchattn.report.timeline import Head, Timeline, fitting_texts, timeline_of
from patchattn.writing import check_path, write_text

_WHOLE_TILES = (
    "Density above 100% in {}: keys are scored in whole tiles, and on a text this short the tiles at the borders of "
    "sink and window hold more keys than closed heads leave out."
)
_EXPECTED = "Expected KL to the dense model: {:.2g} nats per token, on text like the calibration's, read in one go."
_CUT = "The timeline ends early: there was no more room for decisions. Call reset_report() before what you want to see."


@dataclass(frozen=True)
class GateReport:
    """What the gates of a patched model did.

    Args:
        policy: The policy in force.
        backend: The backend in use.
        layers: Counts by layer and phase, of the patched layers.
        dense_calls: Calls that attended densely, by layer and reason.
        rebuilt: Steps of decode whose prompt moments had to be taken from all keys again, by layer and reason.
        timeline: By layer, (phase, open pairs [batch, heads, query]) of each gated call, if it was recorded.
        shapes: By layer, the sizes of its heads, for estimates of the work saved; empty if they are not known.
        expected_kl: KL to dense that the calibration expects of the policy, nats per token; None where it says nothing.
        drafts: What was drafted and accepted, of a model that drafts; else None.
        timeline_is_cut: Whether the timeline ends early, because what was run had more tokens than there is room for.
    """

    policy: Policy
    backend: str
    layers: dict[int, dict[Phase, LayerCounts]]
    dense_calls: dict[int, dict[str, int]]
    timeline: dict[int, list[Any]]
    shapes: dict[int, HeadShape] = field(default_factory=dict)
    timeline_is_cut: bool = False
    rebuilt: dict[int, dict[str, int]] = field(default_factory=dict)
    expected_kl: float | None = None
    drafts: DraftCounts | None = None

    def counts(self, phase: Phase | None = None) -> dict[int, LayerCounts]:
        """Return the counts of each layer in one phase, or of both phases together."""
        chosen = {
            layer: [found for name, found in by_phase.items() if phase in (None, name)]
            for layer, by_phase in self.layers.items()
        }
        return {layer: reduce(add, found) for layer, found in chosen.items() if found}

    def open_fraction(self, phase: Phase | None = None) -> float:
        """Open pairs over pairs that were asked, in one phase or both; NaN if none was asked."""
        counts = self.counts(phase).values()
        return ratio(sum(sum(c.open_pairs) for c in counts), sum(c.asked_pairs for c in counts))

    def realised_density(self, phase: Phase | None = None) -> float:
        """Keys really scored over causal keys, in one phase or both; NaN if unknown; its inverse limits the speed."""
        counts = self.counts(phase).values()
        return ratio(sum(c.scored_keys for c in counts), sum(c.causal_keys for c in counts))

    def head_open_fractions(self, phase: Phase | None = None) -> dict[int, list[float]]:
        """Open fraction by layer and query head."""
        return {
            layer: [ratio(opened, found.asked) for opened in found.open_pairs]
            for layer, found in self.counts(phase).items()
        }

    def below_break_even(self, phase: Phase | None = None) -> int:
        """Queries that opened without being asked, for lack of bulk keys, summed over layers."""
        return sum(c.below_break_even for c in self.counts(phase).values())

    def savings(self, phase: Phase | None = None, *, shape: HeadShape | None = None) -> Savings:
        """Estimate the work of attention that gated calls saved; see `Savings` for what is counted and what is not.

        Args:
            phase: `"prefill"`, `"decode"`, or None for both.
            shape: Sizes of the heads; None takes those of the model.

        Raises:
            ReportError: The sizes of the heads are not known.
        """
        found = Savings(0, 0, 0, 0)
        for layer, by_phase in self.layers.items():
            known = shape or self.shapes.get(layer)
            if known is None:
                raise ReportError(
                    f"The report does not know the sizes of the heads of layer {layer}.",
                    fix="pass shape=HeadShape(dim, value_dim, group_size, bytes_per_number)",
                )
            for name, counts in by_phase.items():
                if phase in (None, name):
                    found += of_keys(counts.scored_keys, counts.causal_keys, known, name)
        return found

    def timeline_of(self, heads: Iterable[Head] | None = None, *, row: int = 0) -> Timeline:
        """Say for each token which heads read the far keys.

        Args:
            heads: (layer, query head) pairs, both counted from 0; None means all.
            row: Row of the batch.

        Raises:
            ReportError: Nothing was recorded (patch with `record="timeline"`), or there is no such head or row.
        """
        return timeline_of(self.timeline, heads, row)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the timeline as JSON-ready values; numbers that are unknown are None."""
        return {
            "backend": self.backend,
            "policy": self.policy.model_dump(mode="json"),
            "expected_kl": self.expected_kl,
            "drafts": None if self.drafts is None else self.drafts.to_dict(),
            "phases": {phase: self._phase_dict(phase) for phase in PHASES},
            "dense_calls": {str(layer): reasons for layer, reasons in self.dense_calls.items()},
            "rebuilt": {str(layer): reasons for layer, reasons in self.rebuilt.items()},
        }

    def _phase_dict(self, phase: Phase) -> dict[str, Any]:
        counts = self.counts(phase)
        return {
            "open_fraction": _known(self.open_fraction(phase)),
            "realised_density": _known(self.realised_density(phase)),
            "asked_pairs": sum(c.asked_pairs for c in counts.values()),
            "below_break_even_queries": self.below_break_even(phase),
            "gated_calls": sum(c.gated_calls for c in counts.values()),
            "estimated_attention": self._known_savings(phase),
            "heads": {
                str(layer): [_known(value) for value in heads]
                for layer, heads in self.head_open_fractions(phase).items()
            },
            "layers": {
                str(layer): {
                    "open_pairs": list(found.open_pairs),
                    "asked_queries": found.asked,
                    "below_break_even_queries": found.below_break_even,
                    "scored_keys": found.scored_keys,
                    "causal_keys": found.causal_keys,
                    "realised_density": _known(found.realised_density),
                    "gated_calls": found.gated_calls,
                }
                for layer, found in counts.items()
            },
        }

    def save_json(self, path: str | Path) -> Path:
        """Save what `to_dict` returns.

        Raises:
            ReportError: The file can't be written.
        """
        return write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def plot(self, path: str | Path, *, phase: Phase | None = None, title: str | None = None) -> Path:
        """Draw the open fraction of every head, layers downwards and heads across, and save it.

        Args:
            path: Where to save; the suffix decides the format.
            phase: `"prefill"`, `"decode"`, or None for both.
            title: Title of the picture.

        Returns:
            The path.

        Raises:
            ReportError: Nothing was counted, or the file can't be written.
            MissingPackageError: matplotlib is not installed.
        """
        self.check_counted()
        where, overall = phase or "prefill and decode", self.open_fraction(phase)
        asked = f"{100 * overall:.1f}% of pairs open" if overall == overall else "no query was asked"
        return pictures.save_heads(
            self.head_open_fractions(phase), check_path(path), title or f"Open fraction per head, {where}: {asked}"
        )

    def plot_timeline(
        self, path: str | Path, *, heads: Iterable[Head] | None = None, row: int = 0, title: str | None = None
    ) -> Path:
        """Draw which heads read the far keys for which tokens, tokens across and heads downwards, and save it.

        Args:
            path: Where to save; the suffix decides the format.
            heads: (layer, query head) pairs, both counted from 0; None means all.
            row: Row of the batch.
            title: Title of the picture.

        Returns:
            The path.

        Raises:
            ReportError: No timeline was recorded, there is no such head or row, or the file can't be written.
            MissingPackageError: matplotlib is not installed.
        """
        return pictures.save_timeline(self.timeline_of(heads, row=row), check_path(path), title)

    def to_html(
        self,
        path: str | Path,
        *,
        tokens: Any = None,
        tokenizer: Any = None,
        row: int = 0,
        calibration: KnowsRisks | None = None,
        title: str = "What the gates did",
    ) -> Path:
        """Save one page that needs no network: heads, decisions over the text, risk, policy and dense calls.

        Args:
            path: Where to save.
            tokens: What the model read in the gated calls, one entry per token: ids with a `tokenizer`, texts without.
                The last token that a model wrote, which it never read, may be included. None leaves the text out.
            tokenizer: Decodes ids.
            row: Row of the batch whose timeline is shown.
            calibration: A `patchattn.Calibration`; adds the curve of what a risk costs.
            title: Heading of the page.

        Returns:
            The path.

        Raises:
            ReportError: Nothing was counted, the tokens do not fit the timeline, or the file can't be written.
            CalibrationMismatchError: The calibration is of other layers or heads, or of another sink or window.
        """
        self.check_counted()
        path = check_path(path)
        timeline = self.timeline_of(row=row) if tokens is not None or any(self.timeline.values()) else None
        texts = None
        if timeline is not None and tokens is not None:
            texts = fitting_texts(tokens, tokenizer, len(timeline.phases), is_cut=self.timeline_is_cut)
        heads = {layer: len(found.open_pairs) for layer, found in self.counts().items()}
        facts = {
            "backend": self.backend,
            "notes": self.notes(),
            "policy": self.policy.model_dump(mode="json"),
            "layers": list(heads.items()),
            "views": {
                phase or "both": view_of(self.counts(phase).values(), self._known_savings(phase))
                for phase in (None, *PHASES)
            },
            "dense": list(self.dense_calls_by_reason().items()),
        }
        risk = None if calibration is None else self._risk(calibration, heads)
        return write_text(path, page_of(title, str(self), facts, timeline, texts, risk))

    def _risk(self, calibration: Any, heads: dict[int, int]) -> dict[str, Any]:
        if not isinstance(calibration, KnowsRisks):
            raise ReportError(
                f"Expected a patchattn.Calibration, got {type(calibration).__name__}.",
                fix="pass patchattn.Calibration.from_pretrained(...)",
            )
        return calibration.risk_curve(self.policy, heads)

    def check_counted(self) -> None:
        """Refuse a report of a model that did not run, or ran with `record=None`.

        Raises:
            ReportError: Says which of the two.
        """
        counts = self.counts().values()
        if any(c.causal_keys for c in counts):
            return
        if any(c.gated_calls for c in counts):
            raise ReportError("Nothing was counted.", fix='patch with record="summary" or record="timeline"')
        if not any(self.dense_calls.values()):
            raise ReportError(
                "The report is empty: the patched model did not run.",
                fix="run the model before asking for the report, and after reset_report()",
            )

    def __str__(self) -> str:
        """Return a short table."""
        lines = [f"patchattn report (backend {self.backend}{self._heads()})"]
        if self.drafts is not None:
            lines.append("  " + str(self.drafts).replace("\n", "\n  "))
        for phase in PHASES:
            if not any(c.gated_calls for c in self.counts(phase).values()):
                continue
            lines.append(
                f"  {phase}: {_percent(self.open_fraction(phase))} of pairs open, "
                f"realised density {_percent(self.realised_density(phase))}, "
                f"{self.below_break_even(phase)} queries below break-even"
            )
            for layer, heads in self.head_open_fractions(phase).items():
                lines.append(f"    layer {layer:>3}: " + " ".join(f"{_percent(value):>6}" for value in heads))
        dense = self.dense_calls_by_reason()
        if dense:
            lines.append("  dense layer calls: " + ", ".join(f"{calls} ({reason})" for reason, calls in dense.items()))
        rebuilt = self.rebuilt_by_reason()
        if rebuilt:
            steps = ", ".join(f"{count} ({reason})" for reason, count in rebuilt.items())
            lines.append(f"  decode steps of a layer that took their moments from all keys again: {steps}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes())])

    def notes(self) -> list[str]:
        """Explain, a sentence each, what a reader of these numbers may stumble over; empty if there is nothing."""
        notes = []
        if self.expected_kl is not None:
            notes.append(_EXPECTED.format(self.expected_kl))
        crowded = [phase for phase in PHASES if self.realised_density(phase) > 1]
        if crowded:
            notes.append(_WHOLE_TILES.format(" and ".join(crowded)))
        if self.timeline_is_cut:
            notes.append(_CUT)
        return notes

    def _heads(self) -> str:
        """Say what kind of heads the backend computed."""
        kinds = {(shape.dim, shape.group_size, shape.dtype) for shape in self.shapes.values()}
        return "".join(f"; heads of {dim}, {group} to a KV head, {dtype}" for dim, group, dtype in sorted(kinds))

    def dense_calls_by_reason(self) -> dict[str, int]:
        """Count the calls of layers that attended densely, by reason."""
        return over_layers(self.dense_calls)

    def rebuilt_by_reason(self) -> dict[str, int]:
        """Count the steps of decode, one for each layer, whose prompt moments had to be taken anew, by reason.

        Each costs a pass over all keys of its layer. `never kept` is expected once for each text, at the first step
        that is asked after dense ones; many mean that the moments do not stay with the cache.
        """
        return over_layers(self.rebuilt)

    def _known_savings(self, phase: Phase | None) -> dict[str, int] | None:
        return asdict(self.savings(phase)) if self.layers.keys() <= self.shapes.keys() else None


def _known(value: float) -> float | None:
    return value if value == value else None


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}%"
