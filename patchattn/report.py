"""What the gates did: counts per layer and head, as text, dictionary and picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from patchattn.policy import Phase, Policy

_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class LayerCounts:
    """Counts of one layer in one phase.

    Args:
        open_pairs: Per query head, the pairs that were asked and opened.
        asked: Queries with enough bulk keys, so the pairs asked per query head.
        below_break_even: Queries that opened without being asked, for lack of bulk keys.
        scored_keys: (query head, query, key) triples whose score was really computed.
        causal_keys: Triples that dense attention has to score.
        gated_calls: Calls that went through the gate.
    """

    open_pairs: tuple[int, ...]
    asked: int
    below_break_even: int
    scored_keys: int
    causal_keys: int
    gated_calls: int


@dataclass(frozen=True)
class GateReport:
    """What the gates of a patched model did.

    Args:
        policy: The policy in force.
        backend: The backend in use.
        layers: Counts by layer and phase, of the patched layers.
        dense_calls: Calls that attended densely, by layer and reason.
        timeline: By layer, (phase, open pairs [batch, heads, query]) of each gated call, if it was recorded.
    """

    policy: Policy
    backend: str
    layers: dict[int, dict[Phase, LayerCounts]]
    dense_calls: dict[int, dict[str, int]]
    timeline: dict[int, list[Any]]

    @classmethod
    def of(cls, states: dict[int, Any], policy: Policy, backend: str) -> GateReport:
        """Read the counters of the layers' states, `patchattn.hf.attention.LayerState` by layer index."""
        layers, dense = {}, {}
        for index, state in states.items():
            dense[index] = {
                reason: int(calls)
                for reason, calls in zip(state.dense_reasons, state.dense_calls, strict=True)
                if calls
            }
            if not state.gated:
                continue
            layers[index] = {
                phase: LayerCounts(
                    tuple(state.open_pairs[row].tolist()),
                    int(state.asked[row]),
                    int(state.below[row]),
                    int(state.scored[row]),
                    int(state.causal[row]),
                    int(state.gated_calls[row]),
                )
                for row, phase in enumerate(_PHASES)
            }
        timeline = {index: list(state.timeline) for index, state in states.items()}
        return cls(policy, backend, layers, dense, timeline)

    def open_fraction(self, phase: Phase | None = None) -> float:
        """Open pairs over pairs that were asked, in one phase or both; NaN if none was asked."""
        counts = self._counts(phase)
        return _ratio(sum(sum(c.open_pairs) for c in counts), sum(c.asked * len(c.open_pairs) for c in counts))

    def realised_density(self, phase: Phase | None = None) -> float:
        """Keys really scored over causal keys, in one phase or both; NaN if unknown; its inverse limits the speed."""
        counts = self._counts(phase)
        return _ratio(sum(c.scored_keys for c in counts), sum(c.causal_keys for c in counts))

    def head_open_fractions(self, phase: Phase | None = None) -> dict[int, list[float]]:
        """Open fraction by layer and query head."""
        fractions = {}
        for layer, by_phase in self.layers.items():
            chosen = [counts for name, counts in by_phase.items() if phase in (None, name)]
            asked = sum(counts.asked for counts in chosen)
            opened = zip(*(counts.open_pairs for counts in chosen), strict=True)
            fractions[layer] = [_ratio(sum(pairs), asked) for pairs in opened]
        return fractions

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the timeline as JSON-ready values; numbers that are unknown are None."""
        return {
            "backend": self.backend,
            "policy": self.policy.model_dump(mode="json"),
            "phases": {
                phase: {
                    "open_fraction": _known(self.open_fraction(phase)),
                    "realised_density": _known(self.realised_density(phase)),
                    "asked_pairs": sum(c.asked * len(c.open_pairs) for c in self._counts(phase)),
                    "below_break_even_queries": sum(c.below_break_even for c in self._counts(phase)),
                    "gated_calls": sum(c.gated_calls for c in self._counts(phase)),
                    "heads": {
                        str(layer): [_known(value) for value in heads]
                        for layer, heads in self.head_open_fractions(phase).items()
                    },
                }
                for phase in _PHASES
            },
            "dense_calls": {str(layer): reasons for layer, reasons in self.dense_calls.items()},
        }

    def plot(self, path: str | Path, *, phase: Phase | None = None, title: str | None = None) -> Path:
        """Draw the open fraction of every head, layers downwards and heads across, and save it.

        Args:
            path: Where to save; the suffix decides the format.
            phase: `"prefill"`, `"decode"`, or None for both.
            title: Title of the picture.

        Returns:
            The path.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plot() needs matplotlib: pip install "patchattn[plot]"') from error
        fractions = self.head_open_fractions(phase)
        layers, width = list(fractions), max((len(heads) for heads in fractions.values()), default=1)
        grid = [heads + [float("nan")] * (width - len(heads)) for heads in fractions.values()] or [[float("nan")]]
        figure = Figure(figsize=(max(5.5, 0.62 * width + 2.2), max(3.2, 0.5 * len(layers) + 1.8)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(width))
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        if width * len(layers) <= 400:
            for row, heads in enumerate(grid):
                for column, value in enumerate(heads):
                    if value == value:
                        colour = "black" if value > 0.6 else "white"
                        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        where = phase or "prefill and decode"
        overall = self.open_fraction(phase)
        axes.set_title(title or f"Open fraction per head, {where}: {100 * overall:.1f}% of pairs open", fontsize=11)
        figure.colorbar(image, ax=axes, label="open fraction")
        path = Path(path)
        figure.savefig(path, dpi=150)
        return path

    def __str__(self) -> str:
        """Return a short table."""
        lines = [f"patchattn report ({self.backend})"]
        for phase in _PHASES:
            counts = self._counts(phase)
            if not sum(c.gated_calls for c in counts):
                continue
            lines.append(
                f"  {phase}: {_percent(self.open_fraction(phase))} of pairs open, "
                f"realised density {_percent(self.realised_density(phase))}, "
                f"{sum(c.below_break_even for c in counts)} queries below break-even"
            )
            for layer, heads in self.head_open_fractions(phase).items():
                lines.append(f"    layer {layer:>3}: " + " ".join(f"{_percent(value):>6}" for value in heads))
        dense = {}
        for reasons in self.dense_calls.values():
            for reason, calls in reasons.items():
                dense[reason] = dense.get(reason, 0) + calls
        if dense:
            lines.append("  dense layer calls: " + ", ".join(f"{calls} ({reason})" for reason, calls in dense.items()))
        return "\n".join(lines)

    def _counts(self, phase: Literal["prefill", "decode"] | None) -> list[LayerCounts]:
        return [c for by_phase in self.layers.values() for name, c in by_phase.items() if phase in (None, name)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _known(value: float) -> float | None:
    return value if value == value else None


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}%"
