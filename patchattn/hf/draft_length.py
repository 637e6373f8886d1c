"""How many tokens to draft: as many as pay, from what was accepted and what it took."""

from __future__ import annotations

from patchattn.report.drafts import DraftCounts

MOST = 8
"""The longest draft that is chosen by itself, tokens."""

_FIRST = 2
# What drafting may lose of the time of dense steps, and how many steps more where it pays on the whole, for drafts have
# good and bad luck; of what it won before, so many steps count.
_ALLOWED, _LUCK, _CREDIT = 0.01, 2, 5
# A dense step is timed at the start of each text, and again after so many rounds with a draft: it grows with the text.
_TIMED_AT_FIRST, _TIMED_EVERY = 2, 32
_NEW = 0.25
_OUTLIER = 2  # times what was expected, at which what a round took is cut off
_KEPT = 0.95


class DraftLength:
    """Chooses the length of each draft.

    With a draft of `d` tokens, each of which is kept with probability `a` if those before it were, a round writes
    `1 + a + ... + a^d` tokens in the seconds of `d` steps of drafting and one dense call over `d + 1` tokens. The
    length with the most tokens a second is taken; 0 where a plain dense step has more.

    Where that is 0, a draft of one token now and then sees whether it still is, for texts change: no more of them than
    lose one part in a hundred of the text's time. Nor does a draft that should pay begin where those before it in the
    same text lost more than that and two dense steps. What a first call takes longer than later ones, to compile or to
    get memory, is no loss in this sense.

    Args:
        fixed: Always draft so many tokens; None adapts.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.counts = DraftCounts()
        self._dense: float | None = None  # seconds of a dense step
        self._is_warm = False  # whether there was a draft
        self._step = self._wider = 0.0  # seconds of a step of drafting, and of one more token in the dense call
        self._tried, self._kept = 2.0, 1.8  # drafted tokens whose predecessors were kept, and those kept; fading
        self.begin()

    def begin(self) -> None:
        """Begin another text."""
        self._lost = self._seconds = 0.0
        self._until_timed = 0
        self._to_time = _TIMED_AT_FIRST

    def choose(self) -> tuple[int, str]:
        """Return the tokens to draft in this round; of none also why, one of `NO_DRAFT_REASONS`."""
        if self.fixed is not None:
            return self.fixed, ""
        if self._to_time or self._dense is None:
            return 0, "measuring"
        if not self._step:
            return _FIRST, ""  # twice, for the first draft is not timed
        best = max(range(MOST + 1), key=lambda length: self._tokens(length) / self._time(length))
        cost = -_LUCK * self._dense if best else self._time(1) - self._tokens(1) * self._dense
        return (best or 1, "") if self._lost + cost <= _ALLOWED * self._seconds else (0, "does not pay")

    def saw(self, drafted: int, accepted: int, drafting: float, verifying: float, why: str) -> None:
        """Learn from a round.

        Args:
            drafted: Tokens drafted.
            accepted: Those that were kept.
            drafting: Seconds of the draft.
            verifying: Seconds of the dense call.
            why: Why there was no draft.
        """
        if not drafted:
            self._saw_dense(verifying, why)
            return
        self.counts.add(drafted, accepted, drafting, verifying)
        self._tried = _KEPT * self._tried + min(accepted + 1, drafted)
        self._kept = _KEPT * self._kept + accepted
        if self.fixed is not None or not self._is_warm:
            self._is_warm = True
            return
        assert self._dense is not None  # it is timed before the first draft
        if self._step:
            drafting, verifying = (
                min(drafting, _OUTLIER * drafted * self._step),
                min(verifying, _OUTLIER * (self._dense + drafted * self._wider)),
            )
        self._step = _mean(self._step, drafting / drafted)
        self._wider = _mean(self._wider, max(0.0, verifying - self._dense) / drafted)
        dense = (accepted + 1) * self._dense
        self._lost = max(self._lost + drafting + verifying - dense, -_CREDIT * self._dense)
        self._seconds += dense
        self._until_timed -= 1
        if self._until_timed <= 0:
            self._to_time = 1

    def _saw_dense(self, seconds: float, why: str) -> None:
        self.counts.without_draft[why] = self.counts.without_draft.get(why, 0) + 1
        self.counts.dense_seconds += seconds
        if self._dense is not None:
            # The very first one may be a warm-up, later ones disturbed.
            seconds = min(seconds, _OUTLIER * self._dense) if self._is_warm else min(seconds, self._dense)
        self._dense = _mean(self._dense, seconds) if self._is_warm else seconds
        self._seconds += seconds
        self._to_time = max(0, self._to_time - 1)
        self._until_timed = _TIMED_EVERY

    def _tokens(self, length: int) -> float:
        acceptance = self._kept / self._tried
        return sum(acceptance**n for n in range(length + 1))

    def _time(self, length: int) -> float:
        return (self._dense or 0.0) + length * (self._step + self._wider)


def _mean(old: float | None, new: float) -> float:
    """Move a running mean; the first value is taken as it is."""
    return old + _NEW * (new - old) if old else new
