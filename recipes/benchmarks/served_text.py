"""Texts that the engine of transformers serves with a patched model, compared with those of `generate` one by one.

python recipes/benchmarks/served_text.py --model FOLDER
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import RESULTS, Row, arguments, command_line, kept_by, prepare, progress, save
from model import twin
from problems import DTYPES, prose
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import patchattn
from patchattn import OpenGate, Policy, demo
from patchattn.evaluation.drafted import is_level
from patchattn.evaluation.rows import Store
from patchattn.hf.architecture import with_cache
from patchattn.hf.loading import load_pretrained

OPEN, DEFAULT = "every gate open", "default"
COPIES = (1, 1, 2, 1, 3)
BUCKETS = (256, 1024)
PAGE_SIZE = 64
NOTES = """\
{count} requests of 1 to {half:,} tokens of prose, as many of each order of magnitude, and among them every sixtieth \
of {longest:,}; 1 to {new} new tokens each, greedy, {batch} of them to an engine that reads at most {batch_tokens} \
tokens in a step, in pages of {page}. Of four engines the second is made again with the default gate. Each request \
comes up to a second after the one before. Two thirds begin with what others begin with, up to all but their last \
token, and share its pages where these are there by then: `shared` is the part of the prompts that was not read \
again, as far as the number of asked pairs tells. One in ten is cancelled up to three requests later, wherever it is \
by then, and not compared. Of five engines the third writes two texts for each request and the fifth three. `same` \
are texts equal in every token to what `generate` writes for the prompt alone: of the stock model where every gate is \
open, and of the patched one where gates decide, with a window of {window}. Of the others, `level` are those where \
`generate` itself is not stable: at the first token that differs the gap between its two best logits is no larger \
than the most by which such a gap moves in this text when the same tokens are read 5 at a time in place of one by \
one. `lost` are all others. `pairs` are those of head and query that were asked, for the first text of each request; \
those of a shared beginning are left out on both sides. `equal gates` are requests with as many open ones as with \
`generate`, and `other opens` is by how many the others differ, in all.\
"""


@dataclass(frozen=True)
class Request:
    """One request.

    Args:
        tokens: Its prompt.
        new: Number of new tokens.
        ends_before: The request before which it is cancelled, by number in its batch; None if it is not.
        pause: Seconds from it to the next one.
    """

    tokens: list[int]
    new: int
    ends_before: int | None
    pause: float


@dataclass
class Compared:
    """One request, as it is kept until all are there.

    Args:
        command: The command line without folders.
        gates: What the gates are.
        batch: Number of the engine that served it.
        tokens: Its prompt tokens.
        shared: Those that were not read again.
        copies: Texts; 0 if it was cancelled.
        new: New tokens of each.
        same: Texts equal in every token.
        level: Texts that differ first where `generate` is not stable.
        asked: Pairs asked, in the first text.
        open: Open pairs among them.
        alone: Open pairs with `generate`.
    """

    command: str
    gates: str
    batch: int
    tokens: int
    shared: int = 0
    copies: int = 0
    new: int = 0
    same: int = 0
    level: int = 0
    asked: int = 0
    open: int = 0
    alone: int = 0


def main() -> None:
    """Compare what a run that was broken off has not, and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="shipped", help="shipped, or a folder of a model of English")
    parser.add_argument("--count", type=int, default=200, help="requests")
    parser.add_argument("--batch", type=int, default=20, help="requests of one engine")
    parser.add_argument("--longest", type=int, default=6000, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=32, help="most new tokens of a request")
    parser.add_argument("--window", type=int, default=256, help="window of the gates")
    parser.add_argument("--batch-tokens", type=int, default=512, help="most tokens of a step")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    options = prepare(parser.parse_args())
    name = "served_text" if options.dtype == "fp32" else f"served_text_{options.dtype}"
    store = Store((options.out or RESULTS) / f"{options.name or name}.jsonl", Compared)
    model, tokenizer = demo.load() if options.model == "shipped" else load_pretrained(options.model)
    model = model.to(options.device, DTYPES[options.dtype])
    # Texts go on whatever the model says, of an end too.
    model.generation_config.eos_token_id = None
    batches = drawn(tokenizer, options)
    done = {(kept.gates, kept.batch) for kept in kept_by(store)}
    again = range(1, len(batches), 4)
    wanted = [(gates, at) for at in range(len(batches)) for gates in (OPEN, DEFAULT) if gates == OPEN or at in again]
    todo = [one for one in wanted if one not in done]
    with torch.no_grad():
        for gates, at in progress(todo, lambda one: f"{one[0]}, engine {one[1] + 1} of {len(batches)}"):
            store.add(*compared(model, gates, at, batches[at], options))
    rows = list(rows_of(kept_by(store), options.longest))
    notes = NOTES.format(**vars(options), page=PAGE_SIZE, half=options.longest // 2)
    save(options, name, f"Texts that are served, {options.dtype}", rows, notes)
    store.path.unlink()


def drawn(tokenizer: Any, options: argparse.Namespace) -> list[list[Request]]:
    """Draw the requests of each engine, of lengths in any order."""
    draw, count, longest = random.Random(0), options.count, options.longest
    text = prose(tokenizer, 12 * longest)[0].tolist()
    beginnings = [text[at * longest : (at + 1) * longest] for at in range(4)]
    lengths = [longest if at % 60 == 59 else round((longest / 2) ** ((at + 0.5) / count)) for at in range(count)]
    draw.shuffle(lengths)
    requests = []
    for at, length in enumerate(lengths):
        common = draw.choice((0, draw.randrange(length), length - 1))
        begin = draw.randrange(4 * longest, len(text) - longest)
        tokens = draw.choice(beginnings)[:common] + text[begin : begin + length - common]
        ends_before = min(at % options.batch + draw.randint(1, 3), options.batch) if draw.random() < 0.1 else None
        requests.append(Request(tokens, draw.randint(1, options.new), ends_before, draw.random()))
    return [requests[at : at + options.batch] for at in range(0, count, options.batch)]


def compared(stock: Any, gates: str, at: int, requests: list[Request], options: argparse.Namespace) -> list[Compared]:
    """Serve requests with one engine, and write the same texts one by one."""
    given = {"gate": OpenGate()} if gates == OPEN else {}
    model = twin(stock)
    handle = patchattn.patch(model, Policy(window_size=options.window, min_bulk=0, **given), backend="blockwise")
    found = served(model, requests, COPIES[at % len(COPIES)], options)
    rows = []
    for number, one in enumerate(requests):
        row = Compared(command_line(), gates, at, len(one.tokens))
        rows.append(row)
        if one.ends_before is not None:
            continue
        outputs = found[number]
        first = outputs[0].gates
        row.copies, row.new = len(outputs), one.new
        row.asked, row.open = sum(first.asked.values()), sum(first.open.values())
        # All rows behind the local keys are asked, in each head of each layer.
        heads = model.config.num_hidden_layers * model.config.num_attention_heads
        if row.asked:
            local = handle.policy.sink_size + options.window
            behind = len(one.tokens) + one.new - 1 - row.asked // heads
            row.shared = behind if behind > local else 0
        text = alone(stock, one) if gates == OPEN else alone(model, one, row.shared, handle)
        counts = [count for phases in handle.report().layers.values() for count in phases.values()]
        row.alone = row.open if gates == OPEN else sum(int(sum(count.open_pairs)) for count in counts)
        for output in outputs:
            new = output.generated_tokens
            row.same += new == text
            row.level += new != text and is_level(stock if gates == OPEN else model, one.tokens, None, text, new)
    return rows


def served(model: Any, requests: list[Request], copies: int, options: argparse.Namespace) -> dict[int, list[Any]]:
    """Serve requests; returns the outputs of those that are not cancelled, by number."""
    # Copies are drawn, from one token.
    how = {"num_return_sequences": copies, "do_sample": True, "top_k": 1} if copies > 1 else {"do_sample": False}
    room = sum(copies * (-(-(len(one.tokens) + one.new) // PAGE_SIZE) + 1) for one in requests)
    config = ContinuousBatchingConfig(
        num_blocks=room, max_batch_tokens=options.batch_tokens, page_size=PAGE_SIZE, allow_block_sharing=True
    )
    manager = model.init_continuous_batching(GenerationConfig(pad_token_id=0, **how), config)
    stays = {number for number, one in enumerate(requests) if one.ends_before is None}
    found: dict[int, list[Any]] = {number: [] for number in stays}
    manager.start()
    try:
        for number, one in enumerate(requests):
            manager.add_request(one.tokens, request_id=str(number), max_new_tokens=one.new)
            time.sleep(one.pause)
            for earlier, other in enumerate(requests[: number + 1]):
                if other.ends_before == number + 1:
                    manager.cancel_request(str(earlier))
        while any(len(outputs) < copies for outputs in found.values()):
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("The engine stopped.")
                continue
            if output.error:
                raise RuntimeError(f"Request {output.request_id} failed: {output.error}")
            number = int(output.request_id.partition("__")[0])
            if number in stays and output.is_finished():
                found[number].append(output)
    finally:
        manager.stop(block=True, hard_stop=True)
    return {number: sorted(outputs, key=lambda output: output.request_id) for number, outputs in found.items()}


def alone(model: Any, one: Request, shared: int = 0, handle: Any = None) -> list[int]:
    """Write what `generate` does; the report counts all but the tokens that were shared."""
    tokens, given = torch.tensor([one.tokens], device=model.device), {}
    if shared:
        cache = DynamicCache(config=model.config)
        given = with_cache(model, cache)
        model(tokens[:, :shared], **given, use_cache=True, logits_to_keep=1)
    if handle is not None:
        handle.reset_report()
    sizes = {"max_new_tokens": one.new, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **sizes, **given)
    return found[0, tokens.shape[1] :].tolist()


def rows_of(found: list[Compared], longest: int) -> Iterator[Row]:
    """Add up requests of similar lengths, and all of them, for each kind of gates."""
    edges = [*zip((0, *BUCKETS), (*BUCKETS, longest), strict=True), (0, longest)]
    for gates in (OPEN, DEFAULT):
        for low, high in edges:
            some = [kept for kept in found if kept.gates == gates and low < kept.tokens <= high]
            if not some:
                continue
            left = [kept for kept in some if kept.copies]
            same, level, texts = (sum(getattr(kept, what) for kept in left) for what in ("same", "level", "copies"))
            yield {
                "gates": gates,
                "prompt tokens": f"{min(kept.tokens for kept in some):,} to {max(kept.tokens for kept in some):,}",
                "requests": len(some),
                "cancelled": len(some) - len(left),
                "shared": sum(kept.shared for kept in left) / max(1, sum(kept.tokens for kept in left)),
                "texts": texts,
                "new tokens": sum(kept.new * kept.copies for kept in left),
                "same": same,
                "level": level,
                "lost": texts - same - level,
                "pairs": sum(kept.asked for kept in left),
                "open": sum(kept.open for kept in left) / max(1, sum(kept.asked for kept in left)),
                "equal gates": sum(kept.open == kept.alone for kept in left),
                "other opens": sum(abs(kept.open - kept.alone) for kept in left),
            }


if __name__ == "__main__":
    main()
