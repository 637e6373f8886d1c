"""Prove on a model of your own that patching it changes what its gates decide, and nothing else.

python recipes/04_prove_your_model.py                       # the shipped model
python recipes/04_prove_your_model.py --model path/or/name
"""

from __future__ import annotations

import argparse

import torch

import patchattn
from patchattn import MomentGate, Policy, demo
from patchattn.testing import assert_equivalent


def main() -> None:
    """Check support, prove prefill and decode, and say what was compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(demo.model_folder()), help="folder or name on the Hub")
    parser.add_argument(
        "--tokens", type=int, default=700, help="tokens of text; attention is formed densely in float64"
    )
    parser.add_argument("--threshold", type=float, default=0.9, help="local share from which a head closes")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    # float32 rounds 65,000 times as finely as bfloat16, so a small mistake can't hide.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    support = patchattn.check_support(model)
    if not support:
        raise SystemExit(f"{type(model).__name__} can't be patched:\n{support}")

    text = tokenizer(demo.sample_text(), truncation=True, max_length=options.tokens, return_tensors="pt")
    policy = Policy(sink_size=4, window_size=64, min_bulk=0, gate=MomentGate(threshold=options.threshold))
    print(assert_equivalent(model, policy, text["input_ids"], new_tokens=8))


if __name__ == "__main__":
    main()
