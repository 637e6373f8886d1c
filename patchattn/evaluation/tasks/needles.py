"""Needles in a haystack: find what was said about a key, once, somewhere.

Source: RULER, arXiv 2404.06654, appendix B, for the needle's sentence, the haystacks and the numbers of keys, values
and questions. Instructions are worded anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft
from patchattn.evaluation.words import draw_name, draw_number, draw_uuid

_DRAW: dict[str, Callable[[random.Random], str]] = {
    "word": draw_name,
    "number": lambda rng: draw_number(rng, digits=7),
    "uuid": draw_uuid,
}


@dataclass(frozen=True)
class Needles:
    """A family of needles in a haystack.

    Args:
        haystack: `"noise"`: one line over and over. `"text"`: the user's text. `"needles"`: needles with other keys.
        key: What keys are.
        value: What values are.
        keys: Keys that are planted in the haystack.
        values: Values that each of them has.
        asked: Keys that are asked for.
    """

    haystack: Literal["noise", "text", "needles"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, material: Material, length: int, rng: random.Random) -> Draft:
        """Draw one task."""
        del length
        taken: set[str] = set()
        keys = [material.draw_new(lambda: _DRAW[self.key](rng), taken) for _ in range(self.keys)]
        values = {
            key: [material.draw_new(lambda: _DRAW[self.value](rng), taken) for _ in range(self.values)] for key in keys
        }
        planted = [self._needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(planted)
        asked = rng.sample(keys, self.asked)
        answers = tuple(value for key in asked for value in values[key])
        query = _joined(asked)
        kind = f"magic {self.value}s" if len(answers) > 1 else f"magic {self.value}"
        are = "are" if len(answers) > 1 else "is"
        return Draft(
            before=f"Somewhere in the text below special {kind} {are} given. Remember {kind} and keys: you will be "
            "asked for them at the end.\n",
            after=f"\nThe text is over. Which special {kind} did it give for {query}?\n"
            f"Answer: The special {kind} for {query} {are}:",
            continuation=" " + _joined(answers),
            answers=answers,
            haystack=self._haystack(material, rng, taken),
            planted=tuple(planted),
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value}s for {key} is: {value}.\n"

    def _haystack(self, material: Material, rng: random.Random, taken: set[str]) -> Callable:
        if self.haystack == "noise":
            return material.noise()
        if self.haystack == "text":
            return material.lines(rng)

        def other(kind: str) -> str:
            while True:
                if (found := _DRAW[kind](rng)) not in taken:
                    return found

        return material.stream(lambda: self._needle(other(self.key), other(self.value)))


def _joined(items: list[str] | tuple[str, ...]) -> str:
    """Join as a sentence does."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuid"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, asked=4),
}
"""RULER's eight settings, by its names."""
