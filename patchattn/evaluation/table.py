"""The rows of the table at one length, as texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from patchattn.evaluation.cells import Cell
from patchattn.evaluation.page import number, with_interval
from patchattn.evaluation.statistics import Interval
from patchattn.evaluation.summary import Closeness, Summary
from patchattn.evaluation.tasks import TEXT_LOSS
from patchattn.policy import PHASES
from patchattn.report.counts import ratio

_NOTHING = "-"

Row = tuple[str, list[str]]
"""What is shown, and a text for each policy."""

MEANINGS = (
    "Scores: from 0 to 1, with the 95% Wilson interval. Drops: dense minus policy on the same samples, in points of a "
    "hundredth, with the 95% bootstrap interval; the worst task is the one that drops most.",
    "Agreement: tokens for which the policy and dense hold the same token the most likely, the true ones before it "
    "given. KL: mean KL(dense || policy), nats per token. Answer: over the tokens of the right answers.",
    "Text loss: nats per token; its change, text agreement and text KL with 95% bootstrap intervals over documents.",
    "Open: of the (query head, query) pairs that were asked, how many read keys beyond sink and window.",
    "Density: keys scored, of those that dense attention scores. Both are over all rows of the table.",
)
"""What the rows say."""

DRAFTS_MEAN = (
    "Same text: answers written token for token as dense attention writes them; level are others, of drafts, that part "
    "from it where its two best tokens lie no further apart than rounding moves them when it reads several tokens at "
    "once. Drafts: {} tokens each, all verified; kept are those that dense attention would have written."
)
"""What the rows say that are there for drafts only."""


def rows(
    tasks: Sequence[str],
    cells: Sequence[Mapping[str, Cell | None]],
    summaries: Sequence[Summary],
    *,
    drafts: bool,
) -> Iterator[Row]:
    """Yield the rows.

    Args:
        tasks: Tasks in the order of the table.
        cells: For each policy its cell of each task, None for none.
        summaries: What each policy's cells add up to.
        drafts: Whether to say what became of drafts.
    """
    asked = [task for task in tasks if task != TEXT_LOSS]
    for task in asked:
        yield task, [_score(found[task]) for found in cells]

    def row(name: str, text: Callable[[Summary], str]) -> Row:
        return name, [text(summary) for summary in summaries]

    if asked:
        yield row("mean", lambda it: number(it.mean_score, ".3f", unknown=_NOTHING))
        if any(len(it.mean_by_seed) > 1 for it in summaries):
            yield row("mean by seed", lambda it: f"{min(it.mean_by_seed):.3f} to {max(it.mean_by_seed):.3f}")
        yield row("drop of mean", lambda it: _signed(it.drop))
        yield row("worst task", lambda it: it.worst_task or _NOTHING)
        yield row("worst drop", lambda it: _signed(it.worst_drop))
        yield row("answer agreement", lambda it: _share(it.answers))
        yield row("answer KL", lambda it: _nats(it.answers))
        if drafts:
            yield row("same text", _same)
            yield row("drafts kept", lambda it: number(ratio(it.kept, it.drafted), ".1%", unknown=_NOTHING))
    if TEXT_LOSS in tasks:
        yield row("text loss", lambda it: number(it.text_loss, ".4f", unknown=_NOTHING))
        yield row("loss change", lambda it: _signed(it.loss_change, "+", "%"))
        yield row("text agreement", lambda it: _share(it.text))
        yield row("text KL", lambda it: _nats(it.text))
    for phase in PHASES:
        opened = [summary.counts[phase].open_fraction for summary in summaries]
        density = [summary.counts[phase].realised_density for summary in summaries]
        yield f"open, {phase}", [number(value, ".1%", unknown=_NOTHING) for value in opened]
        yield f"density, {phase}", [number(value, ".1%", unknown=_NOTHING) for value in density]


def _score(cell: Cell | None) -> str:
    return _NOTHING if cell is None else with_interval(Interval(cell.score, *cell.interval), ".2f")


def _same(found: Summary) -> str:
    level = f" + {found.level} level" if found.level else ""
    return f"{found.same}/{found.texts}{level}" if found.texts else _NOTHING


def _signed(found: Interval | None, plus: str = "", unit: str = "") -> str:
    """Write in hundredths what can be below zero."""
    return _NOTHING if found is None else _interval([100 * end for end in found], plus, ".1f", unit, between=", ")


def _share(found: Closeness | None) -> str:
    return _NOTHING if found is None else _interval([100 * end for end in found.top1], "", ".1f", "%", between="-")


def _nats(found: Closeness | None) -> str:
    # Predictions are kept in half precision, so that a KL of nothing can come out a little below zero.
    return (
        _NOTHING if found is None else _interval([round(end, 3) + 0.0 for end in found.kl], "", ".3f", "", between="-")
    )


def _interval(ends: Sequence[float], plus: str, how: str, unit: str, *, between: str) -> str:
    """Write an estimate; its interval too, unless all samples say the same."""
    value, low, high = (format(end, how) for end in ends)
    estimate = f"{ends[0]:{plus}{how}}{unit}"
    return estimate if value == low == high else f"{estimate} ({low}{between}{high})"
