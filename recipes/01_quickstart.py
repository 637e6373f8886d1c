"""Patch a model, ask it for facts told far back, look at which heads read far keys, and undo the patch.

python recipes/01_quickstart.py
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import patchattn
from patchattn import demo
from patchattn.evaluation.documents import Document, check_longest, make_document, tokenize_text


def main() -> None:
    """Answer with and without the patch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens in the document")
    parser.add_argument("--questions", type=int, default=3)
    options = parser.parse_args()

    # Any causal language model that goes through transformers' attention interface works in its place.
    model, tokenizer = demo.load()
    check_longest(model, options.length)
    text = tokenize_text(demo.sample_text(), tokenizer)
    document = make_document(
        text, tokenizer, length=options.length, kinds=["fact"] * options.questions, depth=(0.0, 0.8)
    )
    dense = answers(model, tokenizer, document)

    # min_bulk=0: the gates decide at any length, also where plain attention would be faster.
    policy = patchattn.Policy(window_size=256, min_bulk=0)
    with patchattn.patch(model, policy) as handle:
        patched = answers(model, tokenizer, document)
    report = handle.report()

    wanted = [question.answer.strip() for question in document.questions]
    table = Table("question", "answer", "dense", "patched")
    for question, *row in zip(document.questions, wanted, dense, patched, strict=True):
        table.add_row(question.prompt.strip(), *row)
    Console().print(table)
    print(f"dense {right(dense, wanted)}, patched {right(patched, wanted)} of {len(wanted)} right")
    print(f"{report.open_fraction():.1%} of (head, query) pairs read keys beyond sink and window")
    print(f"the model is {'still patched' if patchattn.is_patched(model) else 'as it was'}")
    report.plot("heads.png")
    print("which heads those are: heads.png")


def answers(model, tokenizer, document: Document) -> list[str]:
    """Write the answer of each question, greedily."""
    written = []
    for index, question in enumerate(document.questions):
        prompt = torch.tensor([document.prompt(index)])
        new_tokens = question.answer_end - question.answer_start
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
        )
        written.append(tokenizer.decode(tokens[0, prompt.shape[1] :]).strip())
    return written


def right(written: list[str], wanted: list[str]) -> int:
    """Count the answers that are right."""
    return sum(one == other for one, other in zip(written, wanted, strict=True))


if __name__ == "__main__":
    main()
