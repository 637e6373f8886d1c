"""What do gates keep of answers and text at which share of the keys? On a real model and the shipped one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from context import Context
from matplotlib.figure import Figure
from page import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, YELLOW, Page, filled, tidy
from studies.quality.cases import DENSELY, HEADS_ALONE, NO_PRESS, PRESSES, SHARES, WHOLE_GROUPS
from studies.quality.documents import FOLLOWING, QUESTIONS, TURNS
from studies.quality.lines import jobs_of, lines
from studies.quality.measuring import KEY, RANKED, SCORED
from studies.quality.places import DOCUMENTS, PLACES, WHOLE, Place
from studies.quality.presses import PRESSED, TEXTS
from studies.quality.presses import rows as rows_of_presses
from studies.quality.summary import summaries
from studies.quality.table import FORMATS, NAME, Key, Line, kept, rows_of

from patchattn.evaluation.page import number, table, with_interval
from patchattn.evaluation.rows import csv_text

MEASURED = (RANKED, SCORED, PRESSED)
STYLES = {
    "guarded": (BLUE, "D-"),
    "log-normal, window 2,048": ("#4B2E83", "P-"),
    "log-normal, window 1,024": (PURPLE, "P-"),
    "log-normal, window 256": ("#E3B5D2", "P-"),
    f"log-normal, {DENSELY}": (PURPLE, "x-"),
    "saturating": (SKY, "^-"),
    "price of the output": (GREEN, "*-"),
    WHOLE_GROUPS: ("#00583F", "p-"),
    HEADS_ALONE: ("#7FD1B9", "p-"),
    "oracle": (BLACK, "o--"),
    f"static, {DENSELY}": (RED, "x"),
    "static, by mass": (ORANGE, "s:"),
    "static, answering": (RED, "s:"),
    "static, answering, window 2,048": ("#7A3B00", "D:"),
    "static, by price": (GREEN, "s:"),
    "static, other task": (YELLOW, "s:"),
    "static, drawn": (GREY, "v:"),
    "risk, each head, window 2,048": (GREEN, ">-"),
    "budget, window 2,048": (GREEN, "h-"),
    "StreamingLLM": ("#B0A090", "s--"),
    "SnapKV": ("#7A5230", "o--"),
    "ExpectedAttention": ("#A87B4F", "^--"),
    "DuoAttention": ("#606060", "D--"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Take the folder of the real model, what is measured, and the environment of kvpress."""
    parser.add_argument("--real-model", type=Path, required=True, help="what `python recipes/real_model.py` prints")
    parser.add_argument(
        "--families", nargs="*", default=[], help="kinds of gates, as the page names them; default: all"
    )
    parser.add_argument("--again", action="store_true", help="measure what was chosen even if the table has it")
    parser.add_argument("--kvpress-python", type=Path, help="Python of an environment with kvpress, for its presses")


