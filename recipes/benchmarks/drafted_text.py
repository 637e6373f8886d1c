"""Texts that a drafting model writes after real prompts, compared token by token with those of the stock model.

python recipes/benchmarks/drafted_text.py --model FOLDER --dtype fp32
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import RESULTS, Row, arguments, command_line, kept_by, prepare, progress, save
from model import context, twin
from problems import DTYPES
from torch import Tensor
from transformers import DynamicCache

import patchattn
from patchattn import ClosedGate, Policy, demo
from patchattn.evaluation import Material, make_sample
from patchattn.evaluation.drafted import gaps_and_moves
from patchattn.evaluation.policies import fitting_window
from patchattn.evaluation.rows import Store
from patchattn.hf.architecture import with_cache
from patchattn.hf.loading import load_pretrained

OF_REAL, OF_SHIPPED = ("english", "code", "chat", "copy"), ("fact", "list", "note")
SHORTEST = 1100  # with the room for an answer, which the prompt leaves out
READS_ITSELF = 5
BUCKETS = (2048, 4096, 8192)
NOTES = """\
{count} prompts of the tasks {tasks} in turn, {shortest:,} to {longest:,} tokens, {new} new tokens each, greedy. \
Drafts are of closed heads, of {draft} tokens each whether they pay or not, with a window of a quarter of the prompt. \
Stock `generate` and the drafting one go on from copies of the same dense cache; every fifth drafting one reads its \
prompt itself. `same` are texts equal in every token. Of the others, `level` are those where dense attention itself is \
not stable: at the first token that differs the gap between its two best logits is no larger than the most by which \
such a gap moves in this text when the stock model reads the same tokens {queries} at a time in place of one by one, \
which is one step of the numbers that logits are kept in at least. \
`lost` are all others. `level tokens` are those of all dense texts whose gap is that small, `gap moves` the most by \
which one moved, in logits.\
"""


@dataclass
class Compared:
    """One prompt, as it is kept until all are there.

    Args:
        command: The command line without folders.
        at: Number of the prompt.
        tokens: Its tokens.
        new: New tokens.
        same: Those before the first that differs.
        drafted: Tokens that were drafted.
        kept: Drafted tokens that were kept.
        moves: The most by which the gap of the two best logits moves when queries are batched, logits.
        level: New tokens of the dense text whose gap is no larger than that.
        gap: The gap at the first token that differs, logits; None where none does.
    """

    command: str
    at: int
    tokens: int
    new: int
    same: int
    drafted: int
    kept: int
    moves: float
    level: int
    gap: float | None


def main() -> None:
    """Compare what a run that was broken off has not, and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="shipped", help="shipped, or a folder of a model of English")
    parser.add_argument("--count", type=int, default=50, help="prompts")
    parser.add_argument("--longest", type=int, help="tokens of the longest prompt and its text; default: the context")
    parser.add_argument("--new", type=int, default=48, help="new tokens of each text")
    parser.add_argument("--tokens", type=int, default=4, help="tokens of each draft")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    options = prepare(parser.parse_args())
    read = context(options, options.model)
    longest = int(min(read, options.longest or 8192)) - options.new
    if longest <= SHORTEST // 2:
        parser.error(f"--longest leaves {longest} tokens for a prompt: give more than {SHORTEST // 2 + options.new}")
    name = "drafted_text" if options.dtype == "fp32" else f"drafted_text_{options.dtype}"
    store = Store((options.out or RESULTS) / f"{options.name or name}.jsonl", Compared)
    model, tokenizer = demo.load() if options.model == "shipped" else load_pretrained(options.model)
    model = model.to(options.device, DTYPES[options.dtype])
    done = {kept.at for kept in kept_by(store)}
    todo = [found for found in prompts(model, tokenizer, options.count, longest) if found[0] not in done]
    with torch.no_grad():
        for at, tokens in progress(todo, lambda prompt: f"{len(prompt[1]):,} tokens"):
            store.add(compared(model, at, torch.tensor([tokens], device=options.device), options))
    found = kept_by(store)
    told: dict[str, Any] = {
        "shortest": min(kept.tokens for kept in found),
        "longest": max(kept.tokens for kept in found),
    }
    told["tasks"] = ", ".join(OF_SHIPPED if demo.is_shipped(model) else OF_REAL)
    notes = NOTES.format(**{**vars(options), **told, "draft": options.tokens}, queries=options.tokens + 1)
    save(options, name, f"Texts of drafts, {options.dtype}", list(rows_of(found)), notes)
    store.path.unlink()


