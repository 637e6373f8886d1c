"""Is there a cheaper look at the far keys that comes nearer to the oracle of output cost than the probe does?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from context import Context
from matplotlib.figure import Figure
from page import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Page, filled, tidy
from studies.towards_the_oracle.judging import DIMENSIONS, JUDGED_ROWS, PROBE, SHARES, Judged
from studies.towards_the_oracle.patched import CONFIRMED, EVERY, PATCHED, READ, Patched
from studies.towards_the_oracle.ranking import KAPPA, candidates
from studies.towards_the_oracle.reading import COUNTS, LENGTH, REAL, SHIPPED
from studies.towards_the_oracle.reading import READ as DOCUMENTS_READ
from studies.towards_the_oracle.timing import KEYS, ROWS, TIMED, Timed

from patchattn.evaluation.statistics import Interval, ratio_of_sums
from patchattn.moments.gaussian import CHUNK

MEASURED = (DOCUMENTS_READ, JUDGED_ROWS, PATCHED, TIMED)
NAMES = {REAL: "SmolLM2-135M-Instruct", SHIPPED: "The shipped model"}
AT = 1
"""Which of `SHARES` candidates are compared at."""

SHOWN = {
    "margin": (GREY, "v-"),
    PROBE: (BLUE, "o-"),
    "probe, and change by 2 clusters": (SKY, "D-"),
    "probe, and change by sketch of 8": (ORANGE, "s-"),
    "probe, ajar by bounds": (GREEN, "h-"),
    "probe, ajar by scores": (PURPLE, "h:"),
    "exact change": (BLACK, "o:"),
    "exact price": (RED, "x:"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Take the folder of the real model."""
    parser.add_argument("--real-model", type=Path, required=True, help="what `python recipes/real_model.py` prints")


def page(context: Context) -> Page:
    """Show what each candidate leaves unpaid, what the best do in the model, and what looking takes."""
    rows, patched, times = JUDGED_ROWS.rows(context), PATCHED.rows(context), TIMED.rows(context)
    by_model = {name: summaries([row for row in rows if row.model == name], name) for name in NAMES}
    known = {name: {one.name: one for one in of_model} for name, of_model in by_model.items()}
    markdown = filled(
        globals(),
        real=by_model[REAL],
        shipped=by_model[SHIPPED],
        known=known[REAL],
        toy=known[SHIPPED],
        documents={name: of_model[0].documents if of_model else 0 for name, of_model in by_model.items()},
        confirmed=in_the_model(patched),
        times=timed(times),
        CHUNK=CHUNK,
        KAPPA=KAPPA,
        LENGTH=LENGTH,
        COUNTS=COUNTS,
        EVERY_TOKEN=EVERY,
        READ=READ,
    )
    tables = {"": rows, ".patched": patched, ".times": times}
    listed = {f"towards_the_oracle{name}": [vars(row) for row in of_table] for name, of_table in tables.items()}
    return Page(markdown, draw(by_model), listed, formats={"number": ".4g"})


def summaries(rows: Sequence[Judged], name: str) -> list[SimpleNamespace]:
    """Average candidates over documents, and compare them with the probe where as many keys are read."""
    found = []
    by_name = {one: [row for row in rows if row.candidate == one] for one in candidates(DIMENSIONS[name])}
    for candidate, of_candidate in by_name.items():
        if not of_candidate:
            continue
        beside = [row for row in by_name[PROBE] if row.document in {one.document for one in of_candidate}]
        by_open, by_read = (np.mean([getattr(row, by) for row in of_candidate], 0) for by in ("by_open", "by_read"))
        kinds = {row.kind for row in of_candidate}
        ratio = {kind: against(of_candidate, beside, kind) for kind in sorted(kinds)}
        worst = max(ratio, key=lambda kind: -1 if ratio[kind] is None else ratio[kind].value)
        found.append(
            SimpleNamespace(
                name=candidate,
                cost=of_candidate[0].cost or None,
                documents=len(of_candidate),
                closed=np.mean([row.closed for row in of_candidate]),
                by_open=by_open.tolist(),
                by_read=by_read.tolist(),
                ratio=None if candidate == PROBE else against(of_candidate, beside),
                worst=None if candidate == PROBE or ratio[worst] is None else f"{worst} {ratio[worst].value:.2f}",
            )
        )
    return found


def against(rows: Sequence[Judged], beside: Sequence[Judged], kind: str | None = None) -> Interval | None:
    """Divide what a candidate leaves by what the probe leaves where as many keys are read; None where it can't."""
    pairs = [
        (row.by_read[AT], other.by_read[AT])
        for row, other in zip(rows, beside, strict=True)
        if kind in (None, row.kind)
    ]
    return None if np.isnan(pairs).any() else ratio_of_sums(*zip(*pairs, strict=True))


def in_the_model(rows: Sequence[Patched]) -> list[dict[str, Any]]:
    """Average what candidates do in the patched model over documents."""
    found = []
    for model, shown in NAMES.items():
        for candidate in CONFIRMED:
            of_candidate = [row for row in rows if (row.model, row.candidate) == (model, candidate)]
            if of_candidate:
                names = ("open", "ajar", "read", "kl", "agrees", "kl_answers")
                means = {name: float(np.mean([getattr(row, name) for row in of_candidate])) for name in names}
                sums = {
                    name: sum(getattr(row, name) for row in of_candidate) for name in ("right", "right_dense", "asked")
                }
                found.append({"model": shown, "name": candidate, "documents": len(of_candidate), **means, **sums})
    return found


def timed(rows: Sequence[Timed]) -> list[dict[str, Any]]:
    """List looks with the time that each takes as a share of reading all keys in the faster way."""
    known = {(row.phase, row.keys, row.look): row.seconds for row in rows}
    places = [(phase, keys) for phase in ROWS for keys in KEYS]
    whole = {
        place: min(known.get((*place, look), np.nan) for look in ("read all", "read all, fused")) for place in places
    }
    looks = dict.fromkeys(row.look for row in rows)
    return [
        {"look": look, "at": [known.get((*place, look), np.nan) / whole[place] for place in places]} for look in looks
    ]


def draw(by_model: dict[str, list[SimpleNamespace]]) -> Figure:
    """Draw what is left against the share of keys read; as if exact changes and prices read nothing of closed pairs."""
    figure = Figure(figsize=(10.5, 4.6), dpi=150, layout="constrained")
    for axes, (name, of_model) in zip(figure.subplots(1, 2), by_model.items(), strict=True):
        for one in of_model:
            if one.name in SHOWN:
                colour, style = SHOWN[one.name]
                is_exact = one.name.startswith("exact")
                left, label = (one.by_open, f"{one.name}, for nothing") if is_exact else (one.by_read, one.name)
                shares = [100 * share for share in SHARES]
                axes.plot(shares, left, style, color=colour, markersize=5, label=label)
        axes.set_yscale("log")
        axes.set(
            title=NAMES[name],
            xlabel="far keys read, estimates included, %",
            ylabel="price of what is not read, nats per token",
        )
        tidy(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure
