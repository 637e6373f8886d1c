"""What was counted in one layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


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

    def __add__(self, other: LayerCounts) -> LayerCounts:
        """Add another phase of the same layer."""
        return LayerCounts(
            tuple(sum(pairs) for pairs in zip(self.open_pairs, other.open_pairs, strict=True)),
            self.asked + other.asked,
            self.below_break_even + other.below_break_even,
            self.scored_keys + other.scored_keys,
            self.causal_keys + other.causal_keys,
            self.gated_calls + other.gated_calls,
        )

    @property
    def asked_pairs(self) -> int:
        """Pairs that were asked, of all query heads."""
        return self.asked * len(self.open_pairs)

    @property
    def realised_density(self) -> float:
        """Keys really scored over causal keys; NaN if there were none."""
        return ratio(self.scored_keys, self.causal_keys)


def ratio(part: float, whole: float) -> float:
    """Divide; NaN where there is nothing to divide by."""
    return part / whole if whole else float("nan")


def over_layers(by_layer: dict[int, dict[str, int]]) -> dict[str, int]:
    """Add up over layers what is counted by reason."""
    total: Counter[str] = Counter()
    for reasons in by_layer.values():
        total.update(reasons)
    return dict(total)
