"""What the patched model and the presses of kvpress are both put through.

The model reads a context of 3,400 tokens or so without knowing what it will be asked. Then each question of the
document is appended by itself, answer included, and taken away again, so that no question sees another. Text loss is
that of the tokens that follow a context of plain text.

In the environment of kvpress this is a script that prints the row of one press: `protocol.py SnapKV "25% kept" later`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2])]

from context import SINK, Answered, documents, load
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from patchattn.evaluation.documents import Document
from patchattn.hf.architecture import with_cache

DOCUMENTS = 6
FOLLOWING = 640
"""Tokens of plain text that are predicted from the context before them."""

QUESTIONS = 4
"""Asked of each document where the question is known: each takes a prefill of its own."""

Press = Callable[[Any], AbstractContextManager[Any]]
"""While it is entered for a model, caches shrink to the keys that it keeps; `nullcontext` keeps all."""


@dataclass
class Row(Answered):
    """One line of the table; the page says what its shares of keys are.

    `losses` are of each document in nats per token, empty where they were not measured. `documents` is a digest of the
    token ids of all documents, which must agree between the environments. `seconds` are of the processor.
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


def asked_documents() -> list[Document]:
    """Make the documents with facts."""
    return documents("kvpress", DOCUMENTS)


def plain_documents() -> list[Document]:
    """Make the documents of plain text."""
    return documents("kvpress/plain", DOCUMENTS, kinds="plain text")


def digest() -> str:
    """Say in a few letters which tokens the model reads."""
    ids = [list(one.token_ids) for one in asked_documents() + plain_documents()]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:12]


def context_of(one: Document) -> list[int]:
    """Return the tokens before the first question."""
    return list(one.token_ids[: one.questions[0].start])


@torch.no_grad()
def read(ids: list[int], press: Press) -> tuple[DynamicCache, Tensor]:
    """Read a context into a new cache; returns it and the last logits, [1, vocabulary]."""
    model, cache = load()[0], DynamicCache()
    with press(model):
        found = model(input_ids=torch.tensor([ids]), **with_cache(model, cache), logits_to_keep=1)
    return cache, found.logits[0]


@torch.no_grad()
def following(cache: DynamicCache, ids: list[int], position: int) -> Tensor:
    """Read tokens after a context, take them out of the cache again, and return the logits, [tokens, vocabulary]."""
    model, _ = load()
    positions = torch.arange(position, position + len(ids))[None]
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, position_ids=positions, **with_cache(model, cache), use_cache=True).logits[0]
    cache.crop(-len(ids))
    return logits.float()


def ask(row: Row, press: Press) -> None:
    """Read each context, then ask every question of it by itself."""
    for one in asked_documents():
        context = context_of(one)
        cache, _ = read(context, press)
        row.cache = cache.get_seq_length() / len(context)
        for question in one.questions:
            ids = list(one.token_ids[question.start : question.answer_end])
            best = following(cache, ids, len(context)).argmax(-1).tolist()
            start = question.answer_start - question.start
            row.right += best[start - 1 : -1] == ids[start:]
            row.asked += 1


def predict(row: Row, press: Press) -> None:
    """Read each plain text but for its end, then predict that."""
    for one in plain_documents():
        begin, rest = list(one.token_ids[:-FOLLOWING]), list(one.token_ids[-FOLLOWING:])
        logits = following(read(begin, press)[0], rest, len(begin))
        row.losses += (functional.cross_entropy(logits[:-1], torch.tensor(rest[1:])).item(),)


def ask_known(row: Row, press: Press) -> None:
    """Compress once for each question, after reading it; only the answer is written from the compressed cache."""
    for one in asked_documents():
        for question in one.questions[:QUESTIONS]:
            prompt = context_of(one) + list(one.token_ids[question.start : question.answer_start])
            answer = list(one.token_ids[question.answer_start : question.answer_end])
            cache, logits = read(prompt, press)
            row.cache = cache.get_seq_length() / len(prompt)
            later = following(cache, answer[:-1], len(prompt))
            row.right += torch.cat([logits, later]).argmax(-1).tolist() == answer
            row.asked += 1


def put_through(row: Row, press: Press, *, asking: AbstractContextManager[Any] | None = None) -> Row:
    """Measure everything but shares of keys; `asking` is entered while facts are asked for."""
    row.documents, begin = digest(), time.process_time()
    with asking or nullcontext():
        (ask_known if row.question == "known" else ask)(row, press)
    if row.question != "known":
        predict(row, press)
    row.seconds = time.process_time() - begin
    return row


def share_of_keys(left: float) -> float:
    """Share of the keys attended to: what is left of the context, and the tokens of the question up to each query."""
    shares = []
    for one in asked_documents():
        tokens = len(context_of(one))
        for question in one.questions:
            own = torch.arange(1, question.answer_end - question.start + 1)
            shares.append(((left * tokens + own) / (tokens + own)).mean().item())
    return sum(shares) / len(shares)


def main() -> None:
    """Measure the row that the command line names."""
    import kvpress  # only its own environment has it

    method, setting, question = sys.argv[1:]
    torch.set_num_threads(1)
    # The defaults of kvpress, but for the sink, which is as long as that of patchattn's policy.
    options = {"n_sink": SINK} if method == "StreamingLLM" else {}
    kept = int(setting.removesuffix("% kept")) / 100
    press = getattr(kvpress, f"{method}Press")(compression_ratio=1 - kept, **options)
    row = put_through(Row(method, setting, question), press)
    row.attended = row.read = share_of_keys(row.cache)
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
