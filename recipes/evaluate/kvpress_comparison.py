"""Put patchattn's gates and presses of kvpress through one protocol, and write the page that compares them.

python recipes/evaluate/kvpress_comparison.py --kvpress-python ENV/bin/python --out docs/results/kvpress
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import DynamicCache

sys.path[:0] = [str(Path(__file__).parents[2])]

from kvpress_protocol import FACTS, FOLLOWING, LENGTH, Document, Row, context_of, documents, load, measure, save

import patchattn
from patchattn import ClosedGate, MomentGate, OpenFractionTarget, OpenGate, Policy, StaticGate, demo
from patchattn.calibration import Calibration
from patchattn.evaluation.statistics import wilson_interval
from patchattn.hf.architecture import with_cache
from patchattn.testing import recorded_gates

POLICY = Policy(sink_size=16, window_size=256, min_bulk=0)
RESAMPLES = 2000


def gates(calibration: Calibration) -> list[tuple[str, str, Any]]:
    """List (method, setting, gate) of patchattn's rows."""
    budgets = [
        (
            "patchattn, moment gate, calibrated",
            f"budget {share:.0%}",
            MomentGate(threshold=OpenFractionTarget(fraction=share)),
        )
        for share in (0.1, 0.25, 0.5)
    ]
    return [
        ("dense", "", OpenGate()),
        ("patchattn, closed", "", ClosedGate()),
        ("patchattn, static", "8 heads", StaticGate.from_calibration(calibration, heads=8)),
        ("patchattn, moment gate", "threshold 0.6", MomentGate()),
        ("patchattn, moment gate", "threshold 0.2", MomentGate(threshold=0.2)),
        *budgets,
    ]


def calibration_of(model: Any) -> Calibration:
    """Load the calibration of the shipped model, which was measured in bfloat16, for the model in float32."""
    found = Calibration.from_pretrained(Path(__file__).parents[2] / "calibrations" / "patchattn-demo")
    dtype = str(model.dtype).removeprefix("torch.")
    fingerprint = found.manifest.fingerprint.model_copy(update={"dtype": dtype})
    return Calibration(found.manifest.model_copy(update={"fingerprint": fingerprint}), found.policy, found.tensors)


def measure_gate(model: Any, row: Row, gate: Any, calibration: Calibration, asked: list[Document], plain: Any) -> Row:
    """Measure one gate, and how many keys it attends to."""

    @torch.no_grad()
    def read(model: Any, tokens: Tensor) -> Any:
        cache = DynamicCache()
        model.model(input_ids=tokens, **with_cache(model, cache))
        return cache

    policy = POLICY.model_copy(update={"gate": gate})
    with patchattn.patch(model, policy, calibration=calibration, record="timeline") as handle:
        measure(model, row, asked, plain, read)
        calls = recorded_gates(handle)
    add_shares(row, calls, asked, model.config.num_key_value_heads)
    return row


def add_shares(row: Row, calls: dict[int, list[Tensor]], asked: list[Document], kv_heads: int) -> None:
    """Count the keys that the recorded decisions, in the order of the calls, attend to."""
    prefill, attended, read = [], [], []
    for layer in calls.values():
        at = iter(layer)
        for document in asked:
            tokens = len(context_of(document))
            prefill.append(share_of_keys(next(at), 0).mean(1).mean())
            for _ in document.questions:
                opened = next(at)
                group = opened.unflatten(1, (kv_heads, -1)).any(2)
                attended.append(share_of_keys(opened, tokens).mean())
                read.append(share_of_keys(group, tokens).mean())
    row.prefill, row.attended, row.read = (torch.stack(part).mean().item() for part in (prefill, attended, read))


def share_of_keys(opened: Tensor, begin: int) -> Tensor:
    """Share of the causal keys that each pair attends to; over a whole context, weighted by their number.

    Args:
        opened: [1, heads, query] bool.
        begin: Position of the first query.

    Returns:
        [1, heads, query].
    """
    causal = torch.arange(begin + 1, begin + opened.shape[2] + 1).float()
    local = causal.clamp(max=POLICY.sink_size + POLICY.window_size)
    keys = torch.where(opened, causal, local)
    return keys / (causal if begin else causal.mean())


def change(row: Row, dense: Row) -> tuple[float, float, float]:
    """Relative change of the text loss against dense, and its 95% interval from resampling documents."""
    chosen = random.Random(0)

    def ratio(indices: list[int]) -> float:
        return sum(row.losses[at] for at in indices) / sum(dense.losses[at] for at in indices) - 1

    every = list(range(len(dense.losses)))
    found = sorted(ratio(chosen.choices(every, k=len(every))) for _ in range(RESAMPLES))
    return ratio(every), found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]


