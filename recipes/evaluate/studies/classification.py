"""How often does the moment gate decide like the exact mass would? Per layer and threshold, on the shipped model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from context import LENGTHS, Context
from matplotlib.figure import Figure
from page import STYLES, Page, filled, label, open_axis, tidy
from recorded import DEFAULT, DOCUMENTS, MARGINS, MEASURES, PLACE, THRESHOLDS, Recorded, by_window, recorded

MEASURED = (MARGINS,)

SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9)
GUARDED, *_ = PROMPT = ("prompt/guarded", "prompt/saturating", "prompt/lognormal")
GOAL = 0.95


def every_measure(found: dict[tuple[int, int], Recorded]) -> Iterator[dict[str, Any]]:
    """List every measure of every estimate, threshold and layer, at all lengths and windows."""
    for (length, window), place in found.items():
        for estimate, threshold, layer in itertools.product(place.estimates, SHOWN, (None, *range(place.layers))):
            one = place.confusion(estimate, threshold, layer=layer)
            recall = one["recall"]
            row = {"length": length, "window": window, "documents": len(place.documents), "estimate": estimate}
            row |= {"threshold": threshold, "layer": "all" if layer is None else layer}
            row |= {name: one.value(name) for name in MEASURES}
            yield row | {"recall_low": recall.low, "recall_high": recall.high}


def page(context: Context) -> Page:
    """Show the default gate by layer, and all estimates."""
    found = recorded(context)
    place = found[PLACE]
    default = place.confusion(GUARDED, DEFAULT)
    against = {threshold: place.confusion(GUARDED, threshold, oracle=DEFAULT) for threshold in THRESHOLDS}
    reached = next((threshold for threshold, one in against.items() if one.value("recall") >= GOAL), None)

    def about(name: str) -> dict[str, Any]:
        layers = range(place.layers)
        return {
            "name": label(name),
            "one": place.confusion(name, DEFAULT),
            "at": [place.confusion(name, threshold, oracle=DEFAULT) for threshold in THRESHOLDS],
            "answering": place.confusion(name, DEFAULT, answering=True),
            "by_layer": [place.confusion(name, DEFAULT, layer=layer, answering=True) for layer in layers],
        }

    markdown = filled(
        globals(),
        documents=", ".join(f"{DOCUMENTS[length]} of {length:,} tokens" for length in LENGTHS),
        met="met" if default.value("recall") >= GOAL else "missed",
        all=default,
        oracle=place.confusion("oracle", DEFAULT),
        reached=f"No threshold up to {THRESHOLDS[-1]} reaches {GOAL}."
        if reached is None
        else f"Against the oracle at {DEFAULT}, the guarded gate reaches {GOAL} from threshold {reached} on, with "
        f"{against[reached].value('open'):.0%} open.",
        layers=[
            {"name": f"{name}, {'all' if at is None else at}", "one": place.confusion(GUARDED, threshold, layer=at)}
            for threshold in SHOWN
            for at, name in ((None, f"**{threshold}**"), *((at, f"{threshold}") for at in range(place.layers)))
        ],
        estimates=list(map(about, place.estimates)),
        places=[
            {"length": length, "name": label(name), "at": by_window(found, length, name)}
            for length in LENGTHS
            for name in PROMPT
        ],
    )
    return Page(markdown, draw(place), {"classification": list(every_measure(found))})


def draw(place: Recorded) -> Figure:
    """Draw recall and missed mass against open fraction, and recall of each layer."""
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    axes: Any = figure.subplots(1, 3)
    recall, missed, layers = axes
    for name in place.estimates:
        colour, marker = STYLES[name]
        points = [place.confusion(name, threshold, oracle=DEFAULT) for threshold in THRESHOLDS]
        x = [100 * point.value("open") for point in points]
        style = {"color": colour, "marker": marker, "ms": 4, "ls": "-" if name.startswith("prompt/") else ":"}
        recall.plot(x, [point.value("recall") for point in points], **style, label=label(name).replace("moment, ", ""))
        missed.plot(x, [100 * point.value("missed_mass") for point in points], **style)
    points = [place.confusion("oracle", threshold) for threshold in THRESHOLDS]
    x, y = ([100 * point.value(measure) for point in points] for measure in ("open", "missed_mass"))
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
