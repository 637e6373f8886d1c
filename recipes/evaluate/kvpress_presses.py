"""Put presses of kvpress through the protocol; runs in an environment of its own, started by `kvpress_comparison.py`.

ENV/bin/python recipes/evaluate/kvpress_presses.py --out presses.csv
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]

from kvpress import ExpectedAttentionPress, SnapKVPress, StreamingLLMPress
from kvpress_protocol import Document, Row, context_of, digest, documents, following, measure, save
from transformers import DynamicCache

from patchattn import demo
from patchattn.hf.architecture import with_cache

KEPT = (0.08, 0.25, 0.5)
"""Shares of the context's keys that stay in the cache."""

KEPT_KNOWN = (0.25,)
"""The same where the question is known; each question takes a prefill of its own."""

PRESSES = {
    "StreamingLLM": partial(StreamingLLMPress, n_sink=16),
    "SnapKV": SnapKVPress,
    "ExpectedAttention": ExpectedAttentionPress,
}
"""Defaults of kvpress, but for the sink, which is as long as that of patchattn's policy."""


@torch.no_grad()
def read_with(press: Any, model: Any, tokens: Tensor) -> Any:
    """Read a context into a cache that the press compresses at the end, as the pipeline of kvpress does."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=tokens, **with_cache(model, cache))
    return cache


@torch.no_grad()
def measure_known(model: Any, row: Row, asked: list[Document], press: Any, questions: int) -> Row:
    """Compress once for each question, after reading it; only the answer is written from the compressed cache."""
    begin = time.process_time()
    for document in asked:
        context, ids = context_of(document), document.token_ids
        for question in document.questions[:questions]:
            prompt = context + list(ids[question.start : question.answer_start])
            answer = list(ids[question.answer_start : question.answer_end])
            cache = DynamicCache()
            with press(model):
                tokens = torch.tensor([prompt])
                logits = model(input_ids=tokens, **with_cache(model, cache), logits_to_keep=1).logits[0, -1:]
            row.cache = cache.get_seq_length() / len(prompt)
            later = following(model, cache, answer[:-1], len(prompt))
            row.right += torch.cat([logits, later]).argmax(-1).tolist() == answer
            row.asked += 1
    row.seconds = time.process_time() - begin
    return row


def main() -> None:
    """Measure every press at every share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--questions", type=int, default=4, help="of each document, where the question is known")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    asked, plain = documents(arguments.documents)
    model = demo.load()[0].float()  # so that differences come from the keys, not from rounding
    rows = []
    for name, make in PRESSES.items():
        for kept in KEPT:
            read = partial(read_with, make(compression_ratio=1 - kept))
            rows.append(with_share(measure(model, Row(name, f"{kept:.0%} kept", "later"), asked, plain, read), asked))
            print(rows[-1], flush=True)
            save(rows, arguments.out)
    for name in ("SnapKV", "ExpectedAttention"):
        for kept in KEPT_KNOWN:
            row = Row(name, f"{kept:.0%} kept", "known", documents=digest(asked, plain))
            press = PRESSES[name](compression_ratio=1 - kept)
            rows.append(with_share(measure_known(model, row, asked, press, arguments.questions), asked))
            print(rows[-1], flush=True)
            save(rows, arguments.out)


def with_share(row: Row, asked: list[Document]) -> Row:
    """Add the share of keys attended to: what was kept, and the tokens of the question up to each query."""
    shares = []
    for document in asked:
        tokens = len(context_of(document))
        for question in document.questions:
            own = torch.arange(1, question.answer_end - question.start + 1)
            shares.append(((row.cache * tokens + own) / (tokens + own)).mean().item())
    row.attended = row.read = sum(shares) / len(shares)
    return row


if __name__ == "__main__":
    main()
