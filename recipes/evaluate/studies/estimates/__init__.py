"""Judge estimates of the bulk log mass at equal open fraction, learned ones among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from context import LENGTH, POLICY, SINK, WINDOW, Answered, Context, Measurement, load, read_densely, text
from matplotlib.figure import Figure
from page import Page, beside_dense, draw_intervals, filled, told
from studies.estimates import candidates
from studies.estimates.candidates import Call, Candidate, boxes, gaussian, low_rank, mixture
from torch import Tensor

from patchattn import patch
from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.evaluation.answers import teacher_forced
from patchattn.evaluation.documents import Document, Kind, TokenizedText, make_document
from patchattn.evaluation.page import number
from patchattn.gates.moment import with_offsets
from patchattn.hf.observe import observing

FRACTIONS = (0.1, 0.2, 0.3)
"""Open fractions that thresholds are chosen for."""

FACTS: tuple[Kind, ...] = ("fact",) * 36
DOCUMENTS: dict[str, tuple[int, str, tuple[Kind, ...]]] = {
    "facts": (3, "fit/", FACTS),
    "others": (3, "others/", ("chain", "list", "note") * 4),
    "held": (4, "", FACTS),
}
"""How many are made, the beginning of their seeds, and what is asked in each; the last ones are judged on."""

KEYS, DIM = LENGTH - SINK - WINDOW, 32
SCORES, MOMENTS = KEYS * DIM, DIM * (DIM + 1)
LINEAR, QUADRATIC = "probe, linear", "probe, quadratic"
TRANSFERRED = "probe, quadratic, fitted on other tasks"
FITTED_ON = {TRANSFERRED: "others"}
"""Documents that a candidate is fitted and its thresholds are chosen on, where not on facts."""

CANDIDATES: dict[str, tuple[Candidate | None, float]] = {
    "oracle": (lambda call: call.bulk, SCORES),
    "saturating": (gaussian("saturating"), MOMENTS),
    "log-normal": (gaussian("lognormal"), MOMENTS),
    "guarded": (gaussian("saturating", freezing=1), MOMENTS),
    "guarded, from half the freezing point": (gaussian("saturating", freezing=0.5), MOMENTS),
    "guarded, from 1.5 times the freezing point": (gaussian("saturating", freezing=1.5), MOMENTS),
    "mixture, chunks of 128": (mixture(128), KEYS / 128 * MOMENTS),
    "mixture, chunks of 64": (mixture(64), KEYS / 64 * MOMENTS),
    "mixture, chunks of 32, diagonal": (mixture(32, diagonal=True), KEYS / 32 * 2 * DIM),
    "boxes of 64 keys": (boxes(64), KEYS / 64 * 2 * DIM),
    "boxes of 16 keys": (boxes(16), KEYS / 16 * 2 * DIM),
    "8 directions of 32, every key": (low_rank(8), 8 * (KEYS + DIM)),
    LINEAR: (None, DIM),
    QUADRATIC: (None, MOMENTS),
    TRANSFERRED: (None, MOMENTS),
}
"""What each candidate is, None for one that is fitted, and its multiply-adds for one query."""

BY_HEAD, EXPECTED = ", threshold by head", ", expected value added"
GUARD_ONLY = "guarded, open only above the freezing point"
FIXED_GUARDED = {"guarded, threshold 0.6": math.log(0.6 / 0.4), GUARD_ONLY: -1e6}
FIXED = {"dense": math.inf, "closed": -math.inf, **FIXED_GUARDED}
"""Margins in nats of rows of the guarded estimate whose threshold is not chosen."""

RUNS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("saturating", QUADRATIC, "guarded" + BY_HEAD, "oracle"), FRACTIONS),
    "guarded": (0.3,),
    **dict.fromkeys(("saturating" + BY_HEAD, "boxes of 64 keys", TRANSFERRED, "mixture, chunks of 128"), (0.2,)),
    **dict.fromkeys(("mixture, chunks of 32, diagonal", "saturating" + EXPECTED), (0.2,)),
    **dict.fromkeys(("guarded, from 1.5 times the freezing point", "log-normal"), (0.2,)),
    LINEAR: (0.1, 0.2),
    **dict.fromkeys(("8 directions of 32, every key", "mixture, chunks of 64", "boxes of 16 keys"), (0.2,)),
}
"""Rows measured on the model at open fractions; what matters most comes first."""

STYLES = {
    "saturating": ("tab:orange", "o-"),
    QUADRATIC: ("tab:green", "o-"),
    "guarded" + BY_HEAD: ("tab:red", "o--"),
    "oracle": ("black", "o-"),
    "guarded": ("tab:blue", "o-"),
    LINEAR: ("tab:purple", "o--"),
}


@dataclass(frozen=True)
class Fit:
    """What one candidate does on dense activations of held-out documents, heads averaged; see the page.

    `missed` is for each of `FRACTIONS`, NaN where no threshold opens that few. `thresholds` are those chosen for them,
    of each head, layer after layer, in nats.
    """

    candidate: str
    cost: float
    correlation: float
    spread: float
    missed: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Row(Answered):
    """What one candidate does on the model; see the page.

    `target` is the open fraction that the threshold was chosen for, 0 where it was not chosen so. `losses` are of each
    document in nats per token.
    """

    candidate: str
    target: float
    open: float
    right: int
    asked: int
    losses: tuple[float, ...]


def documents(name: str) -> list[Document]:
    """Make documents; those that are judged on are cut from another part of the held-out text."""
    cut = int(0.4 * len(text().lines))
    part = slice(cut, None) if name == "held" else slice(cut)
    some = TokenizedText(text().lines[part], text().tokens[part])
    count, seed, kinds = DOCUMENTS[name]
    seeds = [f"estimates/{seed}{at}" for at in range(count)]
    return [make_document(some, load()[1], length=LENGTH, kinds=kinds, seed=seed) for seed in seeds]


@cache
def recorded(name: str, count: int | None = None) -> list[list[Call]]:
    """Read documents, or the first few, with dense attention; returns the calls by layer."""
    calls: list[list[Call]] = [[] for _ in range(load()[0].config.num_hidden_layers)]
    read_densely(documents(name)[:count], lambda layer, inputs: calls[layer].append(Call(inputs)))
    return calls


@cache
def by_layer(name: str) -> list[Candidate]:
    """Return a candidate for each layer, probes fitted."""
    candidate, _ = CANDIDATES[name]
    if candidate is not None:
        return [candidate] * load()[0].config.num_hidden_layers
    return [candidates.fit_probe(calls, quadratic=name != LINEAR) for calls in recorded(FITTED_ON.get(name, "facts"))]


def margins(name: str, calls: list[list[Call]]) -> Tensor:
    """Margins of recorded calls, [layers * heads, documents * pairs] nats."""
    layers = zip(by_layer(name), calls, strict=True)
    return torch.cat([torch.cat([(one.local - mass(one)).flatten(0, 1) for one in some], 1) for mass, some in layers])


def fit(_: Context, full_name: str) -> Fit:
    """Choose thresholds on some documents, and compare margins with the true ones on another."""
    name = full_name.removesuffix(BY_HEAD)
    calls, held = recorded(FITTED_ON.get(name, "facts")), recorded("held", 1)
    found = margins(name, calls)
    if full_name == name:
        chosen = [candidates.common_threshold(found, fraction) for fraction in FRACTIONS]
    else:
        share = torch.sigmoid(-margins("oracle", calls))
        chosen = [candidates.thresholds_by_head(found, share, fraction) for fraction in FRACTIONS]
    threshold = torch.stack(chosen)[..., None]
    found, true = margins(name, held), margins("oracle", held)
    known = found.isfinite() & true.isfinite()
    pairs = [torch.stack([found[head, at], true[head, at]]) for head, at in enumerate(known) if int(at.sum()) > 1]
    correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean().item()
    spread = torch.stack([(pair[0] - pair[1]).std() for pair in pairs]).mean().item()
    closed = (found.nan_to_num(-torch.inf, torch.inf, -torch.inf) >= threshold) & (threshold != torch.inf)
    missed = torch.where(threshold.isnan(), torch.nan, torch.where(closed, torch.sigmoid(-true), 0)).mean((1, 2))
    thresholds = tuple(map(tuple, threshold[..., 0].tolist()))
    return Fit(full_name, CANDIDATES[name][1] / SCORES, correlation, spread, tuple(missed.tolist()), thresholds)


def run(context: Context, name: str, target: float) -> Row:
    """Let a candidate decide on the model, every layer on what gated layers below made of the text."""
    model, _ = load()
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    if name in FIXED:
        chosen, threshold = by_layer("guarded"), torch.full(shape, FIXED[name])
    else:
        fitted = FITS.done(context)[(name.removesuffix(EXPECTED),)]
        chosen = by_layer(fitted.candidate.removesuffix(BY_HEAD))
        threshold = torch.tensor(fitted.thresholds[FRACTIONS.index(target)]).view(shape)

    def observer(layer: int, inputs: AttentionInputs, _: Any) -> Attended:
        asked = inputs.regions.asked[0]
        call = Call(inputs)
        mass = torch.full(inputs.query.shape[:3], -torch.inf)
        mass[0, :, asked] = with_offsets(chosen[layer](call).flatten(0, 1), threshold[layer][:, None])
        attended = blockwise_attend(inputs, mass, 0.0)
        if name.endswith(EXPECTED):
            bulk, expected = candidates.expected_bulk(call)
            share = torch.sigmoid(bulk - call.local).flatten(0, 1).masked_fill(attended.open[0, :, asked], 0)
            output = attended.output[0, :, asked]
            attended.output[0, :, asked] = output.lerp(expected.flatten(0, 1), share[..., None])
        return attended

    with patch(model, POLICY) as handle, observing(handle, observer):
        found = [teacher_forced(model, [document]) for document in documents("held")]
    opened = handle.report().open_fraction("prefill")
    right, asked = (sum(getattr(each, part)["fact"] for each in found) for part in ("right", "asked"))
    return Row(name, target, opened, right, asked, tuple(each.text_loss for each in found))


FITTED = [name + how for name in CANDIDATES for how in ("", BY_HEAD) if not how or name + how in RUNS]
CHOSEN = [(name, fraction) for name, fractions in RUNS.items() for fraction in fractions]
FITS = Measurement("estimates-fits", Fit, ("candidate",), lambda _: [(name,) for name in FITTED], fit)
ROWS = Measurement("estimates", Row, ("candidate", "target"), lambda _: [(name, 0.0) for name in FIXED] + CHOSEN, run)
MEASURED = (FITS, ROWS)


def page(context: Context) -> Page:
    """Show what each candidate does at equal open fraction on the model, and on dense activations."""
    fits, rows = FITS.rows(context), ROWS.rows(context)
    dense, guard_only = (next(row for row in rows if row.candidate == name) for name in ("dense", GUARD_ONLY))
    cost = {fit.candidate: fit.cost for fit in fits}
    cost |= {"dense": None, "closed": None} | dict.fromkeys(FIXED_GUARDED, cost["guarded"])
    beside = [
        told(row, dense, chosen_for=row.target or None, cost=cost[row.candidate.removesuffix(EXPECTED)]) for row in rows
    ]
    beside[rows.index(dense)].loss = None
    markdown = filled(
        globals(),
        documents=len(dense.losses),
        dense=dense,
        guard_only=guard_only,
        rows=sorted(beside, key=lambda row: (row.target, -row.right)),
        fits=[vars(one) | {"at": [number(share, ".3f", unknown="can't") for share in one.missed]} for one in fits],
    )
    shown = [{name: value for name, value in vars(one).items() if name != "thresholds"} for one in fits]
    tables = {"estimates": [vars(row) for row in rows], "estimates.dense": shown}
    return Page(markdown, draw(beside, dense), tables, formats={"number": ".5f"})


def draw(rows: list[Any], dense: Row) -> Figure:
    """Draw facts and text loss against open fraction for candidates with several rows."""
    figure = Figure(figsize=(11.5, 4.8), dpi=150, layout="constrained")
    facts, loss = figure.subplots(1, 2)
    for name, (colour, style) in STYLES.items():
        names = (name, *FIXED_GUARDED) if name == "guarded" else (name,)
        points = sorted((row for row in rows if row.candidate in names), key=lambda row: row.open)
        opened = [row.open for row in points]
        draw_intervals(facts, opened, [row.facts for row in points], color=colour, fmt=style, label=name)
        changes = [100 * row.loss.value for row in points]
        loss.plot([100 * part for part in opened], changes, style, color=colour, markersize=5)
    for axes in (facts, loss):
        axes.set_xlabel("open pairs, %")
    return beside_dense(figure, dense)
