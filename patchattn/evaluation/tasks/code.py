"""Code to complete: helpers that are defined early in a long file are used at its end."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import cycle, islice

from patchattn.evaluation.documents import TokenizedText
from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft
from patchattn.evaluation.units import Units, take
from patchattn.evaluation.words import draw_number, draw_word

_HELPERS_PER_1024_TOKENS = 4
_FEWEST_HELPERS = 4
_EARLY = (0.0, 0.5)
_NAMES = ("width", "height", "depth", "colour", "limit", "offset", "scale", "weight", "delay", "retries")

Helper = tuple[str, str, str, tuple[str, ...]]
"""The definition, a use of it up to what has to be completed, how it goes on, and the answers in that."""


def code(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw helpers with made-up names, four for every 1,024 tokens but at least four; one of them is used at the end.

    A function is used by repeating its signature, which small models can do too; a dictionary by one of its entries.
    They stand between the blocks of the code, in its first half.
    """
    taken: set[str] = set()
    count = max(_FEWEST_HELPERS, _HELPERS_PER_1024_TOKENS * length // 1024)
    helpers = [rng.choice(_KINDS)(material, rng, taken) for _ in range(count)]
    _, use, continuation, answers = rng.choice(helpers)
    return Draft(
        before="",
        after=f"\n\n# Stubs and checks of the helpers that are defined above.\n{use}",
        continuation=continuation,
        answers=answers,
        haystack=_blocks(material.code, rng),
        planted=tuple(f"{definition}\n\n" for definition, *_ in helpers),
        exact=True,
        depths=_EARLY,
    )


def _name(material: Material, rng: random.Random, taken: set[str]) -> str:
    return material.draw_new(lambda: f"{draw_word(rng)}_{draw_word(rng)}", taken)


def _default(material: Material, rng: random.Random, taken: set[str]) -> Helper:
    """Draw a function with a default."""
    name, value = _name(material, rng, taken), material.draw_new(lambda: draw_number(rng, digits=4), taken)
    first, second = rng.sample(_NAMES, 2)
    definition = f"def {name}({first}, {second}={value}):\n    return {first} * {second}\n"
    return definition, f"def {name}({first}, {second}=", value, (value,)


def _parameters(material: Material, rng: random.Random, taken: set[str]) -> Helper:
    """Draw a function with made-up parameters."""
    name, *words = _name(material, rng, taken), *(material.draw_new(lambda: draw_word(rng), taken) for _ in range(3))
    definition = f"def {name}({', '.join(words)}):\n    return max({', '.join(words)})\n"
    return definition, f"def {name}(", ", ".join(words), tuple(words)


def _constant(material: Material, rng: random.Random, taken: set[str]) -> Helper:
    """Draw a dictionary."""
    name = _name(material, rng, taken).upper()
    values = {key: material.draw_new(lambda: draw_number(rng, digits=4), taken) for key in rng.sample(_NAMES, 3)}
    asked = rng.choice(list(values))
    entries = ", ".join(f'"{key}": {value}' for key, value in values.items())
    return f"{name} = {{{entries}}}\n", f'assert {name}["{asked}"] ==', f" {values[asked]}", (values[asked],)


_KINDS: tuple[Callable[[Material, random.Random, set[str]], Helper], ...] = (_default, _parameters, _constant)


def _blocks(text: TokenizedText, rng: random.Random) -> Callable[[int], Units]:
    """Return a haystack of the code's blocks: a line that is not indented, and those that belong to it."""
    blocks: Units = []
    for line, tokens in zip(text.lines, text.tokens, strict=True):
        if not blocks or line[0].isalpha() or line[0] in "_@#":
            blocks.append(tokens)
        else:
            blocks[-1] += tokens
    return lambda size: take(islice(cycle(blocks), rng.randrange(len(blocks)), None), size)


TASKS = {"code": code}
