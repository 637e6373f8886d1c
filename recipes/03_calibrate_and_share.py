"""Measure a model once, share the result, and ask for a risk in place of a threshold.

python recipes/03_calibrate_and_share.py                     # into a folder
python recipes/03_calibrate_and_share.py --repo me/my-model  # to the Hub, with the token of `hf auth login`
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import patchattn
from patchattn import Calibration, MomentGate, Policy, RiskTarget, demo


def main() -> None:
    """Measure, share, load, patch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=60, help="a risk of alpha needs 1 / alpha - 1 of them")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a document")
    parser.add_argument("--alpha", type=float, default=0.02, help="share of its attention that a head may miss")
    parser.add_argument("--folder", default="my-calibration", help="where to save without --repo")
    parser.add_argument("--repo", help="repository on the Hub")
    options = parser.parse_args()
    model, tokenizer = demo.load()
    policy = Policy(window_size=128, min_bulk=0, gate=MomentGate(threshold=RiskTarget(alpha=options.alpha)))
    measured = patchattn.calibrate(
        model,
        tokenizer,
        [demo.sample_text()],
        policy,
        lengths=(options.length,),
        documents=options.documents,
        corpus="Python source",
        progress=True,
    )

    if options.repo:
        # Whoever pins the commit gets these numbers, whatever is pushed later.
        commit = measured.push_to_hub(options.repo)
        print(f"pushed to {options.repo} as {commit}")
        shared = Calibration.from_pretrained(options.repo, revision=commit)
    else:
        print(f"saved to {measured.save_pretrained(options.folder)}")
        shared = Calibration.from_pretrained(options.folder)

    table = Table("risk", title=f"What a risk costs, by {options.documents} documents")
    table.add_column("pairs open", justify="right")
    table.add_column("attention missed", justify="right")
    for alpha in (options.alpha, 2 * options.alpha, 4 * options.alpha):
        expected = shared.expected(shared.thresholds(RiskTarget(alpha=alpha)))
        table.add_row(f"{alpha:g}", f"{expected.open_fraction.mean():.1%}", f"{expected.missed_mass.mean():.2%}")
    Console(width=80).print(table)

    # The calibration brings its policy along.
    with patchattn.patch(model, calibration=shared) as handle, torch.no_grad():
        model(**tokenizer(demo.sample_text()[:6000], return_tensors="pt"))
    print(f"patched at a risk of {options.alpha}: {handle.report().open_fraction('prefill'):.1%} of pairs open")


if __name__ == "__main__":
    main()
