"""Compare policies by what they keep (answers, text loss) and what they cost (open fraction, realised density).

python recipes/02_compare_policies.py
"""

from __future__ import annotations

import argparse

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, StaticGate, demo
from patchattn.evaluation.answers import teacher_forced
from patchattn.evaluation.documents import check_longest, make_document, tokenize_text

GATES = {
    "dense": OpenGate(),
    "oracle, 0.6": OracleGate(threshold=0.6),
    "moments, 0.9": MomentGate(threshold=0.9),
    "moments, 0.8 (default)": MomentGate(),
    "moments, 0.3": MomentGate(threshold=0.3),
    "static: heads of layers 1 and 3": StaticGate(open_heads=tuple((i, head) for i in (1, 3) for head in range(6))),
    "sink + window only": ClosedGate(),
}


def main() -> None:
    """Score every policy on the same documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens in a document")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    options = parser.parse_args()
    model, tokenizer = demo.load()
    check_longest(model, options.length)
    text = tokenize_text(demo.sample_text(), tokenizer)
    documents = [
        make_document(text, tokenizer, length=options.length, kinds=["fact"] * 8, seed=seed)
        for seed in range(options.documents)
    ]

    table = Table("gate", title=f"{options.length:,} tokens a document, window {options.window}")
    for name in ("open", "density", "answers right", "text loss"):
        table.add_column(name, justify="right")
    points, notes = {}, set()
    for name, gate in GATES.items():
        with patchattn.patch(model, Policy(window_size=options.window, min_bulk=0, gate=gate)) as handle:
            found = teacher_forced(model, documents)
        report = handle.report()
        points[name] = (report.open_fraction(), found.text_loss)
        notes.update(report.notes())
        table.add_row(
            name,
            f"{report.open_fraction():.1%}",
            f"{report.realised_density():.1%}",
            f"{sum(found.right.values())}/{sum(found.asked.values())}",
            f"{found.text_loss:.3f}",
        )
    Console(width=100).print(table)
    draw(points)
    print(*notes, "text loss against pairs open: policies.png", sep="\n")


def draw(points: dict[str, tuple[float, float]]) -> None:
    """Draw text loss against open fraction."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (fraction, loss) in points.items():
        axes.plot([100 * fraction], [loss], "o", markersize=8, color="#2a78d6" if "moments" in name else "#8a8a86")
        axes.annotate(name, (100 * fraction, loss), xytext=(7, 6), textcoords="offset points", fontsize=9)
    axes.set(xlabel="pairs open, percent", ylabel="text loss, nats per token", title="Down and to the left is better")
    axes.set_xlim(-5, 118)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("policies.png", dpi=150)


if __name__ == "__main__":
    main()