def prompts(model: Any, tokenizer: Any, count: int, longest: int) -> list[tuple[int, tuple[int, ...]]]:
    """Make numbered prompts whose lengths are spread evenly, in an order in which any part of them is spread too."""
    material = Material(demo.default_text(model)[0], tokenizer, code=demo.sample_text())
    tasks, shortest = OF_SHIPPED if demo.is_shipped(model) else OF_REAL, min(SHORTEST, longest)
    made = []
    for at in range(count):
        length = shortest + (longest - shortest) * at // max(1, count - 1)
        made.append((at, make_sample(tasks[at % len(tasks)], material, length=length, seed=f"drafts/{at}").prompt))
    random.Random(0).shuffle(made)
    return made


def compared(model: Any, at: int, tokens: Tensor, options: argparse.Namespace) -> Compared:
    """Write after one prompt, densely and with drafts."""
    length = tokens.shape[1]
    asked = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
    asked |= {"max_new_tokens": options.new, "min_new_tokens": options.new, "return_dict_in_generate": True}
    read = DynamicCache(config=model.config)
    model(tokens[:, :-1], **with_cache(model, read), use_cache=True, logits_to_keep=1)
    drafting = twin(model)
    policy = Policy(window_size=fitting_window(length), gate=ClosedGate(), phases=frozenset({"decode"}), min_bulk=0)
    cache = None if at % READS_ITSELF == 0 else copy.deepcopy(read)
    with patchattn.draft(drafting, policy, tokens=options.tokens) as handle:
        drafted = drafting.generate(tokens, **asked, **(with_cache(model, cache) if cache else {}))
    del cache, drafting
    counts = handle.report().drafts
    dense = model.generate(tokens, **asked, **with_cache(model, copy.deepcopy(read)), output_scores=True)
    text, other = (found.sequences[0, length:] for found in (dense, drafted))
    same = int((text == other).long().cumprod(0).sum())
    gaps, moved = gaps_and_moves(model, read, tokens[:, -1:], text, torch.stack(dense.scores, 1)[0], options.tokens + 1)
    most = moved.max().item()
    return Compared(
        command_line(),
        at,
        length,
        options.new,
        same,
        counts.drafted,
        counts.accepted,
        most,
        int((gaps <= most).sum()),
        None if same == options.new else gaps[same].item(),
    )


def rows_of(found: list[Compared]) -> Iterator[Row]:
    """Add up the prompts of similar lengths, and all of them."""
    edges = [(low, high) for low, high in zip((0, *BUCKETS), BUCKETS, strict=False)]
    for low, high in [*edges, (0, BUCKETS[-1])]:
        some = [kept for kept in found if low < kept.tokens <= high]
        if not some:
            continue
        others = [kept for kept in some if kept.gap is not None]
        level = sum(kept.gap <= kept.moves for kept in others if kept.gap is not None)
        yield {
            "prompt tokens": f"{min(kept.tokens for kept in some):,} to {max(kept.tokens for kept in some):,}",
            "prompts": len(some),
            "new tokens": sum(kept.new for kept in some),
            "drafted": sum(kept.drafted for kept in some),
            "kept": sum(kept.kept for kept in some) / max(1, sum(kept.drafted for kept in some)),
            "same": len(some) - len(others),
            "level": level,
            "lost": len(others) - level,
            "level tokens": sum(kept.level for kept in some),
            "gap moves": max(kept.moves for kept in some),
        }


if __name__ == "__main__":
    main()
