"""Check the promise of `RiskTarget` on the shipped model: thresholds from one half of the documents, risk on the other.

python recipes/evaluate/guarantee.py --out docs/results/guarantee
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "calibrate")]

from documents import documents

from patchattn import Policy, RiskTarget, demo
from patchattn.calibration.risk import Curves, documents_needed, rungs
from patchattn.evaluation.documents import check_longest
from patchattn.measuring.collect import Collecting, read_document, settings_of
from patchattn.measuring.statistics import MARGINS, Totals

ALPHAS = (0.005, 0.01, 0.02, 0.05, 0.1)
SCOPES = ("head", "model")
POLICY = Policy(sink_size=16, window_size=128, min_bulk=0)
INFINITY = torch.tensor([torch.inf])
RUNGS = torch.cat([-INFINITY, MARGINS, INFINITY])


PAGE = """# The promise of a risk target, checked

The shipped model in bfloat16, {documents} documents of {length:,} tokens with facts to look up, sink {sink} and
window {window}. {splits} times the documents are split at random into halves: one chooses the thresholds, on the
other the missed mass is measured, on dense activations. The promise is about the mean over splits: of every head for
`head`, so of the worst one too, and of the mean over heads for `model`. Made by
`python recipes/evaluate/guarantee.py`.

*Patched* is the missed mass on {patched} documents where every layer reads what gated layers below made of the text,
with thresholds from the half that these documents are not in. The promise does not cover it.

| alpha | scope | held out: mean over heads | worst head | open | patched: mean over heads | worst head | open |
|---|---|---|---|---|---|---|---|
{rows}

A half has {half} documents: too few for alpha 0.005 with `model`, which needs 398. What the `+ 1` of the bound costs is
largest where alpha is close to one over the number of documents.

![missed mass over alpha, by split](guarantee.png)

