"""Compare thresholds from a calibration with one threshold for all heads.

python recipes/evaluate/calibrated.py --calibration calibrations/patchattn-demo --out docs/results/calibrated.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import patchattn
from patchattn import MomentGate, OpenFractionTarget, OpenGate, RiskTarget, StaticGate, demo
from patchattn.calibration import Calibration
from patchattn.evaluation.answers import teacher_forced
from patchattn.evaluation.documents import make_document, tokenize_text
from patchattn.evaluation.statistics import wilson_interval
from patchattn.gates import Gate


def gates(calibration: Calibration) -> dict[str, Gate]:
    """Name the gates to compare; what matters most comes first."""
    return {
        "dense": OpenGate(),
        "one threshold, 0.6": MomentGate(threshold=0.6),
        "risk 0.05 for each head": MomentGate(threshold=RiskTarget(alpha=0.05)),
        "risk 0.05, mean over heads": MomentGate(threshold=RiskTarget(alpha=0.05, scope="model")),
        "budget 43%": MomentGate(threshold=OpenFractionTarget(fraction=0.43)),
        "budget 25%": MomentGate(threshold=OpenFractionTarget(fraction=0.25)),
        "one threshold, 0.25": MomentGate(threshold=0.25),
        "8 static heads of the calibration": StaticGate.from_calibration(calibration, heads=8),
        "risk 0.1 for each head": MomentGate(threshold=RiskTarget(alpha=0.1)),
    }


def main() -> None:
    """Score every gate on the same documents; write the table after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", default="calibrations/patchattn-demo")
    parser.add_argument("--documents", type=int, default=8, help="36 facts are asked in each")
    parser.add_argument("--out", type=Path, default=Path("docs/results/calibrated.md"))
    arguments = parser.parse_args()
    calibration = Calibration.from_pretrained(arguments.calibration)
    model, tokenizer = demo.load()
    text = tokenize_text(demo.sample_text(), tokenizer)
    documents = [
        make_document(text, tokenizer, length=4096, kinds=("fact",) * 36, seed=f"calibrated/{at}")
        for at in range(arguments.documents)
    ]
    lines = ["| gate | open | facts exact (95% interval) | text loss |", "|---|---|---|---|"]
    for name, gate in gates(calibration).items():
        policy = calibration.policy.model_copy(update={"gate": gate, "min_bulk": 0})
        with patchattn.patch(model, policy, calibration=calibration) as handle:
            found = teacher_forced(model, documents)
        right, asked = found.right["fact"], found.asked["fact"]
        low, high = wilson_interval(right, asked)
        opened = handle.report().open_fraction("prefill")
        lines.append(f"| {name} | {opened:.1%} | {right / asked:.3f} ({low:.3f}-{high:.3f}) | {found.text_loss:.4f} |")
        print(lines[-1], flush=True)
        arguments.out.write_text(page(lines, calibration, asked))


def page(lines: list[str], calibration: Calibration, asked: int) -> str:
    """Write the table and how it was measured."""
    manifest = calibration.manifest
    return "\n".join(
        [
            "# Thresholds from a calibration",
            "",
            f"The shipped model in bfloat16 on documents of 4,096 tokens with {asked} facts in all, sink "
            f"{manifest.sink_size}, window {manifest.window_size}, `min_bulk=0`; the calibration is the one in "
            f"`calibrations/patchattn-demo`, measured on {manifest.n_documents} other documents of the same kind. Open "
            "is the open fraction in prefill; text loss is in nats per token. Made by "
            "`python recipes/evaluate/calibrated.py`.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
