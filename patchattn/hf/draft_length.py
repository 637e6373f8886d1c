"""How many tokens to draft: as many as pay, from what was accepted and what it took."""

from __future__ import annotations

from statistics import median

from patchattn.report.drafts import DraftCounts

MOST = 8
"""The longest draft that is chosen by itself, tokens."""

# What drafting may lose of the time of a text, and how many dense steps beside it where it may pay, for drafts have
# good and bad luck; of what it won before, half may be lost again: what is won and lost is known to a tenth only.
_ALLOWED, _LUCK, _CREDIT = 0.01, 0.9, 0.5
# From this expected speed on, in that of dense steps, drafting may pay: what it is expected from is a guess.
_MAY_PAY = 0.97
# Dense steps are timed at the start of each text, and again after so many rounds with a draft: they grow with the text,
# and all that drafting takes is told in them.
_TIMED_AT_FIRST, _TIMED_EVERY, _TIMES_KEPT = 3, 8, 9
_OUTLIER = 2  # dense steps at which what a step of drafting took is cut off, and times what a dense call should take
# What of both is expected before anything was timed, as if it had been seen in four rounds; and again in each text, as
# in half a round more, so that what was slow by chance is not held against all texts to come.
_SAVED, _WIDER, _AGAIN = 1.0, 0.05, 0.5
_FEWEST = 0.05  # dense steps that a step of drafting takes at least


class DraftLength:
    """Chooses the length of each draft.

    With a draft of `d` tokens, each of which is kept with probability `a` if those before it were, a round writes
    `1 + a + ... + a^d` tokens in the seconds of `d` steps of drafting and one dense call over `d + 1` tokens. The
    length with the most tokens a second is taken.

    A draft begins only if the text stays within what may be lost even where nothing of the draft is kept: one part in a
    hundred of the text's time so far, and nearly one dense step where drafting may pay. A longer draft than that allows
    is cut short, and the first ones of a model are short anyway. What drafts win and lose is told from the mean times
    of all texts: those of a single round are noise, and what a first call takes longer than later ones, to compile or
    to get memory, is no loss.

    Before anything was timed, a step of drafting is expected to save what it reads less, and after that the same share
    of it: so what a long text showed tells what to expect of a short one.

    Args:
        fixed: Always draft so many tokens; None adapts.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.counts = DraftCounts()
        self._kept = _Mean(0.88, 8, keeps=0.97)  # drafted tokens that were kept, of those whose predecessors were
        # What a step of drafting saves, of what it reads less, and what one more token in the dense call takes, in
        # dense steps.
        self._saved, self._wider = (_Mean(value, 4 - _AGAIN, keeps=0.99) for value in (_SAVED, _WIDER))
        self._least = 1.0
        self._rounds = 0  # with a draft, in all texts
        self.begin()

    def begin(self) -> None:
        """Begin another text: dense steps are timed anew, and what is kept may be another share."""
        self._dense: list[float] = []
        self._verifying: list[float] = []
        self._to_time, self._until_timed = _TIMED_AT_FIRST, _TIMED_EVERY
        self._written = self._drafted = self._accepted = 0
        self._kept.forget(8)
        self._saved.add(_AGAIN * _SAVED, _AGAIN)
        self._wider.add(_AGAIN * _WIDER, _AGAIN)

    def choose(self, least: float) -> tuple[int, str]:
        """Choose the tokens to draft in this round.

        Args:
            least: What a step of drafting reads, of what a dense one does: weights, keys and values.

        Returns:
            Their number; of none also why, one of `NO_DRAFT_REASONS`.
        """
        self._least = least
        if self.fixed is not None:
            return self.fixed, ""
        if self._to_time:
            return 0, "measuring"
        length = max(range(1, min(MOST, self._rounds + 1) + 1), key=self._speed)
        allowed = _ALLOWED * self._written + (_LUCK if self._speed(length) > _MAY_PAY else 0.0)
        lost = self._drafted * self._price - self._accepted
        lost = max(lost, _CREDIT * lost)
        while length and lost + length * self._price > allowed:
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
        self._written += accepted + 1
        if not drafted:
            self.counts.without_draft[why] = self.counts.without_draft.get(why, 0) + 1
            self.counts.dense_seconds += verifying
            self._dense = [*self._dense, verifying][-_TIMES_KEPT:]
            self._to_time, self._until_timed = max(0, self._to_time - 1), _TIMED_EVERY
            return
        self.counts.add(drafted, accepted, drafting, verifying)
        self._kept.add(accepted, min(accepted + 1, drafted))
        self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted
        if self.fixed is not None:
            return
        self._verifying = [*self._verifying, verifying][-_TIMES_KEPT:]
        if self._rounds and self._least < 1:
            # A dense call over several tokens takes no less than one over a single token.
            dense = min(median(self._dense), median(self._verifying))
            step = min(drafting / drafted / dense, _OUTLIER)
            call = min(verifying / dense, _OUTLIER * (1 + drafted * self._wider.value))
            self._saved.add((1 - step) / (1 - self._least))
            self._wider.add((call - 1) / drafted)
        self._rounds += 1
        self._until_timed -= 1
        if self._until_timed <= 0:
            self._to_time = 1

    @property
    def _step(self) -> float:
        """What a step of drafting takes, in dense steps."""
        return max(_FEWEST, 1 - self._saved.value * (1 - self._least))

    @property
    def _price(self) -> float:
        """What one more drafted token takes, in dense steps."""
        return self._step + max(0.0, self._wider.value)

    def _speed(self, length: int) -> float:
        """Tokens a round writes in the time of a dense step, which writes one."""
        return sum(self._kept.value**n for n in range(length + 1)) / (1 + length * self._price)


class _Mean:
    """A mean of what is known beforehand and of what was seen, which fades.

    Args:
        value: What is known beforehand.
        count: As how many of those that are seen it counts.
        keeps: What remains of all that was before, with each that is seen.
    """

    def __init__(self, value: float, count: float, *, keeps: float) -> None:
        self._total, self._count, self._keeps = value * count, float(count), keeps

    @property
    def value(self) -> float:
        return self._total / self._count

    def add(self, total: float, count: float = 1) -> None:
        self._total, self._count = self._keeps * self._total + total, self._keeps * self._count + count

    def forget(self, most: float) -> None:
        """Let all that was seen count as no more than so many."""
        share = min(1.0, most / self._count)
        self._total, self._count = share * self._total, share * self._count
