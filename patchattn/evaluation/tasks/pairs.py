"""Key-value retrieval: find the value of one key among many.

Source: "Lost in the Middle", arXiv 2307.03172, section 3. Instructions are worded anew.
"""

from __future__ import annotations

import random

from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft, Task
from patchattn.evaluation.words import draw_uuid


def key_value(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw a task that asks for the value of one key in a JSON object of UUIDs."""
    del length
    taken: set[str] = set()
    key, value = (material.draw_new(lambda: draw_uuid(rng), taken) for _ in range(2))
    return Draft(
        before="The JSON object below maps keys to values. Find the value of one key.\n{\n",
        after=f'}}\nKey: "{key}"\nThe value of this key is: "',
        continuation=value,
        answers=(value,),
        haystack=material.stream(lambda: f'"{draw_uuid(rng)}": "{draw_uuid(rng)}",\n'),
        planted=(f'"{key}": "{value}",\n',),
    )


TASKS = (
    Task(
        "kv",
        "other",
        "a JSON object of UUIDs",
        'the value of one key ("Lost in the Middle", [arXiv 2307.03172](https://arxiv.org/abs/2307.03172))',
        key_value,
    ),
)
