"""Rows of tokens, positions and loss weights to train on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchattn.evaluation.documents import Kind, TokenizedText, make_document

MAX_POSITIONS = 4096

# Tokens that a task of each kind may take at most, planted lines and question together.
_COST: dict[Kind, int] = {"fact": 42, "chain": 120, "list": 90, "note": 100}
_SHARE: dict[Kind, float] = {"fact": 0.55, "chain": 0.15, "list": 0.15, "note": 0.15}

# Weight of a target's loss by what it is. Keys and values are random where they are planted,
# and keys where they are asked for: there is nothing to learn. In repeated rows, all but the
# first time round is to be copied.
_WEIGHTS = {
    "random": 0.05,
    "text": 1.0,
    "copied": 1.0,
    "fact": 2.0,
    "chain": 2.0,
    "list": 2.0,
    "note": 2.0,
}
_LABELS = {name: index for index, name in enumerate(_WEIGHTS)}


@dataclass(frozen=True)
class Mix:
    """What a batch is made of.

    Args:
        length: Tokens of a row.
        repeated: Share of rows that repeat a random segment: these teach copying early.
        text: Share of rows that are plain text; the rest are documents with tasks.
        task_fill: Greatest share of a document's tokens that tasks take.
        jumps: Share of rows whose positions jump ahead, so that short rows see long distances.
    """

    length: int
    repeated: float
    text: float
    task_fill: float
    jumps: float


@dataclass(frozen=True)
class Batch:
    """One step's rows, each tensor `[batch, length]`.

    Args:
        tokens: Token ids.
        targets: The next token of each token.
        positions: Rotary positions.
        weights: Weight of each target's loss.
        parts: Masks of the targets whose losses are logged apart, by name.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    weights: Tensor
    parts: dict[str, Tensor]


def make_batch(text: TokenizedText, tokenizer: Any, mix: Mix, *, n_rows: int, seed: str) -> Batch:
    """Draw the rows of one step.

    Args:
        text: Training text.
        tokenizer: Its tokenizer.
        mix: What to draw.
        n_rows: Rows in the batch.
        seed: Everything random follows from it.

    Returns:
        The batch.
    """
    rng = random.Random(seed)
    rows = [_draw_row(text, tokenizer, mix, rng) for _ in range(n_rows)]
    tokens = torch.tensor([row.tokens for row in rows])
    labels = torch.tensor([row.labels for row in rows])[:, 1:]
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        positions=torch.tensor([_draw_positions(mix, rng) for _ in rows]),
        weights=torch.tensor(list(_WEIGHTS.values()))[labels],
        parts={name: labels == index for index, name in enumerate(_WEIGHTS) if name != "random"},
    )


@dataclass(frozen=True)
class _Row:
    """One row of `length + 1` tokens, and what each of them is (an index into `_WEIGHTS`)."""

    tokens: list[int]
    labels: list[int]


def _draw_row(text: TokenizedText, tokenizer: Any, mix: Mix, rng: random.Random) -> _Row:
    """Draw one row."""
    length = mix.length + 1
    choice = rng.random()
    if choice < mix.repeated:
        period = rng.randint(length // 8, length // 2)
        segment = [rng.randrange(2, tokenizer.vocab_size) for _ in range(period)]
        row = [tokenizer.bos_token_id, *(segment * (length // period + 1))][:length]
        labels = [_LABELS["random" if i <= period else "copied"] for i in range(length)]
        return _Row(row, labels)

    kinds: list[Kind] = []
    if choice >= mix.repeated + mix.text:
        budget = rng.uniform(0.3, 1.0) * mix.task_fill * length
        only_facts = rng.random() < 0.3
        while True:
            options = list(_SHARE) if not only_facts else ["fact"]
            kind = rng.choices(options, [_SHARE[option] for option in options])[0]
            budget -= _COST[kind]
            if budget < 0:
                break
            kinds.append(kind)
        kinds = kinds or ["fact"]
    document = make_document(
        text,
        tokenizer,
        length=length,
        kinds=kinds,
        seed=rng.getrandbits(64),
        split="train",
        ask="end" if rng.random() < 0.3 else "throughout",
    )
    labels = [_LABELS["text"]] * length
    for start, end in document.planted:
        labels[start:end] = [_LABELS["random"]] * (end - start)
    for question in document.questions:
        n_prompt = question.answer_start - question.start
        n_answer = question.answer_end - question.answer_start
        labels[question.start : question.answer_start] = [_LABELS["random"]] * n_prompt
        labels[question.answer_start : question.answer_end] = [_LABELS[question.kind]] * n_answer
    return _Row(list(document.token_ids), labels)


def _draw_positions(mix: Mix, rng: random.Random) -> list[int]:
    """Draw a row's positions: 0 to `length - 1`, or with up to three jumps ahead."""
    spare = MAX_POSITIONS - mix.length
    if spare <= 0 or rng.random() >= mix.jumps:
        return list(range(mix.length))
    n_jumps = rng.randint(1, 3)
    places = sorted(rng.randrange(1, mix.length) for _ in range(n_jumps))
    ahead = sorted(rng.randint(0, spare) for _ in range(n_jumps))
    positions = list(range(mix.length))
    for place, jump, previous in zip(places, ahead, [0, *ahead], strict=False):
        positions[place:] = [p + jump - previous for p in positions[place:]]
    return positions
