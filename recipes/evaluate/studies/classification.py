"""How often does the moment gate decide like the exact mass would? Per layer and threshold, on the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from context import LENGTHS, WINDOWS, Context
from matplotlib.figure import Figure
from page import STYLES, Page, csv_link, label, made_by, open_axis, tidy
from recorded import DEFAULT, DOCUMENTS, MARGINS, MISSED, PLACE, SHARES, THRESHOLDS, Confusion, Recorded, recorded

from patchattn.evaluation.page import table, with_interval

MEASURED = (MARGINS,)

SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9)
GUARDED = "prompt/guarded"
GOAL = 0.95

COLUMNS = (
    "oracle opens", "gate opens", "accuracy", "recall (95%)", "precision", "false negatives", "false positives",
    "missed mass (95%)",
)  # fmt: skip


def cells(confusion: Confusion) -> list[str]:
    """Write every measure of a gate; the cells of `COLUMNS`."""
    oracle, opened, accuracy, precision, negatives, positives = (
        confusion.value(name)
        for name in ("oracle open", "open", "accuracy", "precision", "false negatives", "false positives")
    )
    recall, missed = confusion.interval("recall"), confusion.interval(MISSED)
    return [
        f"{oracle:.1%}", f"{opened:.1%}", f"{accuracy:.3f}", with_interval(recall, ".3f"), f"{precision:.3f}",
        f"{negatives:.3f}", f"{positives:.3f}", with_interval(missed, ".2%"),
    ]  # fmt: skip


def every_measure(found: dict[tuple[int, int], Recorded]) -> Iterator[dict[str, Any]]:
    """List every measure of every estimate, threshold and layer, at all lengths and windows."""
    for (length, window), place in found.items():
        for estimate in place.estimates:
            for threshold in SHOWN:
                for layer in (None, *range(place.layers)):
                    one = place.confusion(estimate, threshold, layer=layer)
                    recall = one.interval("recall")
                    row = {"length": length, "window": window, "documents": len(place.documents)}
                    row |= {"estimate": estimate, "threshold": threshold, "layer": "all" if layer is None else layer}
                    row |= {name.replace(" ", "_"): one.value(name) for name in (*SHARES, MISSED)}
                    yield row | {"recall_low": recall.low, "recall_high": recall.high}


def goal(place: Recorded) -> str:
    """Say whether the default gate opens enough of the oracle's pairs, and which threshold would."""
    default = place.confusion(GUARDED, DEFAULT)
    recall = default.interval("recall")
    against = {threshold: place.confusion(GUARDED, threshold, oracle=DEFAULT) for threshold in THRESHOLDS}
    reached = next((threshold for threshold, one in against.items() if one.value("recall") >= GOAL), None)
    text = f"""\
**Goal**: recall of the oracle's open pairs of at least {GOAL} at the default threshold, {DEFAULT} for both: \
**{"met" if recall.value >= GOAL else "missed"}**, {with_interval(recall, ".3f")}. The pairs that the default gate \
closes miss {default.value(MISSED):.2%} of their query's attention on average over all pairs; the oracle misses \
{place.oracle(DEFAULT).value(MISSED):.2%}. """
    if reached is None:
        return f"{text}No threshold up to {THRESHOLDS[-1]} reaches {GOAL}."
    return (
        f"{text}Against the oracle at {DEFAULT}, the guarded gate reaches {GOAL} from threshold {reached} on, with "
        f"{against[reached].value('open'):.0%} open."
    )


def answering(place: Recorded) -> str:
    """Write the table of the queries that predict answers."""
    rows = []
    for name in place.estimates:
        one = place.confusion(name, DEFAULT, answering=True)
        layers = (place.confusion(name, DEFAULT, layer=layer, answering=True) for layer in range(place.layers))
        rows.append(
            [
                f"{label(name)}, {DEFAULT}",
                *(f"{one.value(measure):.1%}" for measure in ("oracle open", "open")),
                with_interval(one.interval("recall"), ".3f"),
                f"{one.value('precision'):.3f}",
                " / ".join(f"{layer.value('recall'):.2f}" for layer in layers),
            ]
        )
    head = ["estimate, threshold", "oracle opens", "gate opens", "recall (95%)", "precision", "recall by layer"]
    return table(head, rows)


