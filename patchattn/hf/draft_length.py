"""How many tokens to draft: as many as pay, from what was accepted and what it took."""

from __future__ import annotations

from patchattn.report.drafts import DraftCounts

MOST = 8
"""The longest draft that is chosen by itself, tokens."""

# What drafting may lose of the time of a text, and how many dense steps beside it where it pays on the whole, for
# drafts have good and bad luck; of what it won before, so many steps count.
_ALLOWED, _LUCK, _CREDIT = 0.01, 1, 5
# Dense steps are timed at the start of each text, and again after so many rounds with a draft: they grow with the text.
_TIMED_AT_FIRST, _TIMED_EVERY = 2, 32
_NEW = 0.25
_OUTLIER = 2  # times what was expected, at which what a round took is cut off
_KEPT = 0.95


class DraftLength:
    """Chooses the length of each draft.

    With a draft of `d` tokens, each of which is kept with probability `a` if those before it were, a round writes
    `1 + a + ... + a^d` tokens in the seconds of `d` steps of drafting and one dense call over `d + 1` tokens. The
    length with the most tokens a second is taken; 0 where a plain dense step has more.

    A draft begins only if the text stays within what may be lost even where nothing of the draft is kept: one part in a
    hundred of the text's time so far, and one dense step where drafting pays or was never tried. A longer draft than
    that allows is cut short. Where drafting does not pay, a draft of one token now and then sees whether it still
    doesn't, for texts change; it has the hundredth part alone. What a first call takes longer than later ones, to
    compile or to get memory, is no loss in this sense.

    Args:
        fixed: Always draft so many tokens; None adapts.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.counts = DraftCounts()
        # Seconds of a dense step, of a step of drafting, and of one more token in the dense call.
        self._dense, self._step, self._wider = _Mean(), _Mean(), _Mean()
        self._is_warm = False  # whether there was a draft
        self._tried, self._kept = 2.0, 1.8  # drafted tokens whose predecessors were kept, and those kept; fading
        self.begin()

    def begin(self) -> None:
        """Begin another text, which may be longer or shorter: what is measured in it replaces what was before."""
        self._lost = self._seconds = 0.0
        self._until_timed = 0
        self._to_time = _TIMED_AT_FIRST
        for mean in (self._dense, self._step, self._wider):
            mean.count = 0

    def choose(self) -> tuple[int, str]:
        """Return the tokens to draft in this round; of none also why, one of `NO_DRAFT_REASONS`."""
        if self.fixed is not None:
            return self.fixed, ""
        if self._to_time:
            return 0, "measuring"
        best = max(range(MOST + 1), key=lambda length: self._tokens(length) / self._time(length))
        may_pay = best or not self._step.value
        allowed = _ALLOWED * self._seconds + (_LUCK * self._dense.value if may_pay else 0.0)
        length = best or 1
        while length and self._lost + self._time(length) - self._dense.value > allowed:
            length -= 1
        return length, "" if length else "does not pay"

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
        if self.fixed is not None:
            return
        dense = self._dense.value
        if not self._is_warm:
            self._is_warm = True
            drafting, verifying = drafted * self._step_expected, dense
        else:
            drafting = min(drafting, _OUTLIER * drafted * self._step_expected)
            verifying = min(verifying, _OUTLIER * (dense + drafted * self._wider.value))
            self._step.add(drafting / drafted)
            self._wider.add(max(0.0, verifying - dense) / drafted)
        self._lost = max(self._lost + drafting + verifying - (accepted + 1) * dense, -_CREDIT * dense)
        self._seconds += (accepted + 1) * dense
        self._until_timed -= 1
        if self._until_timed <= 0:
            self._to_time = 1

    def _saw_dense(self, seconds: float, why: str) -> None:
        self.counts.without_draft[why] = self.counts.without_draft.get(why, 0) + 1
        self.counts.dense_seconds += seconds
        if self._dense.count == 1:
            # The very first one may be a warm-up.
            self._dense.value = min(seconds, self._dense.value)
        elif self._dense.count:
            seconds = min(seconds, _OUTLIER * self._dense.value)
        self._dense.add(seconds)
        self._seconds += seconds
        self._to_time = max(0, self._to_time - 1)
        self._until_timed = _TIMED_EVERY

    @property
    def _step_expected(self) -> float:
        """Seconds of a step of drafting; those of a dense one before any was timed."""
        return self._step.value or self._dense.value

    def _tokens(self, length: int) -> float:
        acceptance = self._kept / self._tried
        return sum(acceptance**n for n in range(length + 1))

    def _time(self, length: int) -> float:
        return self._dense.value + length * (self._step_expected + self._wider.value)


class _Mean:
    """A running mean of what was measured in a text; before that, what it was in the text before."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, new: float) -> None:
        """Take a measurement: the first one whole, later ones by their share, at least a quarter."""
        self.count += 1
        self.value += max(1 / self.count, _NEW) * (new - self.value)