def table(rows: list[Row], dense: Row) -> str:
    """Write the rows of one protocol as a Markdown table, by keys attended to."""
    head = ["method", "setting", "facts exact (95% interval)", "text loss over dense (95% interval)"]
    head += ["attended", "read", "scored", "cache"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: (-row.attended, row.method)):
        low, high = wilson_interval(row.right, row.asked)
        cells = [row.method, row.setting, f"{row.right / row.asked:.3f} ({low:.3f}-{high:.3f})"]
        if row.losses:
            cells.append("{:+.2%} ({:+.2%} to {:+.2%})".format(*change(row, dense)))
        else:
            cells.append("")
        cells += [f"{share:.0%}" for share in (row.attended, row.read, row.prefill, row.cache)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# Beside kvpress

patchattn and presses of [kvpress](https://pypi.org/project/kvpress/) on the shipped model in float32: the same contexts
and the same questions, {count} documents of {length:,} tokens with {facts} facts each, {asked} facts in all.

They serve different needs. A press reads the context densely, once, and throws keys away for good: the cache shrinks,
and all later queries have to do with what is left. patchattn keeps every key and decides for each query and head
whether to read the far ones: the cache does not shrink, and reading the context is cheaper too.

| what is saved | press of kvpress | patchattn |
|---|---|---|
| memory of the cache | all but what is kept | nothing |
| attention while the context is read | nothing; scoring the keys comes on top | far keys of closed pairs |
| attention while answers are written | all but what is kept | far keys of closed pairs |

## Questions that come later

The context, about {context:,} tokens, is read without knowing the questions. Then each question is appended by itself,
at its true position, and taken away again. This is what the pipeline of kvpress does, and the hard case for it: it has
to keep what any question may need.

- *Attended*: share of the causal keys that a query head attends to while questions are answered, mean over heads and
  tokens. This is the budget to compare at.
- *Read*: the same, counting a key if any query head of its KV head needs it: what a decoding step loads.
- *Scored*: share of the causal keys that are scored while the context is read.
- *Cache*: share of the context's keys that are left in the cache.

All count keys, not tiles of a kernel. Text loss is that of the {following} tokens that follow a context of plain text.

{later}

![facts and text loss against keys attended to](kvpress.png)

## Questions that are known

Here a press sees context and question before it compresses, once for each question; {known_asked} questions are asked.
The first token of the answer comes from dense attention, the others from the compressed cache, and the context can't
be used for another question afterwards. For patchattn nothing changes: it does not look ahead.

{known}

## How to read it

- From a third of the keys on, gates answer most facts that dense attention does, and presses that do not know the
  question do not. At a quarter neither does, and StreamingLLM is ahead. The static choice of eight heads is as good as
  the moment gate at about a third.
- In text loss presses are not behind at the same share of keys: they read the context densely, the gates did not.
- A decoding step of the default moment gate reads nearly all keys in this model: its three query heads per KV head are
  rarely closed together, and questions open more than text.
- Looking up random numbers is the worst case for choosing keys before the question is known: nothing marks the line
  that will be asked for.
- Closed heads and StreamingLLM start from the same keys, {local} of them. The window of a closed head moves on with the
  text; that of StreamingLLM stays, and what is appended is added. StreamingLLM reads the context densely.
- The model is small and a few of its heads do all of the looking up. Presses are made for models a thousand times as
  large; nothing here says how they do there.

Presses have the defaults of kvpress {version}, but for `n_sink=16` of StreamingLLM. A budget is the open fraction over
whole documents for which thresholds for each head come from `calibrations/patchattn-demo`; questions open more than
text does. Intervals: Wilson for facts, resampled documents for the text loss.

## Make it again

kvpress needs transformers before 5.3, patchattn a later one, so kvpress has an environment of its own.

```bash
python -m venv ENV && ENV/bin/pip install torch==2.13.0 kvpress==0.5.5 pydantic
python recipes/evaluate/kvpress_comparison.py --kvpress-python ENV/bin/python --out docs/results/kvpress
```

All rows: [kvpress.csv](kvpress.csv).
"""


def plot(rows: list[Row], path: Path) -> None:
    """Draw facts and text loss against the share of keys attended to."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    facts, loss = figure.subplots(1, 2)
    dense = next(row for row in rows if row.method == "dense")
    styles = {
        "patchattn, moment gate, calibrated": ("tab:blue", "o-"),
        "patchattn, moment gate": ("tab:cyan", "o-"),
        "patchattn, static": ("tab:purple", "D"),
        "patchattn, closed": ("black", "D"),
        "StreamingLLM": ("tab:grey", "s-"),
        "SnapKV": ("tab:orange", "s-"),
        "ExpectedAttention": ("tab:red", "s-"),
    }
    for method, (colour, style) in styles.items():
        chosen = sorted((row for row in rows if row.method == method), key=lambda row: row.attended)
        later = [row for row in chosen if row.question == "later"]
        draw_facts(facts, later, colour=colour, style=style, label=method)
        known = [row for row in chosen if row.question == "known"]
        if known:
            draw_facts(facts, known, colour=colour, style="s:", label=f"{method}, question known", fill="none")
        changes = [[100 * value for value in change(row, dense)] for row in later]
        middle = [value for value, _, _ in changes]
        reach = [[value - low for value, low, _ in changes], [high - value for value, _, high in changes]]
        at = [100 * row.attended for row in later]
        loss.errorbar(at, middle, reach, fmt=style, color=colour, capsize=2, elinewidth=0.8, markersize=5)
    facts.axhline(dense.right / dense.asked, color="black", linestyle=":", label="dense")
    loss.axhline(0, color="black", linestyle=":")
    facts.set_title("Looking up facts", fontsize=10)
    loss.set_title("Plain text after the context", fontsize=10)
    facts.set_ylabel("facts answered exactly")
    facts.set_ylim(-0.03, 1.03)
    loss.set_ylabel("text loss against dense, %")
    for axes in (facts, loss):
        axes.set_xlabel(
            "keys attended to while answering, %" if axes is facts else "keys attended to, %, as on the left"
        )
        axes.set_xlim(0, 100)
        axes.grid(alpha=0.3)
    figure.legend(*facts.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def draw_facts(axes: Any, rows: list[Row], *, colour: str, style: str, label: str, fill: str = "full") -> None:
    """Draw shares of right answers with their Wilson intervals."""
    shares = [row.right / row.asked for row in rows]
    bounds = [wilson_interval(row.right, row.asked) for row in rows]
    reach = [
        [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
        [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
    ]
    at = [100 * row.attended for row in rows]
    axes.errorbar(
        at, shares, reach, fmt=style, color=colour, capsize=2, elinewidth=0.8, markersize=5, fillstyle=fill, label=label
    )


def write_page(rows: list[Row], asked: list[Document], out: Path, version: str) -> None:
    """Write page, picture and CSV file."""
    save(rows, out.with_suffix(".csv"))
    plot(rows, out.with_suffix(".png"))
    known = [row for row in rows if row.question == "known"]
    dense = next(row for row in rows if row.method == "dense")
    out.with_suffix(".md").write_text(
        PAGE.format(
            count=len(asked),
            length=LENGTH,
            facts=FACTS,
            asked=dense.asked,
            context=round(sum(len(context_of(document)) for document in asked) / len(asked)),
            following=FOLLOWING,
            later=table([row for row in rows if row.question == "later"], dense),
            known=table(known, dense),
            known_asked=known[0].asked,
            local=POLICY.sink_size + POLICY.window_size,
            version=version,
        )
    )


def presses(python: Path, count: int, kept: Path) -> list[Row]:
    """Measure the presses in their own environment."""
    script = Path(__file__).with_name("kvpress_presses.py")
    subprocess.run([python, script, "--documents", str(count), "--out", kept], check=True)
    return load(kept)


def main() -> None:
    """Measure gates here and presses there, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kvpress-python", type=Path, required=True, help="Python of an environment with kvpress")
    parser.add_argument("--documents", type=int, default=6, help="36 facts are asked in each")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kvpress"), help="without suffix")
    arguments = parser.parse_args()
    code = "import importlib.metadata; print(importlib.metadata.version('kvpress'))"
    version = subprocess.run([arguments.kvpress_python, "-c", code], check=True, capture_output=True, text=True).stdout
    asked, plain = documents(arguments.documents)
    model = demo.load()[0].float()  # so that differences come from the keys, not from rounding
    calibration = calibration_of(model)
    rows = []
    for method, setting, gate in gates(calibration):
        rows.append(measure_gate(model, Row(method, setting, "later"), gate, calibration, asked, plain))
        print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows += presses(arguments.kvpress_python, arguments.documents, Path(folder) / "presses.csv")
    if len({row.documents for row in rows}) > 1:
        raise SystemExit("The two environments tokenize the documents differently, so their rows can't be compared.")
    write_page(rows, asked, arguments.out, version.strip())


if __name__ == "__main__":
    main()
