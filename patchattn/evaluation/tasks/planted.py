"""The tasks that the shipped model was trained on, one question for each sample."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from patchattn.evaluation.documents import KINDS, Kind, draw_task
from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft

_FACTS_PER_1024_TOKENS = 6


def draft(kind: Kind, material: Material, length: int, rng: random.Random) -> Draft:
    """Draw as many tasks as the model's card plants at this length, and ask for one of them.

    Facts: six for every 1,024 tokens. Chains, lists and lines to copy: one of each for every 1,024 tokens.
    """
    n = max(1, length // 1024)
    others: list[Kind] = [kind] * (_FACTS_PER_1024_TOKENS * n - 1)
    if kind != "fact":
        others = [other for other in KINDS if other != "fact"] * n
        others.remove(kind)
    asked = draw_task(kind, material.text, rng, "test")
    planted = [asked.planted]
    while len(planted) <= len(others):
        other = draw_task(others[len(planted) - 1], material.text, rng, "test")
        if other.answer not in "".join(asked.planted) and asked.answer not in "".join(other.planted):
            planted.append(other.planted)
    return Draft(
        before="",
        after=asked.prompt,
        continuation=asked.answer,
        answers=(asked.answer.strip(),),
        haystack=material.lines(rng),
        planted=tuple(interleaved(planted, rng)),
        exact=True,
    )


def interleaved(tasks: Sequence[tuple[str, ...]], rng: random.Random) -> list[str]:
    """Put the lines of all tasks in one random order that keeps the order within each."""
    turns = [at for at, lines in enumerate(tasks) for _ in lines]
    rng.shuffle(turns)
    waiting = [iter(lines) for lines in tasks]
    return [next(waiting[at]) for at in turns]


TASKS = {kind: partial(draft, kind) for kind in KINDS}
