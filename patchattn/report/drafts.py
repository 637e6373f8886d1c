"""What drafting did: how many tokens were drafted, how many of them dense attention kept, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patchattn.report.counts import ratio

NO_DRAFT_REASONS = ("short", "measuring", "does not pay", "last token")
"""Why a round had no draft: the text is too short for a head to close; a dense step is timed, which drafting is judged
by; drafting takes longer than it saves; only one token was left to write, or the first one drafted ends the text."""


@dataclass
class DraftCounts:
    """Counts of a drafting model; a round is a draft and the dense call that checks it.

    Args:
        rounds: Rounds with a draft.
        drafted: Tokens that were drafted.
        accepted: Drafted tokens that dense attention kept.
        drafting_seconds: Seconds spent on drafts.
        verifying_seconds: Seconds spent on the dense calls of these rounds.
        dense_seconds: Seconds spent on dense steps without a draft.

    `without_draft` counts those steps by reason; see `NO_DRAFT_REASONS`.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0
    dense_seconds: float = 0.0
    without_draft: dict[str, int] = field(default_factory=dict, init=False)

    def add(self, drafted: int, accepted: int, drafting: float, verifying: float) -> None:
        """Add a round with a draft; the times are in seconds."""
        self.rounds, self.drafted, self.accepted = self.rounds + 1, self.drafted + drafted, self.accepted + accepted
        self.drafting_seconds, self.verifying_seconds = (
            self.drafting_seconds + drafting,
            self.verifying_seconds + verifying,
        )

    @property
    def acceptance(self) -> float:
        """Drafted tokens that were kept, a fraction; NaN without a draft."""
        return ratio(self.accepted, self.drafted)

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round with a draft wrote: those kept, and one of the dense call; NaN without a draft."""
        return ratio(self.accepted + self.rounds, self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-ready values; numbers that are unknown are None."""
        fractions = {"acceptance": self.acceptance, "tokens_per_round": self.tokens_per_round}
        known = {name: value if value == value else None for name, value in fractions.items()}
        return {**vars(self), "without_draft": dict(self.without_draft), **known}

    def __str__(self) -> str:
        """Return a line or two."""
        lines = []
        if self.rounds:
            lines.append(
                f"drafts: {self.rounds} rounds, {self.accepted} of {self.drafted} drafted tokens kept "
                f"({100 * self.acceptance:.1f}%), {self.tokens_per_round:.2f} tokens a round, "
                f"{self.drafting_seconds:.1f} s of drafting and {self.verifying_seconds:.1f} s of verifying"
            )
        if self.without_draft:
            why = ", ".join(f"{count} ({reason})" for reason, count in self.without_draft.items())
            lines.append(f"dense steps without a draft: {why}, {self.dense_seconds:.1f} s")
        return "\n".join(lines or ["drafts: none yet"])