def by_own_threshold(place: Recorded) -> str:
    """Write recall of the oracle's pairs at the default, and open fraction, by the threshold of the gate."""

    def cell(name: str, threshold: float) -> str:
        one = place.confusion(name, threshold, oracle=DEFAULT)
        return f"{one.value('recall'):.2f} / {one.value('open'):.0%}"

    rows = [[label(name), *(cell(name, threshold) for threshold in THRESHOLDS)] for name in place.estimates]
    return table(["estimate", *map(str, THRESHOLDS)], rows)


def by_place(found: dict[tuple[int, int], Recorded]) -> str:
    """Write recall, precision and missed mass of the prompt's estimates at all lengths and windows."""

    def cell(length: int, window: int, name: str) -> str:
        one = found[length, window].confusion(name, DEFAULT)
        return f"{one.value('recall'):.3f} / {one.value('precision'):.3f} / {one.value(MISSED):.2%}"

    rows = [
        [f"{length:,}, {label(name)}", *(cell(length, window, name) for window in WINDOWS)]
        for length in LENGTHS
        for name in (GUARDED, "prompt/saturating", "prompt/lognormal")
    ]
    return table(["tokens, estimate", *(f"window {window}" for window in WINDOWS)], rows)


def page(context: Context) -> Page:
    """Show the default gate by layer, and all estimates."""
    found = recorded(context)
    place = found[PLACE]
    layers = [
        [name, *cells(place.confusion(GUARDED, threshold, layer=layer))]
        for threshold in SHOWN
        for name, layer in [
            (f"**{threshold}**, all", None),
            *((f"{threshold}, {layer}", layer) for layer in range(place.layers)),
        ]
    ]
    estimates = [[label(name), *cells(place.confusion(name, DEFAULT))] for name in place.estimates]
    markdown = f"""# The moment gate against the exact mass

Dense activations of the shipped model in float32, sink 16; documents with facts, other ones than those that \
thresholds are chosen on: {", ".join(f"{DOCUMENTS[length]} of {length:,} tokens" for length in LENGTHS)}. A pair of \
(query head, query) is positive where the oracle, the exact local share under the threshold, opens it. *Missed mass* is \
the share of a query's attention that lies on keys its closed head does not read, averaged over all pairs. Intervals \
by bootstrap over documents. {made_by("classification")}; all estimates, layers, lengths and windows with their \
intervals are in {csv_link("classification")}.

{goal(place)}

![recall and missed mass against open fraction](classification.png)

## Per layer: default gate at 4,096 tokens, window 256

Gate and oracle at the same threshold.

{table(["threshold, layer", *COLUMNS], layers)}

## All estimates, threshold {DEFAULT}

{table(["estimate", *COLUMNS], estimates)}

## Recall of the oracle's pairs at {DEFAULT}, by the gate's own threshold

In each cell: recall / pairs that the gate opens.

{by_own_threshold(place)}

## Answers only

Most pairs belong to plain text, where a miss costs little. These are the queries that predict the
tokens of an answer, in all layers; a look-up that is missed here is a wrong answer.

{answering(place)}

## Lengths and windows, threshold {DEFAULT}

In each cell: recall / precision / missed mass.

{by_place(found)}
"""
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
    recall.axhline(GOAL, color="grey", lw=0.8)
    recall.text(2.2, GOAL + 0.01, f"goal: {GOAL}", color="dimgrey", fontsize=9)
    recall.set_ylabel(f"recall of the oracle's open pairs at {DEFAULT}")
    missed.set_ylabel("missed mass, % of the attention")
    for one in (recall, missed):
        open_axis(one, low=2)
    recall.legend(frameon=False, fontsize=9, loc="center left")
    shades = ("#440154", "#3B528B", "#21918C", "#5EC962", "#D8B400")
    for layer in range(place.layers):
        y = [place.confusion(GUARDED, threshold, layer=layer).value("recall") for threshold in THRESHOLDS]
        layers.plot(THRESHOLDS, y, "o-", ms=4, color=shades[layer % len(shades)], label=f"layer {layer}")
    layers.axhline(GOAL, color="grey", lw=0.8)
    layers.set_xlabel("threshold of gate and oracle")
    layers.set_ylabel("recall of each layer, default estimate")
    tidy(layers)
    layers.legend(frameon=False, fontsize=9)
    return figure
