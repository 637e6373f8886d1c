"""What the patched model and the presses of kvpress are both put through; runs in either environment.

The model reads a context of 3,400 tokens or so without knowing what it will be asked. Then each question of the
document is appended by itself, answer included, and taken away again, so that no question sees another. Text loss is
that of the tokens that follow a context of plain text.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from patchattn import demo
from patchattn.evaluation.documents import Document, make_document, tokenize_text
from patchattn.hf.architecture import with_cache

LENGTH = 4096
FACTS = 36
FOLLOWING = 640
"""Tokens of plain text that are predicted from the context before them."""

Read = Callable[[Any, Tensor], Any]
"""Reads a context, [1, tokens], into a new cache, which may then hold fewer keys than tokens."""


@dataclass
class Row:
    """One line of the table.

    Args:
        method: What decides about the keys.
        setting: Its parameter.
        question: Whether the question was known when the cache was compressed: `"later"` or `"known"`.
        right: Facts of which every token of the answer was the most likely one, given the true tokens before it.
        asked: Facts asked for.
        losses: Text loss of each document, nats per token; empty where it was not measured.
        cache: Keys left in the cache of those of the context, as a share.
        prefill: Keys scored while the context was read, as a share of the causal keys.
        attended: Keys attended to while questions were answered, mean over query heads and tokens, as a share.
        read: Keys that some query head of their KV head attended to then: those a decoding step must load.
        documents: Digest of the token ids of all documents, which must agree between the environments.
        seconds: Processor time.
    """

    method: str
    setting: str
    question: str
    right: int = 0
    asked: int = 0
    losses: tuple[float, ...] = ()
    cache: float = 1.0
    prefill: float = 1.0
    attended: float = 1.0
    read: float = 1.0
    documents: str = ""
    seconds: float = 0.0


def documents(count: int) -> tuple[list[Document], list[list[int]]]:
    """Make the documents with facts, and as many of plain text."""
    _, tokenizer = demo.load()
    text = tokenize_text(demo.sample_text(), tokenizer)
    kinds = ("fact",) * FACTS
    asked = [make_document(text, tokenizer, length=LENGTH, kinds=kinds, seed=f"kvpress/{at}") for at in range(count)]
    plain = [make_document(text, tokenizer, length=LENGTH, kinds=(), seed=f"kvpress/plain/{at}") for at in range(count)]
    return asked, [list(document.token_ids) for document in plain]


def digest(asked: list[Document], plain: list[list[int]]) -> str:
    """Say in a few letters which tokens the model read."""
    ids = [list(document.token_ids) for document in asked] + plain
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:12]


def context_of(document: Document) -> list[int]:
    """Return the tokens before the first question."""
    return list(document.token_ids[: document.questions[0].start])


def following(model: Any, cache: Any, ids: list[int], position: int) -> Tensor:
    """Read tokens after a context, take them out of the cache again, and return the logits, [tokens, vocabulary]."""
    positions = torch.arange(position, position + len(ids))[None]
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, position_ids=positions, **with_cache(model, cache), use_cache=True).logits[0]
    cache.crop(-len(ids))
    return logits.float()


@torch.no_grad()
def answer_all(model: Any, cache: Any, document: Document) -> int:
    """Ask every question of a document by itself; returns how many are answered exactly."""
    right = 0
    for question in document.questions:
        ids = list(document.token_ids[question.start : question.answer_end])
        best = following(model, cache, ids, document.questions[0].start).argmax(-1).tolist()
        start = question.answer_start - question.start
        right += best[start - 1 : -1] == ids[start:]
    return right


@torch.no_grad()
def loss_after(model: Any, cache: Any, ids: list[int]) -> float:
    """Mean loss of the last tokens of a text whose first ones are in the cache, nats per token."""
    rest = ids[-FOLLOWING:]
    logits = following(model, cache, rest, len(ids) - FOLLOWING)
    return functional.cross_entropy(logits[:-1], torch.tensor(rest[1:])).item()


def measure(model: Any, row: Row, asked: list[Document], plain: list[list[int]], read: Read) -> Row:
    """Fill in what the model answers and predicts after reading each context."""
    begin = time.process_time()
    row.documents = digest(asked, plain)
    for document in asked:
        context = context_of(document)
        cache = read(model, torch.tensor([context]))
        row.cache = cache.get_seq_length() / len(context)
        row.right += answer_all(model, cache, document)
        row.asked += len(document.questions)
    losses = []
    for ids in plain:
        cache = read(model, torch.tensor([ids[:-FOLLOWING]]))
        losses.append(loss_after(model, cache, ids))
    row.losses = tuple(losses)
    row.seconds = time.process_time() - begin
    return row


def save(rows: list[Row], path: Path) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(Row("", "", ""))), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            losses = " ".join(f"{loss:.5f}" for loss in row.losses)
            numbers = {name: f"{getattr(row, name):.4f}" for name in ("cache", "prefill", "attended", "read")}
            writer.writerow(asdict(row) | numbers | {"losses": losses, "seconds": f"{row.seconds:.1f}"})


def load(path: Path) -> list[Row]:
    """Read rows that `save` wrote."""
    with path.open(newline="") as file:
        return [
            Row(
                line["method"],
                line["setting"],
                line["question"],
                int(line["right"]),
                int(line["asked"]),
                tuple(map(float, line["losses"].split())),
                *(float(line[name]) for name in ("cache", "prefill", "attended", "read")),
                line["documents"],
                float(line["seconds"]),
            )
            for line in csv.DictReader(file)
        ]
