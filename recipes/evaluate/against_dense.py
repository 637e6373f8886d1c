"""Facts and text loss beside dense attention: two panels over what was paid for them.

A row has `right` facts of those `asked`, and `losses`, the text loss of each document in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure

from patchattn.evaluation.statistics import Interval, relative_change


def told(row: Any, dense: Any, **more: Any) -> SimpleNamespace:
    """Return what a row has, its `facts` and the change of its `loss`, None where it was not measured, and more."""
    loss = relative_change(row.losses, dense.losses) if row.losses else None
    return SimpleNamespace(**vars(row) | more, facts=row.facts, loss=loss)


def draw_intervals(axes: Any, paid: Sequence[float], found: Sequence[Interval], **look: Any) -> None:
    """Draw estimates with their intervals over what was paid for them, in percent."""
    reach = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
    paid, values = [100 * part for part in paid], [one.value for one in found]
    axes.errorbar(paid, values, reach, capsize=2, elinewidth=0.8, markersize=5, **look)


def finish(figure: Figure, dense: Any) -> Figure:
    """Add names and the levels of dense attention to two axes, facts and change of the text loss."""
    facts, loss = figure.axes
    facts.axhline(dense.right / dense.asked, color="black", linestyle=":", label="dense")
    loss.axhline(0, color="black", linestyle=":")
    facts.set(ylabel="facts answered exactly", ylim=(-0.03, 1.03))
    loss.set(ylabel="text loss against dense, %")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.legend(*facts.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure
