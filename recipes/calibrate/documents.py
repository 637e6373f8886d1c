"""Write documents with questions as text files, to calibrate a model on.

python recipes/calibrate/documents.py --out documents --count 64 --lengths 4096
python recipes/calibrate/documents.py --model FOLDER --out documents --count 54 --lengths 8192 4096
python recipes/calibrate/documents.py --model FOLDER --unlike --out documents --count 12 --lengths 4096
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "evaluate")]

from studies.quality.documents import FOLLOWING, OF_REAL, Asked, Writer, trained, writers

from patchattn import demo
from patchattn.evaluation.documents import TokenizedText, make_document, tokenize_text
from patchattn.hf.loading import beginning, load_pretrained

ASKED = 12
"""Questions at the end of a document for a model of plain English and code."""

PLANTED = {"fact": (30, 26), "note": (16, 40), "list": (16, 40)}
"""How many questions of a kind, and the tokens that are set aside for each with its answer."""

UNLIKE = (
    ("prose", None),
    ("code", None),
    ("prose", "fact"),
    ("prose", "note"),
    ("code", "fact"),
    ("prose", "list"),
)
"""Text, and kind of questions, of one document after another."""


def of_shipped(tokenizer: Any, count: int, lengths: list[int], *, seed: str = "calibrate") -> Iterator[tuple[int, ...]]:
    """Make held-out Python source in which facts are planted, all asked for at the end.

    Args:
        tokenizer: That of the shipped model.
        count: Number of documents; one of them depends on its own number only.
        lengths: Tokens in each, in turn.
        seed: Documents of different seeds have nothing to do with each other but the text they are cut from.
    """
    text = tokenize_text(demo.sample_text(), tokenizer)
    for at, length in zip(range(count), itertools.cycle(lengths), strict=False):
        kinds = ("fact",) * max(length * 9 // 1024, 1)
        yield make_document(text, tokenizer, length=length, kinds=kinds, seed=f"{seed}/{at}").token_ids


def of_real(tokenizer: Any, count: int, lengths: list[int], *, seed: str = "calibrate") -> Iterator[tuple[int, ...]]:
    """Make English prose, a long file of Python and a chat in turn, with facts that are asked for at the end."""
    for one in made_of_real(tokenizer, count, lengths, seed):
        yield one.context + tuple(token for ids, _ in one.questions for token in (*ids, *one.closing))


def made_of_real(tokenizer: Any, count: int, lengths: list[int], seed: str) -> Iterator[Asked]:
    """Make what `of_real` puts together: `ASKED` questions each."""
    by_text = writers(tokenizer, OF_REAL)
    order = itertools.product(OF_REAL.values(), lengths)
    for at, ((text, make), length) in zip(range(count), itertools.cycle(order), strict=False):
        size = length
        for _ in range(2):  # The first time to see how long the questions are.
            one = make(by_text[text], size, random.Random(f"{seed}/{at}"))
            questions = one.questions[:ASKED]
            size = length - sum(len(ids) + len(one.closing) for ids, _ in questions)
        yield replace(one, questions=questions)


def unlike(tokenizer: Any, count: int, lengths: list[int]) -> Iterator[tuple[int, ...]]:
    """Make text of the first halves of prose and Python, plain or with questions of kinds that no study judges by.

    Facts, notes and lists are planted and asked for at the end, as the shipped model was trained to look them up.
    """
    by_text = {name: _first_half(writer) for name, writer in writers(tokenizer, OF_REAL).items()}
    for at, length in zip(range(count), itertools.cycle(lengths), strict=False):
        text, kind = UNLIKE[at % len(UNLIKE)]
        rng, writer = random.Random(f"train0{at}"), by_text[text]
        if kind is None:
            units, following = writer.stretch(length - FOLLOWING, rng)
            yield (*itertools.chain(*units), *following)[:length]
            continue
        questions, tokens = PLANTED[kind]
        one = trained(kind, questions, writer, length - FOLLOWING - questions * tokens, rng)
        yield one.context + one.following + tuple(token for ids, _ in one.questions for token in (*ids, *one.closing))


def _first_half(writer: Writer) -> Writer:
    text = writer.text
    half = len(text.lines) // 2
    return Writer(TokenizedText(text.lines[:half], text.tokens[:half]), writer.tokenizer)


def main() -> None:
    """Write one file for each document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a model of English; default: the shipped model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens, in turn")
    parser.add_argument(
        "--unlike", action="store_true", help="other questions than the quality study judges by, text of first halves"
    )
    arguments = parser.parse_args()
    _, tokenizer = load_pretrained(arguments.model) if arguments.model else demo.load()
    make = unlike if arguments.unlike else of_real if arguments.model else of_shipped
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = len(beginning(tokenizer))
    for at, ids in enumerate(make(tokenizer, arguments.count, arguments.lengths)):
        # Without what the tokenizer puts there again.
        text = tokenizer.decode(ids[begin:])
        (arguments.out / f"{at:04}.txt").write_text(text, encoding="utf-8")
    lengths = " and ".join(f"{length:,}" for length in arguments.lengths)
    print(f"{arguments.count} documents of {lengths} tokens in {arguments.out}")


if __name__ == "__main__":
    main()
