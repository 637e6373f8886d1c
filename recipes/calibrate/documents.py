"""Write documents with planted facts and questions as text files, to calibrate the shipped model on.

python recipes/calibrate/documents.py --out documents --count 64 --length 4096
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from patchattn import demo
from patchattn.evaluation.documents import Document, make_document, tokenize_text


def documents(count: int, length: int, *, seed: str = "calibrate") -> list[Document]:
    """Make documents of held-out Python source in which facts are planted, all asked for at the end.

    Args:
        count: Number of documents; one of them depends on its own number only.
        length: Tokens in each.
        seed: Documents of different seeds have nothing to do with each other but the text they are cut from.
    """
    _, tokenizer = demo.load()
    text = tokenize_text(demo.sample_text(), tokenizer)
    kinds = ("fact",) * max(length * 9 // 1024, 1)
    return [make_document(text, tokenizer, length=length, kinds=kinds, seed=f"{seed}/{at}") for at in range(count)]


def main() -> None:
    """Write one file for each document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--length", type=int, default=4096)
    arguments = parser.parse_args()
    _, tokenizer = demo.load()
    arguments.out.mkdir(parents=True, exist_ok=True)
    made = documents(arguments.count, arguments.length)
    for at, document in enumerate(made):
        # Without the first token, which the tokenizer puts there again.
        text = tokenizer.decode(document.token_ids[1:])
        (arguments.out / f"{at:04}.txt").write_text(text, encoding="utf-8")
    print(f"{len(made)} documents of {arguments.length} tokens in {arguments.out}")


if __name__ == "__main__":
    main()
