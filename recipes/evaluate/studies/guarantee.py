"""Check the promise of a risk target: thresholds from one half of the documents, missed mass on the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from context import Context, Measurement, document, load
from matplotlib.figure import Figure
from page import Page, filled
from torch import Tensor

from patchattn import Policy, RiskTarget
from patchattn.calibration.risk import Curves, documents_needed, rungs
from patchattn.measuring.collect import settings_of
from patchattn.measuring.reading import Collecting, read_document
from patchattn.measuring.statistics import MARGINS, Totals

DOCUMENTS, LENGTH, SPLITS = 512, 1024, 100
HALF, PATCHED = DOCUMENTS // 2, 64
ALPHAS, SCOPES = (0.005, 0.01, 0.02, 0.05, 0.1), ("head", "model")
POLICY = Policy(sink_size=16, window_size=128, min_bulk=0)
RUNGS = torch.cat([torch.tensor([-torch.inf]), MARGINS, torch.tensor([torch.inf])])
STYLES = {
    "missed": ("D", "tab:green", "mean over splits, mean over heads"),
    "worst_head": ("^", "tab:red", "mean over splits, worst head"),
    "patched": ("x", "black", "patched model, mean over heads"),
}


@dataclass(frozen=True)
class Read:
    """Curves of one document on dense activations, see `curves_of`."""

    document: int
    curves: list[list[list[list[float]]]]


@dataclass(frozen=True)
class Row:
    """One risk target: missed mass and open fraction on the other half of the documents, and of the patched model.

    All are means over heads, over documents and, on the other half, over splits, but for the worst head and `by_split`.
    """

    alpha: float
    scope: str
    missed: float
    worst_head: float
    open: float
    by_split: tuple[float, ...]
    patched: float
    patched_worst_head: float
    patched_open: float


@cache
def settings() -> Any:
    """Say what is measured of the shipped model."""
    return settings_of(load(torch.bfloat16)[0], POLICY, (LENGTH,), 0.6, key_moments=False)[0]


def curves_of(at: int, margins: dict[int, Tensor] | None = None) -> Tensor:
    """Read one document; missed mass and open fraction of the guarded estimate, [2, layers, query_heads, rungs].

    Args:
        at: Which.
        margins: By layer, margins per head that gate the model; None for dense activations.
    """
    model, totals = load(torch.bfloat16)[0], Totals(settings())
    with Collecting(model, POLICY, settings(), margins=margins, estimate="guarded") as collecting:
        collecting.start(totals.add_document(0))
        read_document(model, torch.tensor(document("facts", LENGTH, f"guarantee/{at}").token_ids))
    return torch.stack([totals.sums["missed_mass"][0, 0], totals.sums["open_fraction"][0]]).float()


def read(_: Context, at: int) -> Read:
    """Measure one document on dense activations."""
    return Read(at, curves_of(at).tolist())


@cache
def dense_curves(work: Path) -> Tensor:
    """Return the curves of all documents, [2, documents, layers, query_heads, rungs]."""
    return torch.tensor([one.curves for one in READ.rows(Context(work, {}))]).transpose(0, 1)


def choose(curves: Tensor, target: RiskTarget) -> Tensor:
    """Choose a rung for each head from the curves of one half, [layers, query_heads, 1]."""
    missed, opened = curves
    halves = torch.stack([missed[::2].mean(0), missed[1::2].mean(0)])
    counts = (len(missed[::2]), len(missed[1::2]))
    return rungs(Curves(RUNGS, halves, opened.mean(0), counts), target)[..., None]


def measure(context: Context, alpha: float, scope: Any) -> Row:
    """Split the documents at random, choose on one half and look at the other; then gate the model and look again."""
    target, curves = RiskTarget(alpha=alpha, scope=scope), dense_curves(context.work)
    splits = []
    for split in range(SPLITS):
        order = torch.randperm(DOCUMENTS, generator=torch.Generator().manual_seed(split))
        chosen = choose(curves[:, order[:HALF]], target)
        splits.append(curves[:, order[HALF:]].mean(1).gather(-1, chosen.expand(2, -1, -1, -1))[..., 0])
    missed, opened = torch.stack(splits, dim=1)  # [splits, layers, query_heads]

    chosen = choose(curves[:, :HALF], target)
    margins = dict(zip(settings().layers, RUNGS[chosen[..., 0]], strict=True))
    patched = torch.stack([curves_of(HALF + at, margins) for at in range(PATCHED)]).mean(0)
    patched_missed, patched_open = patched.gather(-1, chosen.expand(2, -1, -1, -1))
    # What the promise is about: the mean over splits, per head or of the mean over heads.
    means = (missed.mean(), missed.mean(0).max(), opened.mean())
    patched_means = (patched_missed.mean(), patched_missed.max(), patched_open.mean())
    return Row(alpha, scope, *map(float, means), tuple(missed.mean((1, 2)).tolist()), *map(float, patched_means))


EVERY = [RiskTarget(alpha=alpha, scope=scope) for scope in SCOPES for alpha in ALPHAS]
TARGETS = [(target.alpha, target.scope) for target in EVERY if documents_needed(target) <= HALF]
READ = Measurement("guarantee-documents", Read, ("document",), lambda _: [(at,) for at in range(DOCUMENTS)], read)
ROWS = Measurement("guarantee", Row, ("alpha", "scope"), lambda _: TARGETS, measure)
MEASURED = (READ, ROWS)


def page(context: Context) -> Page:
    """Show what each target promises and keeps."""
    rows = ROWS.rows(context)
    return Page(filled(globals(), rows=rows), draw(rows))


def draw(rows: list[Row]) -> Figure:
    """Draw the distribution over splits as a share of alpha."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    for axes, scope in zip(figure.subplots(1, 2, sharey=True), SCOPES, strict=True):
        chosen = [row for row in rows if row.scope == scope]
        places = range(1, len(chosen) + 1)
        axes.boxplot([[value / row.alpha for value in row.by_split] for row in chosen], widths=0.5)
        for name, (marker, colour, label) in STYLES.items():
            shares = [getattr(row, name) / row.alpha for row in chosen]
            axes.plot(places, shares, marker, color=colour, label=label)
        axes.axhline(1, color="grey", linestyle=":")
        axes.set_xticks(places, [f"{row.alpha:g}" for row in chosen])
        axes.set_xlabel("alpha")
        axes.set_title(f'scope "{scope}"', fontsize=10)
        axes.set_ylim(0, 2.9)
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].legend(fontsize=8)
    figure.axes[0].set_ylabel("missed mass on held-out documents / alpha")
    return figure
