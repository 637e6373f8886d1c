"""Find the heads that swing between near and far with the text, and see on which words.

python recipes/08_which_heads_swing.py                       # the shipped model
python recipes/08_which_heads_swing.py --model path/or/name
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure

import patchattn
from patchattn import Policy, demo
from patchattn.evaluation.documents import check_longest, make_document, tokenize_text
from patchattn.hf.loading import load_pretrained
from patchattn.report.timeline import texts_of

STRETCH = 32
"""Tokens over which a head's decisions are averaged."""


@torch.no_grad()
def main() -> None:
    """Record every decision over one document, rank heads by how much they change, and draw the first ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(demo.model_folder()), help="folder or name on the Hub")
    parser.add_argument("--length", type=int, default=4096, help="tokens in the document")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--heads", type=int, default=6, help="heads to draw")
    options = parser.parse_args()
    model, tokenizer = load_pretrained(options.model)
    check_longest(model, options.length)
    text = tokenize_text(demo.default_text(model)[0], tokenizer)
    document = make_document(text, tokenizer, length=options.length, kinds=["fact"] * 12, ask="throughout")
    with patchattn.patch(model, Policy(window_size=options.window, min_bulk=0), record="timeline") as handle:
        model(torch.tensor([document.token_ids]))
    timeline = handle.report().timeline_of()

    found = timeline.stretches(STRETCH)
    begin, stretches = found
    opened = timeline.open[:, begin:].float()
    swing, fraction = found.swing, opened.mean(1)
    order = swing.argsort(descending=True)[: options.heads].tolist()

    words = texts_of(tokenizer, list(document.token_ids))[begin:]
    print("head    open   swing  opens most often on")
    for index in order:
        layer, head = timeline.heads[index]
        print(f"{layer}.{head}   {fraction[index]:6.1%} {swing[index]:7.3f}  {favourites(opened[index], words)}")
    steady = int(((fraction < 0.01) | (fraction > 0.99)).sum())
    print(f"{steady} of {len(swing)} heads hardly ever change their mind: a static choice would do for them")
    draw(timeline.heads, order, stretches, fraction, swing, begin)
    print("the picture: swinging_heads.png")


def favourites(opened: torch.Tensor, words: list[str], least: int = 5) -> str:
    """Name the tokens, seen at least so often, for which a head opens most often."""
    seen, read = {}, {}
    for word, one in zip(words, opened.tolist(), strict=True):
        seen[word] = seen.get(word, 0) + 1
        read[word] = read.get(word, 0) + one
    often = sorted((word for word in seen if seen[word] >= least), key=lambda word: -read[word] / seen[word])
    return "  ".join(f"{word!r} {read[word] / seen[word]:.0%}" for word in often[:4])


def draw(heads, order: list[int], stretches, fraction, swing, begin: int) -> None:
    """Draw all heads by open fraction and swing, and the chosen ones over the text."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    left.scatter(100 * fraction, swing, s=28, color="#9a9a96")
    left.scatter(100 * fraction[order], swing[order], s=40, color="#2a78d6")
    for index in order:
        left.annotate(
            "{}.{}".format(*heads[index]),
            (100 * fraction[index], swing[index]),
            fontsize=9,
            xytext=(5, 4),
            textcoords="offset points",
        )
    left.set(
        xlabel="queries that read far keys, percent",
        ylabel="swing: spread over passages of the text",
        title="Every head, as layer.head",
    )
    for row, index in enumerate(order):
        at = begin + STRETCH * (torch.arange(stretches.shape[1]) + 0.5)
        right.fill_between(at, -row, stretches[index] * 0.85 - row, step="mid", color="#2a78d6", linewidth=0)
    right.set_yticks([0.4 - row for row in range(len(order))], ["{}.{}".format(*heads[index]) for index in order])
    right.set(xlabel="token", title=f"The heads that swing most: share of {STRETCH} tokens that open them")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("swinging_heads.png", dpi=130)


if __name__ == "__main__":
    main()
