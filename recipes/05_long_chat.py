"""Chat over one growing cache: each turn reads only what is new, and the gates go on from where they were.

python recipes/05_long_chat.py
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import patchattn
from patchattn import demo
from patchattn.evaluation.documents import check_longest, make_document, tokenize_text
from patchattn.hf.architecture import with_cache


@torch.no_grad()
def main() -> None:
    """Ask one question a turn, then read the whole conversation at once and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=3072, help="tokens in the conversation")
    parser.add_argument("--turns", type=int, default=6)
    options = parser.parse_args()
    model, tokenizer = demo.load()
    check_longest(model, options.length)
    # In bfloat16, reading in another order rounds a few decisions near the threshold the other way.
    model = model.float()
    text = tokenize_text(demo.sample_text(), tokenizer)
    chat = make_document(text, tokenizer, length=options.length, kinds=["fact"] * options.turns, ask="throughout")

    table = Table("turn", title=f"{options.turns} turns on one cache")
    for name in ("tokens read", "in the cache", "pairs open", "answer", "right"):
        table.add_column(name, justify="right")
    ids, read, right = torch.tensor([chat.token_ids]), 0, 0
    cache = DynamicCache(config=model.config)
    policy = demo.default_policy(model, options.length).model_copy(update={"window_size": 128})
    with patchattn.patch(model, policy) as handle:
        for turn, question in enumerate(chat.questions, start=1):
            handle.reset_report()
            # What the user said since the last turn, then the answer, token by token.
            new = ids[:, read : question.answer_start]
            answer = []
            for _ in range(question.answer_end - question.answer_start):
                logits = model(new, **with_cache(model, cache), logits_to_keep=1).logits
                new = logits[:, -1].argmax(-1, keepdim=True)
                answer.append(int(new))
            # The cache holds what the model wrote, but for the last token, which it has not read yet. Should it have
            # written a wrong answer, the conversation goes on from the right one.
            cache.crop(question.answer_start - cache.get_seq_length())
            told, new_tokens = question.answer_start - read, len(answer) - 1
            read = question.answer_start
            correct = answer == ids[0, read : question.answer_end].tolist()
            right += correct
            fraction = handle.report().open_fraction()
            table.add_row(
                str(turn),
                f"{told} + {new_tokens}",
                f"{cache.get_seq_length():,}",
                "-" if fraction != fraction else f"{fraction:.1%}",
                tokenizer.decode(answer).strip(),
                "yes" if correct else "no",
            )
        rest = model(ids[:, read:], **with_cache(model, cache)).logits
        at_once = model(ids).logits[:, read:]
    Console(width=100).print(table)
    print(f"{right} of {options.turns} answers right")
    print(f"turn by turn and read at once, the last logits differ by {(rest - at_once).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
