"""Drafts of closed heads that dense attention verifies give the text of dense attention, token for token.

python recipes/10_lossless_drafts.py
"""

from __future__ import annotations

import argparse

import torch

import patchattn
from patchattn import demo


def main() -> None:
    """Write on from one prompt, densely and with drafts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=1500, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens to write")
    parser.add_argument("--tokens", type=int, default=3, help="tokens of a draft; 0 adapts to what they save")
    options = parser.parse_args()

    # Any causal language model that goes through transformers' attention interface works in its place.
    model, tokenizer = demo.load()
    # In bfloat16 dense attention itself writes other tokens in places, depending on how many it reads at once.
    model = model.float()
    prompt = tokenizer(demo.sample_text()[: 10 * options.length], return_tensors="pt").input_ids[:, : options.length]
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": options.new, "do_sample": False}
    dense = model.generate(prompt, **asked)

    policy = patchattn.Policy(window_size=256, min_bulk=0, gate=patchattn.ClosedGate())
    with patchattn.draft(model, policy, tokens=options.tokens or "auto") as handle:
        drafted = model.generate(prompt, **asked)

    print(tokenizer.decode(drafted[0, prompt.shape[1] :]))
    print(handle.report().drafts)
    same = int((dense == drafted).sum()) - prompt.shape[1] if dense.shape == drafted.shape else 0
    print(f"{same} of {dense.shape[1] - prompt.shape[1]} tokens are those of dense attention")


if __name__ == "__main__":
    main()
