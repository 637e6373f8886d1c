"""How often does the moment gate decide like the exact mass would? Per layer and threshold, on the shipped model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from context import LENGTHS, WINDOWS, Context
from matplotlib.figure import Figure
from page import STYLES, Page, filled, label, open_axis, tidy
from recorded import DEFAULT, DOCUMENTS, MARGINS, MISSED, PLACE, SHARES, THRESHOLDS, Confusion, Recorded, recorded

from patchattn.evaluation.page import table, with_interval

MEASURED = (MARGINS,)

SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9)
GUARDED = "prompt/guarded"
GOAL = 0.95

_ONE = (
    "| {name} | {oracle open:.1%} | {open:.1%} | {accuracy:.3f} | {recall interval} | {precision:.3f} | "
    "{false negatives:.3f} | {false positives:.3f} | {missed interval} |"
)
_ONE_ANSWERING = (
    "| {name}, {default} | {oracle open:.1%} | {open:.1%} | {recall interval} | {precision:.3f} | {by layer} |"
)
_ONE_THRESHOLD = "{recall:.2f} / {open:.0%}"
_ONE_PLACE = "{recall:.3f} / {precision:.3f} / {missed mass:.2%}"


def measures(found: Confusion, **more: Any) -> dict[str, Any]:
    """Return all measures by name, and recall with its interval as text."""
    recall = with_interval(found.interval("recall"), ".3f")
    return {name: found.value(name) for name in (*SHARES, MISSED)} | {"recall interval": recall} | more


def line(name: str, found: Confusion) -> str:
    """Write one line of the tables that show every measure."""
    missed = with_interval(found.interval(MISSED), ".2%")
    return _ONE.format_map(measures(found, name=name) | {"missed interval": missed})


def every_measure(found: dict[tuple[int, int], Recorded]) -> Iterator[dict[str, Any]]:
    """List every measure of every estimate, threshold and layer, at all lengths and windows."""
    for (length, window), place in found.items():
        for estimate, threshold, layer in itertools.product(place.estimates, SHOWN, (None, *range(place.layers))):
            one = place.confusion(estimate, threshold, layer=layer)
            recall = one.interval("recall")
            row = {"length": length, "window": window, "documents": len(place.documents), "estimate": estimate}
            row |= {"threshold": threshold, "layer": "all" if layer is None else layer}
            row |= {name.replace(" ", "_"): one.value(name) for name in (*SHARES, MISSED)}
            yield row | {"recall_low": recall.low, "recall_high": recall.high}


def page(context: Context) -> Page:
    """Show the default gate by layer, and all estimates."""
    found = recorded(context)
    place = found[PLACE]
    default = place.confusion(GUARDED, DEFAULT)
    against = {threshold: place.confusion(GUARDED, threshold, oracle=DEFAULT) for threshold in THRESHOLDS}
    reached = next((threshold for threshold, one in against.items() if one.value("recall") >= GOAL), None)
    layers = [
        line(name, place.confusion(GUARDED, threshold, layer=layer))
        for threshold in SHOWN
        for name, layer in [
            (f"**{threshold}**, all", None),
            *((f"{threshold}, {layer}", layer) for layer in range(place.layers)),
        ]
    ]
    answering = []
    for name in place.estimates:
        by_layer = [place.confusion(name, DEFAULT, layer=at, answering=True) for at in range(place.layers)]
        written = {"by layer": " / ".join(f"{one.value('recall'):.2f}" for one in by_layer), "default": DEFAULT}
        one = measures(place.confusion(name, DEFAULT, answering=True), name=label(name))
        answering.append(_ONE_ANSWERING.format_map(one | written))
    thresholds = [
        [
            label(name),
            *(_ONE_THRESHOLD.format_map(measures(place.confusion(name, t, oracle=DEFAULT))) for t in THRESHOLDS),
        ]
        for name in place.estimates
    ]
    places = [
        [f"{length:,}, {label(name)}"]
        + [_ONE_PLACE.format_map(measures(found[length, window].confusion(name, DEFAULT))) for window in WINDOWS]
        for length in LENGTHS
        for name in (GUARDED, "prompt/saturating", "prompt/lognormal")
    ]
    markdown = filled(
        "classification",
        documents=", ".join(f"{DOCUMENTS[length]} of {length:,} tokens" for length in LENGTHS),
        goal=GOAL,
        default=DEFAULT,
        met="met" if default.value("recall") >= GOAL else "missed",
        recall=with_interval(default.interval("recall"), ".3f"),
        missed=default.value(MISSED),
        missed_by_oracle=place.oracle(DEFAULT).value(MISSED),
        reached=f"No threshold up to {THRESHOLDS[-1]} reaches {GOAL}."
        if reached is None
        else f"Against the oracle at {DEFAULT}, the guarded gate reaches {GOAL} from threshold {reached} on, with "
        f"{against[reached].value('open'):.0%} open.",
        layers="\n".join(layers),
        estimates="\n".join(line(label(name), place.confusion(name, DEFAULT)) for name in place.estimates),
        thresholds=table(["estimate", *map(str, THRESHOLDS)], thresholds),
        answering="\n".join(answering),
        places=table(["tokens, estimate", *(f"window {window}" for window in WINDOWS)], places),
    )
    return Page(markdown, draw(place), {"classification": list(every_measure(found))})


def draw(place: Recorded) -> Figure:
    """Draw recall and missed mass against open fraction, and recall of each layer."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    recall, missed, layers = axes
    for name in place.estimates:
        colour, marker = STYLES[name]
        points = [place.confusion(name, threshold, oracle=DEFAULT) for threshold in THRESHOLDS]
        x = [100 * point.value("open") for point in points]
        style = {"color": colour, "marker": marker, "ms": 4, "ls": "-" if name.startswith("prompt/") else ":"}
        recall.plot(x, [point.value("recall") for point in points], **style, label=label(name).replace("moment, ", ""))
        missed.plot(x, [100 * point.value(MISSED) for point in points], **style)
    points = [place.oracle(threshold) for threshold in THRESHOLDS]
    x, y = ([100 * point.value(measure) for point in points] for measure in ("open", MISSED))
    missed.plot(x, y, "k--o", ms=4)
    missed.annotate("oracle", (x[5], y[5]), (-12, -14), textcoords="offset points", ha="right")
    recall.text(2.2, GOAL + 0.01, f"goal: {GOAL}", color="dimgrey", fontsize=9)
    recall.set(ylabel=f"recall of the oracle's open pairs at {DEFAULT}")
    missed.set(ylabel="missed mass, % of the attention")
    for one in (recall, missed):
        open_axis(one, low=2)
    recall.legend(frameon=False, fontsize=9, loc="center left")
    shades = ("#440154", "#3B528B", "#21918C", "#5EC962", "#D8B400")
    for layer in range(place.layers):
        y = [place.confusion(GUARDED, threshold, layer=layer).value("recall") for threshold in THRESHOLDS]
        layers.plot(THRESHOLDS, y, "o-", ms=4, color=shades[layer % len(shades)], label=f"layer {layer}")
    for one in (recall, layers):
        one.axhline(GOAL, color="grey", lw=0.8)
    layers.set(xlabel="threshold of gate and oracle", ylabel="recall of each layer, default estimate")
    tidy(layers)
    layers.legend(frameon=False, fontsize=9)
    return figure
