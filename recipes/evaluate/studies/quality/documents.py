"""What the models read and are asked: contexts of an exact length, questions put one by one, and more text."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from patchattn import demo
from patchattn.evaluation.documents import TokenizedText, draw_task, tokenize_text
from patchattn.evaluation.facts import draw_facts
from patchattn.evaluation.tasks.planted import interleaved
from patchattn.evaluation.units import Units, cut, take, weave
from patchattn.evaluation.words import draw_number
from patchattn.hf.loading import beginning

QUESTIONS, TURNS, SOLVED = 40, 20, 2
"""Questions of a document and of a chat, and how many more are solved at the end of the context."""

_CHAINS = 12

FOLLOWING, APPENDED = 256, 320
"""Tokens of text that are predicted after a context, and the most tokens that are ever appended to it."""

_DEEPEST = 0.9
_PASSAGE = 512
_THINGS = (
    "river stone cloud maple ember cedar falcon harbor lantern meadow copper willow saddle barrel anchor velvet marble "
    "thunder pepper candle"
).split()
_KINDS = "index table offset budget weight margin counter limit radius score width depth level price ratio".split()


class Item(NamedTuple):
    """Something to be asked for: lines that are planted, the question up to its answer, and the answer."""

    planted: tuple[str, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """One document. Questions and text are appended to the context by themselves, and taken away again.

    Args:
        context: Token ids.
        questions: Token ids of each question with its answer, and where in them the answer begins.
        following: Token ids of text that goes on from the context.
        closing: Token ids of what closes an answer, where one question after another is asked.
        unpredicted: The first tokens of `following`, which are not text.
    """

    context: tuple[int, ...]
    questions: tuple[tuple[tuple[int, ...], int], ...]
    following: tuple[int, ...]
    closing: tuple[int, ...]
    unpredicted: int


class Writer:
    """Makes documents of a text with a tokenizer."""

    def __init__(self, text: TokenizedText, tokenizer: Any) -> None:
        self.text, self.tokenizer = text, tokenizer

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question(self, item: Item) -> tuple[tuple[int, ...], int]:
        """Return the tokens of a question with its answer, and where the answer begins."""
        prompt = self.ids(item.prompt)
        return prompt + self.ids(item.answer), len(prompt)

    def planted(self, items: Sequence[Item], length: int, rng: random.Random, *, end: str = "\n") -> Asked:
        """Plant items in text, and solve the first of them at the end of the context."""
        lines = [self.ids(line) for line in interleaved([item.planted for item in items], rng)]
        solved = [self.ids(item.prompt + item.answer + end) for item in items[:SOLVED]]
        fixed = beginning(self.tokenizer), self.ids("\n"), *solved
        size = length - sum(map(len, (*fixed, *lines)))
        units, following = self.stretch(size, rng)
        context = list(fixed[0])
        depths = sorted(rng.uniform(0, _DEEPEST) for _ in lines)
        weave(context, units, zip(depths, lines, strict=True), share=1)
        text = tuple(context[-1:]) + following
        for piece in fixed[1:]:
            context += piece
        questions = tuple(map(self.question, items[SOLVED:]))
        return Asked(tuple(context), questions, self.ids("\n") + text, self.ids(end), 2)

    def stretch(self, size: int, rng: random.Random) -> tuple[Units, tuple[int, ...]]:
        """Cut a stretch of text, and the tokens that follow it."""
        line = rng.randrange(len(self.text.lines))
        units = take(self.text.tokens_from(line), size)
        after = take(self.text.tokens_from((line + len(units)) % len(self.text.lines)), FOLLOWING)
        return cut(units, size), tuple(token for unit in after for token in unit)[:FOLLOWING]


def trained(kind: Any, count: int, writer: Writer, length: int, rng: random.Random) -> Asked:
    """Ask for what the shipped model was trained to look up."""
    items = [draw_task(kind, writer.text, rng, "test") for _ in range(count + SOLVED)]
    return writer.planted([Item(one.planted, one.prompt, one.answer) for one in items], length, rng)


def needles(writer: Writer, length: int, rng: random.Random) -> Asked:
    """Ask for facts about people that stand somewhere in prose."""
    items = [
        Item((f"{fact.statement}\n",), f"Question: {fact.question}\nAnswer: {fact.lead}", f" {fact.answer}")
        for fact in draw_facts(rng, QUESTIONS + SOLVED)
    ]
    return writer.planted(items, length, rng, end=".\n")


def code(writer: Writer, length: int, rng: random.Random) -> Asked:
    """Complete tests of functions that are defined somewhere in a long file."""
    names = rng.sample([f"{thing}_{kind}" for thing in _THINGS for kind in _KINDS], QUESTIONS + SOLVED)
    items = []
    for name in names:
        number = draw_number(rng, digits=4)
        items.append(Item((f"def {name}():\n    return {number}\n",), f"assert {name}() ==", f" {number}"))
    return writer.planted(items, length, rng)


def chat(writer: Writer, length: int, rng: random.Random) -> Asked:
    """Ask in the last turn of a chat for facts of its first ones; in between it was about passages of prose."""
    facts = draw_facts(rng, TURNS + SOLVED)
    user, reply, close = _turns(writer.tokenizer)
    # Said again in the reply, as assistants do: told once, a small model forgets them densely already.
    head = writer.ids("".join(f"{user}{fact.statement}{reply}I see. {fact.statement}{close}" for fact in facts))

    def turn(fact: Any) -> str:
        return f"{user}{fact.question}{reply}{fact.lead}"

    solved = [writer.ids(f"{turn(fact)} {fact.answer}.{close}") for fact in facts[:SOLVED]]
    opening, end = writer.ids(f"{user}Here is a text to read:\n"), writer.ids(f"{reply}Thank you, I read it.{close}")
    size = length - sum(map(len, (head, *solved)))
    count = max(1, size // _PASSAGE)
    context, following = list(head), ()
    for at in range(count):
        part = size * (at + 1) // count - size * at // count - len(opening) - len(end)
        units, following = writer.stretch(part, rng)
        context += opening
        for unit in units:
            context += unit
        context += end
    for piece in solved:
        context += piece
    questions = [writer.question(Item((), turn(fact), f" {fact.answer}")) for fact in facts[SOLVED:]]
    return Asked(tuple(context), tuple(questions), opening + following, writer.ids(f".{close}"), len(opening))


def _turns(tokenizer: Any) -> tuple[str, str, str]:
    """Return what stands before a user's words, between them and the reply, and after the reply."""
    told = [{"role": "user", "content": "<A>"}, {"role": "assistant", "content": "<B>"}]
    told += [{"role": "user", "content": "<C>"}, {"role": "assistant", "content": "<D>"}]
    text = tokenizer.apply_chat_template(told, tokenize=False)
    _, rest = text.split("<A>")
    reply, rest = rest.split("<B>")
    between, _ = rest.split("<C>")
    # What closes a reply is what comes before the next user's words, less what opens those.
    close = next(between[:at] for at in range(len(between), -1, -1) if text.endswith(f"<D>{between[:at]}"))
    return between[len(close) :], reply, close


Make = Callable[[Writer, int, random.Random], Asked]
OF_REAL: dict[str, tuple[str, Make]] = {"needles": ("prose", needles), "code": ("code", code), "chat": ("prose", chat)}
"""What the real model is asked: by task, the text and how a document is made."""

OF_SHIPPED: dict[str, tuple[str, Make]] = {
    "fact": ("code", partial(trained, "fact", QUESTIONS)),
    "chain": ("code", partial(trained, "chain", _CHAINS)),
    "list": ("code", partial(trained, "list", _CHAINS)),
}
"""What the shipped model is asked."""


def writers(tokenizer: Any, tasks: Mapping[str, tuple[str, Make]]) -> dict[str, Writer]:
    """Make the writers that tasks need, by the name of their text."""
    texts = {"prose": demo.prose, "code": demo.sample_text}
    return {text: Writer(tokenize_text(texts[text](), tokenizer), tokenizer) for text, _ in tasks.values()}