Boxes: mean over heads, one value for each split; the documents are alike, so the splits are too.
"""


def measure(model: Any, tokens: list[Tensor], kept: Path) -> tuple[Tensor, Tensor]:
    """Measure each document by itself on dense activations: missed mass and open fraction.

    Returns:
        Both [documents, layers, query_heads, rungs], of the guarded estimate.
    """
    settings, _ = settings_of(model, POLICY, (len(tokens[0]),), 0.6, key_moments=False)
    done = torch.load(kept, weights_only=True) if kept.exists() else []
    with Collecting(model, POLICY, settings) as collecting:
        for at in range(len(done), len(tokens)):
            totals = Totals(settings)
            collecting.start(totals.add_document(0))
            read_document(model, tokens[at])
            done.append((totals.sums["missed_mass"][0, 0].float(), totals.sums["open_fraction"][0].float()))
            if at % 32 == 31:
                torch.save(done, kept)
                print(f"{at + 1} documents measured", flush=True)
    missed, opened = (torch.stack(part) for part in zip(*done, strict=True))
    return missed, opened


def choose(missed: Tensor, opened: Tensor, target: RiskTarget) -> Tensor:
    """Choose a rung for each head from the documents of one half."""
    halves = torch.stack([missed[::2].mean(0), missed[1::2].mean(0)])
    counts = (len(missed[::2]), len(missed[1::2]))
    return rungs(Curves(RUNGS, halves, opened.mean(0), counts), target)


def splits(missed: Tensor, opened: Tensor, target: RiskTarget, count: int) -> dict[str, Any]:
    """Split the documents at random, choose on one half and look at the other."""
    risks, worst, fractions = [], [], []
    for split in range(count):
        order = torch.randperm(len(missed), generator=torch.Generator().manual_seed(split))
        here, there = order[: len(order) // 2], order[len(order) // 2 :]
        chosen = choose(missed[here], opened[here], target)[..., None]
        lost = missed[there].mean(0).gather(-1, chosen)
        risks.append(lost[..., 0])
        worst.append(float(lost.max()))
        fractions.append(float(opened[there].mean(0).gather(-1, chosen).mean()))
    by_head = torch.stack(risks)
    return {
        "alpha": target.alpha,
        "scope": target.scope,
        # What the promise is about: the mean over splits, per head or of the mean over heads.
        "mean_over_heads": by_head.mean().item(),
        "worst_head": by_head.mean(0).max().item(),
        "open_fraction": sum(fractions) / count,
        "by_split": by_head.mean((1, 2)).tolist(),
        "worst_head_by_split": worst,
    }


def on_patched(model: Any, tokens: list[Tensor], margins: Tensor, settings: Any) -> tuple[float, float, float]:
    """Measure missed mass and open fraction where every layer runs on gated activations.

    Returns:
        Missed mass, mean over heads and of the worst head, and the open fraction.
    """
    missed, opened = [], []
    by_layer = {layer: margins[at] for at, layer in enumerate(settings.layers)}
    with Collecting(model, POLICY, settings, margins=by_layer) as collecting:
        for ids in tokens:
            totals = Totals(settings)
            collecting.start(totals.add_document(0))
            read_document(model, ids)
            at = torch.searchsorted(RUNGS, margins.contiguous(), right=True)[..., None] - 1
            at = torch.where(margins[..., None] == torch.inf, len(RUNGS) - 1, at)
            missed.append(totals.sums["missed_mass"][0, 0].gather(-1, at)[..., 0])
            opened.append(totals.sums["open_fraction"][0].gather(-1, at)[..., 0])
    by_head = torch.stack(missed).mean(0)
    return by_head.mean().item(), by_head.max().item(), torch.stack(opened).mean().item()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the distribution over splits as a share of alpha."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, scope in zip(figure.subplots(1, 2, sharey=True), SCOPES, strict=True):
        chosen = [row for row in rows if row["scope"] == scope]
        axes.boxplot([[value / row["alpha"] for value in row["by_split"]] for row in chosen], widths=0.5)
        means = [row["mean_over_heads"] / row["alpha"] for row in chosen]
        axes.plot(range(1, len(chosen) + 1), means, "D", color="tab:green", label="mean over splits, mean over heads")
        worst = [row["worst_head"] / row["alpha"] for row in chosen]
        axes.plot(range(1, len(chosen) + 1), worst, "^", color="tab:red", label="mean over splits, worst head")
        if all("patched" in row for row in chosen):
            patched = [row["patched"] / row["alpha"] for row in chosen]
            axes.plot(range(1, len(chosen) + 1), patched, "x", color="black", label="patched model, mean over heads")
        axes.axhline(1, color="grey", linestyle=":")
        axes.set_xticks(range(1, len(chosen) + 1), [f"{row['alpha']:g}" for row in chosen])
        axes.set_xlabel("alpha")
        axes.set_title(f'scope "{scope}"', fontsize=10)
        axes.set_ylim(0, 2.9)
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].legend(fontsize=8)
    figure.axes[0].set_ylabel("missed mass on held-out documents / alpha")
    figure.savefig(path, dpi=150)


def page(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Write the rows as a page."""
    lines = []
    for row in rows:
        cells = [f"{row['alpha']:g}", row["scope"]]
        cells += [f"{row[name]:.4f}" for name in ("mean_over_heads", "worst_head")]
        cells += [f"{row['open_fraction']:.1%}"]
        cells += [f"{row[name]:.4f}" for name in ("patched", "patched_worst_head")]
        lines.append("| " + " | ".join([*cells, f"{row['patched_open_fraction']:.1%}"]) + " |")
    return PAGE.format(
        documents=arguments.documents,
        length=arguments.length,
        sink=POLICY.sink_size,
        window=POLICY.window_size,
        splits=arguments.splits,
        patched=arguments.patched,
        half=arguments.documents // 2,
        rows="\n".join(lines),
    )


def main() -> None:
    """Measure, split, measure on the patched model, write page and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--patched", type=int, default=64, help="documents of the other half to read patched")
    parser.add_argument("--out", type=Path, default=Path("docs/results/guarantee"), help="without suffix")
    parser.add_argument("--work", type=Path, default=Path("runs/evaluate"), help="folder of what was measured")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model, _ = demo.load()
    check_longest(model, arguments.length)
    made = documents(arguments.documents, arguments.length, seed="guarantee")
    tokens = [torch.tensor(document.token_ids) for document in made]
    missed, opened = measure(model, tokens, arguments.work / f"guarantee-{arguments.length}.documents.pt")
    settings, _ = settings_of(model, POLICY, (arguments.length,), 0.6, key_moments=False)
    half = len(tokens) // 2
    rows = []
    for scope in SCOPES:
        for alpha in ALPHAS:
            target = RiskTarget(alpha=alpha, scope=scope)
            if documents_needed(target) > half:
                continue
            row = splits(missed, opened, target, arguments.splits)
            margins = RUNGS[choose(missed[:half], opened[:half], target)]
            found = on_patched(model, tokens[half : half + arguments.patched], margins, settings)
            row |= dict(zip(("patched", "patched_worst_head", "patched_open_fraction"), found, strict=True))
            rows.append(row)
            print({name: value for name, value in row.items() if "by_split" not in name}, flush=True)
    (arguments.work / "guarantee.json").write_text(json.dumps(rows))
    arguments.out.with_suffix(".md").write_text(page(rows, arguments))
    plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
