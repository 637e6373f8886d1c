"""Variable tracking: follow a chain of assignments that are far apart.

Source: RULER, arXiv 2404.06654, appendix B: one chain of five variables in noise, after a solved one. Instructions are
worded anew.
"""

from __future__ import annotations

import random
from itertools import pairwise

from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft
from patchattn.evaluation.words import draw_letters, draw_number

_HOPS = 4
_BEFORE = "Variables are assigned in the text below. Keep track of what each one stands for.\n"


def variable_tracking(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw one chain; all its variables are asked for."""
    del length
    taken: set[str] = set()
    value, names = _draw_chain(material, rng, taken, letters=5)
    example_value, example_names = _draw_chain(material, rng, taken, letters=3)
    example = _BEFORE + "".join(_lines(example_value, example_names)) + _after(example_value, example_names)
    return Draft(
        before=f"{example} {' '.join(example_names)}\n\n{_BEFORE}",
        after=_after(value, names),
        continuation=" " + " ".join(names),
        answers=tuple(names),
        haystack=material.noise(),
        planted=tuple(_lines(value, names)),
    )


def _draw_chain(material: Material, rng: random.Random, taken: set[str], *, letters: int) -> tuple[str, list[str]]:
    value = material.draw_new(lambda: draw_number(rng, digits=5), taken)
    names: list[str] = []
    while len(names) <= _HOPS:
        name = draw_letters(rng, letters=letters).upper()
        if not any(name in other or other in name for other in taken):
            names.append(name)
            taken.add(name)
    return value, names


def _lines(value: str, names: list[str]) -> list[str]:
    return [f"VAR {names[0]} = {value}\n"] + [f"VAR {later} = VAR {earlier}\n" for earlier, later in pairwise(names)]


def _after(value: str, names: list[str]) -> str:
    return (
        f"Question: Which variables stand for {value}, directly or through other variables?\n"
        f"Answer: These {len(names)} variables stand for {value}:"
    )


TASKS = {"vt": variable_tracking}