def measured(context: Context, wanted: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """Return the lines of the table that are made of the rows in the folder of the context."""
    there = {tuple(getattr(row, name) for name in KEY): row for row in SCORED.store(context).rows()}
    rows = [there[job] for job in jobs_of(wanted) if job in there] + rows_of_presses(context)
    return {one.key: one.columns() for one in summaries(rows)}


def page(context: Context) -> Page:
    """Show a picture of quality against density, and a table for each model, length and window."""
    # Whatever was chosen to be measured, all that is there is shown; but not what an earlier version measured and this
    # one would not, with a calibration of another window for instance.
    wanted = lines(context, all_families=True)
    new, before = measured(context, wanted), kept(context)
    found = {key: new.get(key) or before[key] for key in wanted if key in new or key in before}
    note = f"{len(found.keys() - new.keys())} of {len(found)} lines are those of the table before."
    if left_out := before.keys() - found.keys():
        note += f" {len(left_out)} of its lines are not measured any more, and are left out."
    rows = list(found.values())
    # The page is made of what the table says, so that it is the same when it is made of the table alone.
    listed = [Line.of(columns) for columns in rows_of(csv_text(rows, **FORMATS).splitlines())]
    places = [place for place in PLACES if any(one.place == place and not one.is_dense for one in listed)]
    known = {one.key: one for one in listed}

    def at(length: int, window: int, family: str, setting: str = "") -> Line:
        return known[Place(PLACES[0].model, length, window), family, setting]

    def beside(length: int, window: int, **gates: tuple[str, str]) -> list[dict[str, Line]]:
        """Gates of one place by the names that the text gives them; nothing where one of them was not measured."""
        are_measured = all((Place(PLACES[0].model, length, window), *gate) in known for gate in gates.values())
        return [{name: at(length, window, *gate) for name, gate in gates.items()}] if are_measured else []

    default = at(8192, 2048, "log-normal", "0.8")
    markdown = filled(
        globals(),
        questions=QUESTIONS,
        turns=TURNS,
        following=FOLLOWING,
        real=DOCUMENTS["SmolLM2-135M"],
        shipped=DOCUMENTS["shipped"],
        default=default,
        closed=1 - default.context.open_fraction,
        shut=at(8192, 2048, "all closed"),
        less=at(8192, 2048, "log-normal", "0.6"),
        narrow=at(8192, 1024, "log-normal", "0.8"),
        narrowest=at(8192, 256, "log-normal", "0.8"),
        half=at(4096, 1024, "log-normal", "0.8"),
        wide=at(4096, 2048, "log-normal", "0.8"),
        small=at(4096, 256, "log-normal", "0.8"),
        weak=at(4096, 256, "log-normal", "0.7"),
        static=at(8192, 1024, "static, answering", "30% of heads"),
        read=at(8192, 1024, f"static, {DENSELY}", "30% of heads"),
        broad=at(8192, 2048, "static, answering", "30% of heads"),
        guarded=at(8192, 2048, "guarded", "0.6"),
        lean=at(8192, 2048, "static, answering", "15% of heads"),
        elsewhere=at(8192, 2048, "static, other task", "30% of heads"),
        promised=beside(8192, 2048, risk=("risk, each head", "0.05")),
        priced=beside(
            4096,
            256,
            lean=("price of the output", "17%"),
            rich=("price of the output", "30%"),
            plain=("log-normal", "0.6"),
            careful=("guarded", "0.6"),
            exact=("oracle", "0.6"),
            fixed=("static, by price", "30% of heads"),
            heavy=("static, answering", "30% of heads"),
        ),
        chosen=[
            chosen | small
            for chosen in beside(
                8192,
                1024,
                many=("static, by price", "30% of heads"),
                few=("static, by price", "15% of heads"),
                plain=("log-normal", "0.8"),
                fifth=("price of the output", "22%"),
                tenth=("price of the output", "10%"),
            )
            for small in beside(4096, 256, small=("static, by price", "15% of heads"))
        ],
        grouped=beside(
            4096,
            256,
            whole=(WHOLE_GROUPS, "22%"),
            alone=(HEADS_ALONE, "22%"),
            rich=(WHOLE_GROUPS, "30%"),
            bare=(HEADS_ALONE, "30%"),
        ),
        grouped_long=beside(
            8192,
            1024,
            lean=(WHOLE_GROUPS, "17%"),
            whole=(WHOLE_GROUPS, "22%"),
            alone=(HEADS_ALONE, "22%"),
        ),
        costed=beside(
            8192,
            1024,
            tenth=("price of the output", "10%"),
            fifth=("price of the output", "22%"),
            plain=("log-normal", "0.6"),
            safe=("log-normal", "0.8"),
        ),
        pressed=[
            pressed | {"duo": at(4096, 256, "DuoAttention", "50% of heads")}
            for pressed in beside(8192, 1024, snap=("SnapKV", "50% kept"), stream=("StreamingLLM", "50% kept"))
        ],
        shares=", ".join(f"{share:.0%}" for share in SHARES),
        texts=TEXTS,
        missing=_missing(context, listed),
        tables="\n\n".join(_table(place, [one for one in listed if one.place == place]) for place in places),
    )
    return Page(markdown, draw(listed), {NAME: rows}, formats=FORMATS, note=note)


def _missing(context: Context, listed: Sequence[Line]) -> str:
    """Say what the command has not measured yet."""
    of_presses = (NO_PRESS, *PRESSES)
    there = {one.key for one in listed}
    wanted = [key for key in lines(context, all_families=True) if key[1] not in of_presses and key not in there]
    begun = dict.fromkeys(one.place for one in listed if not one.is_dense and one.family not in of_presses)
    left = [_name(place) for place in PLACES if place not in begun]
    for place in begun:
        gates = ", ".join(f"{family} {setting}".strip() for of, family, setting in wanted if of == place)
        left += [f"{_name(place)}: {gates}"] if gates else []
    said = [f"- *Not measured yet:* {'; '.join(left)}. The command above goes on with them."] if left else []
    pressed = {one.place for one in listed if one.family in PRESSES}
    if pressed < {*WHOLE}:
        bare = "; ".join(_name(place) for place in WHOLE if place not in pressed)
        said.append(f"- *Presses not measured yet:* {bare}. They need the option `--kvpress-python`.")
    return "\n".join(said)


def _name(place: Place) -> str:
    model = "SmolLM2-135M-Instruct" if place.model.startswith("Smol") else "The shipped model"
    return f"{model}, {place.length:,} tokens, window {place.window:,}"


def _table(place: Place, listed: Sequence[Line]) -> str:
    """Write one row for each gate, in the order of what they read."""
    dense = next(one for one in listed if one.is_dense)
    gates = sorted((one for one in listed if one is not dense), key=lambda one: -one.appended.realised_density)
    head = ["gate", "setting", "open", "keys read", *dense.right, "points", "worst task", "text loss", "agrees", "KL"]

    def both(one: Line, name: str) -> str:
        parts = [number(getattr(part, name), ".0%") for part in (one.context, one.appended)]
        return " / ".join(part or "-" for part in parts) if any(parts) else ""

    def row(one: Line) -> list[str]:
        task, worst = one.worst
        right = [f"{share:.2f}" for share in one.right.values()]
        if one is dense:
            return ["dense", "", "", "", *right, "", "", f"{one.text_loss:.3f}", "", ""]
        return [
            *(one.family, one.setting, both(one, "open_fraction"), both(one, "realised_density"), *right),
            with_interval(one.points, "+.1f", between=" to "),
            f"{task} {worst.value:+.0f}",
            f"{one.rise.value:+.2%}",
            f"{one.agreement:.1%}",
            with_interval(one.kl, ".4f"),
        ]

    return f"## {_name(place)}\n\n" + table(head, map(row, [dense, *gates]))


def draw(listed: Sequence[Line]) -> Figure:
    """Draw answers and KL against the keys read while answering, a column for each place."""
    figure = Figure(figsize=(14, 8), dpi=120, layout="constrained")
    grid: Any = figure.subplots(2, len(WHOLE))
    for place, (answers, kl) in zip(WHOLE, grid.T, strict=True):
        there = [one for one in listed if one.place == place]
        curves = {family: [one for one in there if one.family == family] for family in STYLES}
        for one in listed:
            if one.place[:2] == place[:2]:
                curves.get(f"{one.family}, window {one.place.window:,}", []).append(one)
        for family, found in curves.items():
            curve, (colour, style) = sorted(found, key=_paid), STYLES[family]
            if not curve:
                continue
            x = [100 * _paid(one) for one in curve]
            look = {"color": colour, "label": family, "markersize": 6, "linewidth": 1.5}
            if family in PRESSES:
                look["fillstyle"] = "none"
            answers.plot(x, [one.points.value for one in curve], style, **look)
            kl.plot(x, [one.kl.value for one in curve], style, **look)
        for one in there:
            if one.family in ("all open", "all closed"):
                for axes, value in ((answers, one.points.value), (kl, one.kl.value)):
                    axes.plot([100 * _paid(one)], [value], "*", color="black", markersize=10)
                    axes.annotate(f" {one.family}", (100 * _paid(one), value), fontsize=8, ha="left", va="bottom")
        answers.axhline(0, color="grey", linewidth=0.8)
        name = _name(place).replace("-Instruct", "").replace(", window", "\nwhere not said otherwise: window")
        answers.set_title(name, fontsize=10, loc="left")
        kl.set(xlabel="keys read while answering, %")
        # Up to here on a straight scale, as all open is nearly none.
        kl.set_yscale("symlog", linthresh=1e-3)
        for axes in (answers, kl):
            axes.set_xlim(0, 105)
            tidy(axes)
    grid[0, 0].set_ylabel("right answers, points above dense")
    grid[1, 0].set_ylabel("KL of text to dense, nats per token")
    drawn = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
    known = [drawn[family] for family in STYLES if family in drawn]
    figure.legend(handles=known, loc="outside right center", fontsize=9, frameon=False)
    return figure


def _paid(one: Line) -> float:
    return one.appended.realised_density
