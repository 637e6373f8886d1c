"""Compare the head gates on the shipped model: exact match and text loss against open fraction.

python recipes/evaluate/gates.py --out docs/results/gates
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parents[2])]

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, StaticGate, demo
from patchattn.evaluation.scores import score, wilson_interval
from patchattn.evaluation.tasks import Document, make_document, tokenize_text

KINDS = ("fact",) * 36
GRID: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("guarded", (0.6, 0.4, 0.8)),
    ("static", (6, 4)),
    ("oracle", (0.6, 0.3)),
    ("saturating", (0.6,)),
    ("lognormal", (0.6,)),
    ("saturating", (0.9,)),
    ("lognormal", (0.9,)),
    ("guarded", (0.2,)),
    ("static", (8,)),
)
"""Kinds with thresholds, or numbers of heads; what matters most comes first."""


def gates(heads_by_use: list[tuple[int, int]]) -> Iterator[tuple[str, str, Any]]:
    """Yield (gate, setting, the gate itself) of every row."""
    yield "open", "", OpenGate()
    yield "closed", "", ClosedGate()
    for kind, settings in GRID:
        for setting in settings:
            if kind == "static":
                yield kind, f"{setting} heads", StaticGate(open_heads=tuple(heads_by_use[: int(setting)]))
            elif kind == "oracle":
                yield kind, f"{setting}", OracleGate(threshold=setting)
            else:
                yield (
                    f"moment, {kind}",
                    f"{setting}",
                    MomentGate.model_validate({"threshold": setting, "estimate": kind}),
                )


def heads_by_oracle(model: Any, documents: list[Document], policy: Policy) -> list[tuple[int, int]]:
    """Rank (layer, head) by how often the oracle opens them, most used first, on documents of their own."""
    with patchattn.patch(model, policy.model_copy(update={"gate": OracleGate(threshold=0.8)})) as handle:
        score(model, documents)
    fractions = handle.report().head_open_fractions("prefill")
    ranked = [(value, layer, head) for layer, heads in fractions.items() for head, value in enumerate(heads)]
    return [(layer, head) for _, layer, head in sorted(ranked, reverse=True)]


def measure(model: Any, documents: list[Document], policy: Policy) -> dict[str, Any]:
    """Score one policy and report its open fraction and realised density."""
    with patchattn.patch(model, policy) as handle:
        scores = score(model, documents)
    report = handle.report()
    return {
        "open_fraction": report.open_fraction("prefill"),
        "realised_density": report.realised_density("prefill"),
        "right": scores.right,
        "asked": scores.asked,
        "text_loss": scores.text_loss,
        "heads": report.head_open_fractions("prefill"),
    }


def exact(row: dict[str, Any], kinds: tuple[str, ...]) -> tuple[int, int]:
    """Right answers and questions of some kinds."""
    return sum(row["right"][kind] for kind in kinds), sum(row["asked"][kind] for kind in kinds)


def table(rows: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| gate | threshold or heads | open | realised density | facts exact (95% interval) | text loss |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["gate"]):
        right, asked = exact(row, ("fact",))
        low, high = wilson_interval(right, asked)
        change = 100 * (row["text_loss"] / dense["text_loss"] - 1)
        opened = "" if row["gate"] == "dense (stock)" else f"{100 * row['open_fraction']:.1f}%"
        density = "" if row["gate"] == "dense (stock)" else f"{100 * row['realised_density']:.1f}%"
        lines.append(
            f"| {row['gate']} | {row['setting']} | {opened} | {density} | {right / asked:.3f} ({low:.3f}-{high:.3f}) | "
            f"{row['text_loss']:.4f} ({change:+.1f}%) |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw exact match and text loss against open fraction."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    facts, loss = figure.subplots(1, 2)
    families = dict.fromkeys(row["gate"] for row in rows if row["setting"])
    for family in families:
        points = sorted((r for r in rows if r["gate"] == family), key=lambda r: r["open_fraction"])
        opened = [100 * r["open_fraction"] for r in points]
        facts.plot(opened, [exact(r, ("fact",))[0] / exact(r, ("fact",))[1] for r in points], "o-", label=family)
        loss.plot(opened, [r["text_loss"] for r in points], "o-", label=family)
    dense = next(row for row in rows if row["gate"] == "open")
    facts.axhline(
        exact(dense, ("fact",))[0] / exact(dense, ("fact",))[1], color="grey", linestyle=":", label="all open"
    )
    loss.axhline(dense["text_loss"], color="grey", linestyle=":", label="all open")
    facts.set_ylabel("facts answered exactly")
    loss.set_ylabel("text loss, nats per token")
    for axes in (facts, loss):
        axes.set_xscale("log")
        axes.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        axes.set_xlim(1.5, 110)
        axes.minorticks_off()
        axes.set_xlabel("open pairs, %")
        axes.grid(alpha=0.3)
    facts.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure every gate; rows that the JSON file has already are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=28, help="36 facts are asked in each")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gates"), help="without suffix")
    arguments = parser.parse_args()
    model, tokenizer = demo.load()
    model = model.float()  # so that differences come from the gates, not from rounding
    text = tokenize_text(demo.sample_text(), tokenizer)

    def documents(count: int, seed: str) -> list[Document]:
        return [
            make_document(text, tokenizer, length=arguments.length, kinds=KINDS, seed=f"{seed}/{index}")
            for index in range(count)
        ]

    held_out = documents(arguments.documents, "gates")
    policy = Policy(sink_size=16, window_size=arguments.window, min_bulk=0)
    saved = arguments.out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(saved.read_text()) if saved.exists() else []
    if not rows:
        scores = score(model, held_out)
        stock = {"right": scores.right, "asked": scores.asked, "text_loss": scores.text_loss}
        rows.append({"gate": "dense (stock)", "setting": "", "open_fraction": 1.0, "realised_density": 1.0, **stock})
    done = {(row["gate"], row["setting"]) for row in rows}
    ranked = heads_by_oracle(model, documents(4, "rank"), policy)
    for family, setting, gate in gates(ranked):
        if (family, setting) in done:
            continue
        rows.append(
            {"gate": family, "setting": setting, **measure(model, held_out, policy.model_copy(update={"gate": gate}))}
        )
        right, asked = exact(rows[-1], ("fact",))
        print(f"{family:20s} {setting:8s} open {rows[-1]['open_fraction']:.3f} facts {right / asked:.3f}", flush=True)
        saved.write_text(json.dumps(rows, indent=1))
        write_page(rows, arguments)


def write_page(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the table and the picture of the rows so far."""
    facts = f"{arguments.documents} held-out documents with {len(KINDS)} facts each, all asked at the end"
    setting = f"{arguments.length:,} tokens, sink 16, window {arguments.window}, `min_bulk=0`, float32, {facts}"
    arguments.out.with_suffix(".md").write_text(
        f"# Gates on the shipped model\n\n{setting}; torch {torch.__version__.split('+')[0]}. "
        "Made by `python recipes/evaluate/gates.py`.\n\n"
        "A fact is exact when every token of its value is the most likely one given the true tokens before it. "
        "Text loss is in nats per token, over the text between the planted lines. Open is the share of (query head, "
        "query) pairs with bulk keys that opened, in prefill. Static heads are those that the exact share (threshold "
        "0.8) opens most often, ranked on four other documents.\n\n"
        f"{table(rows, rows[0])}\n\n![exact match and text loss against open fraction](gates.png)\n"
    )
    plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
