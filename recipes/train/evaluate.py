"""Measure a model folder on held-out tasks and held-out text.

python recipes/train/evaluate.py --model patchattn/demo/model
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Recipes run from a checkout: the package beside them is used, installed or not.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from corpus import collect, join

from patchattn.evaluation.answers import Scores, teacher_forced
from patchattn.evaluation.documents import Kind, TokenizedText, make_document, tokenize_text
from patchattn.evaluation.loss import losses

_KINDS_PER_1024: dict[str, list[Kind]] = {
    "fact": ["fact"] * 6,
    "others": ["chain", "list", "note"],
}


def measure_tasks(
    model: Any, tokenizer: Any, text: TokenizedText, *, length: int, n_documents: int, seed: str
) -> Scores:
    """Score documents of `length` tokens: facts only, and everything else."""
    return teacher_forced(
        model,
        (
            make_document(text, tokenizer, length=length, kinds=kinds * (length // 1024), seed=f"{seed}/{name}/{index}")
            for name, kinds in _KINDS_PER_1024.items()
            for index in range(n_documents)
        ),
    )


def text_loss(model: Any, tokenizer: Any, tokens: list[int], *, length: int) -> float:
    """Mean loss in nats per token over windows of `length` tokens, each after a BOS."""
    starts = range(0, len(tokens) - length + 1, length - 1)
    windows = ([tokenizer.bos_token_id, *tokens[start : start + length - 1]] for start in starts)
    return torch.cat([losses(model, window) for window in windows]).double().mean().item()


def ngram_losses(train: list[int], held_out: list[int], vocab_size: int) -> tuple[float, float]:
    """Mean loss of a unigram and of an interpolated trigram model, nats per token.

    The trigram model mixes the three orders by Witten-Bell: the weight of an order is its
    count over its count plus the number of distinct tokens that followed the same context.
    """
    padded = [0, 0, *train]
    counts = [Counter(tuple(padded[i - n : i + 1]) for i in range(2, len(padded))) for n in range(3)]
    totals = [Counter() for _ in range(3)]
    kinds = [Counter() for _ in range(3)]
    for order, counter in enumerate(counts):
        for gram, count in counter.items():
            totals[order][gram[:-1]] += count
            kinds[order][gram[:-1]] += 1
    losses = [0.0, 0.0]
    for i in range(2, len(held_out)):
        probability = 1 / vocab_size
        for order in range(3):
            gram = tuple(held_out[i - order : i + 1])
            total, kind = totals[order][gram[:-1]], kinds[order][gram[:-1]]
            if total:
                probability = (counts[order][gram] + kind * probability) / (total + kind)
            if order == 0:
                losses[0] -= math.log(probability)
        losses[1] -= math.log(probability)
    return losses[0] / (len(held_out) - 2), losses[1] / (len(held_out) - 2)


def main() -> None:
    """Print exact matches by length and kind, and text losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=42, help="per length and group of kinds")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--text-tokens", type=int, default=100_000, help="0 leaves text out")
    parser.add_argument("--seed", default="evaluate")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    files = collect()
    text = tokenize_text(join([f for f in files if f.held_out]), tokenizer)

    for length in arguments.lengths:
        scores = measure_tasks(
            model, tokenizer, text, length=length, n_documents=arguments.documents, seed=arguments.seed
        )
        row = "  ".join(f"{kind} {scores.exact_match(kind):.3f} ({asked})" for kind, asked in scores.asked.items())
        print(f"{length:5d} tokens, exact match (questions): {row}", flush=True)
    if not arguments.text_tokens:
        return
    held_out = [token for line in text.tokens for token in line][: arguments.text_tokens]
    for length in arguments.lengths:
        loss = text_loss(model, tokenizer, held_out, length=length)
        print(f"{length:5d} tokens, text loss: {loss:.3f} nats per token", flush=True)
    train = tokenize_text(join([f for f in files if not f.held_out]), tokenizer)
    train_tokens = [token for line in train.tokens for token in line]
    unigram, trigram = ngram_losses(train_tokens, held_out, tokenizer.vocab_size)
    print(f"unigram {unigram:.3f}, trigram {trigram:.3f} nats per token")


if __name__ == "__main__":
    main()
