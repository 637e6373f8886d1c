"""Which heads of a real model read far back, and when: in a long text, in some passages, to answer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from context import Context
from page import Page, filled
from studies.quality import measuring as quality
from studies.quality.documents import FOLLOWING
from studies.quality.measuring import RANKING_THRESHOLD, Ranked
from studies.swing.drawing import DRAWN, draw, named
from studies.swing.measuring import DECIDED, DOCUMENTS, QUERIES, SHOWN, STRETCH, TOP, TOP_KEYS, Decided, TopKeys

from patchattn.report import Stretches

RANKED = replace(quality.RANKED, jobs=lambda _: SHOWN)
MEASURED = (RANKED, DECIDED, TOP_KEYS)

CLOSED, OPEN = 0.05, 0.95
EARLY, LATE = 0.2, 0.8
MOST = 10
NEAR = 16
FAR_APART = 0.5

KINDS = {
    "reading": "a document, all of it",
    "early": "its first quarter",
    "late": "its last quarter",
    "following": "the text that goes on",
    "asked": "questions and answers",
}
BESIDE = {"reading": "documents", "needles": "appended to prose", "code": "to code", "chat": "to a chat"}

Columns = dict[str, np.ndarray]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Take the folder of the real model."""
    parser.add_argument("--real-model", type=Path, required=True, help="what `python recipes/real_model.py` prints")


def of_document(row: Decided) -> Columns:
    """Return open fractions of the heads by what they do, and how much they swing, [heads] each."""
    stretches = np.array(row.stretches)
    quarter = stretches.shape[1] // 4
    return {
        "reading": np.array(row.context),
        "early": stretches[:, :quarter].mean(1),
        "late": stretches[:, -quarter:].mean(1),
        "asked": np.average(row.questions, axis=1, weights=row.asked),
        "following": np.array(row.following),
        "swing": Stretches(row.begin, torch.tensor(row.stretches)).swing.numpy(),
    }


def of_heads(rows: Sequence[Decided]) -> Columns:
    """Return the columns of documents by task, as `NAME_TASK`, and as `NAME` their means over the tasks."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    by_task = [_mean([of_document(row) for row in rows if row.task == task]) for task in tasks]
    named = {
        f"{name}_{task}": column
        for task, columns in zip(tasks, by_task, strict=True)
        for name, column in columns.items()
    }
    return _mean(by_task) | named


def _mean(listed: Sequence[Columns]) -> Columns:
    return {name: np.mean([columns[name] for columns in listed], axis=0) for name in listed[0]}


def beside_exact(rows: Sequence[Decided], exact: Ranked) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what the gate and the exact mass open on the same documents: read, and appended by task, [heads] each."""
    shared = [row for row in rows if row.document == DOCUMENTS[0]]
    read = np.mean([row.context for row in shared], axis=0)
    found = {"reading": (read, np.ravel(exact.context))}
    for row in shared:
        pieces, tokens = np.column_stack([row.questions, row.following]), [*row.asked, row.followed]
        found[row.task] = np.average(pieces, axis=1, weights=tokens), np.ravel(exact.asked[row.task])
    return found


def at_files(rows: Sequence[Decided], heads: Sequence[int]) -> list[tuple[float, float]]:
    """Return how often heads are open in the `NEAR` stretches before and after each file begins, where there are."""
    found = []
    for row in rows:
        stretches = np.array(row.stretches)[heads].mean(0)
        begins = ((token - row.begin) // STRETCH for token in row.files)
        near = [at for at in begins if NEAR <= at <= len(stretches) - NEAR]
        found += [(stretches[at - NEAR : at].mean(), stretches[at : at + NEAR].mean()) for at in near]
    return found


def of_top_keys(rows: Sequence[TopKeys], heads: np.ndarray) -> dict[str, float]:
    """Return share and relative length of values of the keys that chosen heads read most, [heads] bool, and a count."""
    means = {name: np.mean([getattr(row, name) for row in rows], axis=0) for name in ("share", "values")}
    return {"count": int(heads.sum())} | {name: float(values[heads].mean()) for name, values in means.items()}


def page(context: Context) -> Page:
    """Show the heads on maps and over a text, how many are open how often, and those that swing most."""
    exact, decided = RANKED.done(context), DECIDED.rows(context)
    rows = [[row for row in decided if (row.model, row.length, row.window) == place] for place in SHOWN]
    columns = [of_heads(of_place) for of_place in rows]
    heads, per_layer = columns[0], len(exact[SHOWN[0]].context[0])
    beside = [beside_exact(of_place, exact[place]) for of_place, place in zip(rows, SHOWN, strict=True)]
    drawn = [row for row in rows[0] if row.task == DRAWN]
    variance = sum(np.var(row.stretches, axis=1).sum() for row in rows[0])
    most = np.argsort(-heads["swing"]).tolist()[:MOST]
    files = at_files(drawn, most)
    gate, mass = beside[0]["reading"]
    markdown = filled(
        globals(),
        threshold=RANKING_THRESHOLD,
        followed=FOLLOWING,
        apart=100 * FAR_APART,
        top=TOP,
        queries=QUERIES,
        n_heads=len(heads["swing"]),
        end=_shares(heads["late"]),
        grown=int(((heads["early"] < EARLY) & (heads["late"] > LATE)).sum()),
        trend=1 - sum((of_document(row)["swing"] ** 2).sum() for row in rows[0]) / variance,
        near=NEAR * STRETCH,
        begun=len(files),
        before=np.mean([before for before, _ in files]),
        after=np.mean([after for _, after in files]),
        alike=np.corrcoef(heads["reading_needles"], heads["reading_code"])[0, 1],
        answering=int(((heads[f"late_{DRAWN}"] < EARLY) & (heads[f"asked_{DRAWN}"] > LATE)).sum()),
        agree=_agreement(gate, mass),
        only_mass=of_top_keys(TOP_KEYS.rows(context), mass - gate > FAR_APART),
        others=of_top_keys(TOP_KEYS.rows(context), mass - gate <= FAR_APART),
        only_gate=int((gate - mass > FAR_APART).sum()),
        shares=[{"name": name, "at": [_shares(of[kind]) for of in columns]} for kind, name in KINDS.items()],
        beside=[{"name": name, "at": [_agreement(*of[kind]) for of in beside]} for kind, name in BESIDE.items()],
        most=[
            {"head": named(head, per_layer)} | {name: column[head] for name, column in heads.items()} for head in most
        ],
    )
    table = [
        {**place._asdict(), "layer": head // per_layer, "head": head % per_layer}
        | {name: float(column[head]) for name, column in of_place.items()}
        for place, of_place in zip(SHOWN, columns, strict=True)
        for head in range(len(of_place["swing"]))
    ]
    return Page(markdown, draw(heads, drawn[0], per_layer), {"swing": table}, formats={"number": ".3f"})


def _shares(fractions: np.ndarray) -> dict[str, float]:
    """Say how many heads are nearly always closed and open, how many between, and the mean open fraction."""
    closed, opened = int((fractions < CLOSED).sum()), int((fractions > OPEN).sum())
    return {"closed": closed, "between": len(fractions) - closed - opened, "opened": opened, "mean": fractions.mean()}


def _agreement(gate: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return the correlation over heads of two kinds of open fractions, and their means."""
    return {"correlation": np.corrcoef(gate, exact)[0, 1], "gate": gate.mean(), "exact": exact.mean()}
