"""All tasks by name, and the groups they come in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

from patchattn.evaluation.documents import Kind
from patchattn.evaluation.tasks.copying import few_shot, long_copy
from patchattn.evaluation.tasks.frequencies import common_words, frequent_words
from patchattn.evaluation.tasks.material import Material
from patchattn.evaluation.tasks.needles import NEEDLES, key_value
from patchattn.evaluation.tasks.planted import draft
from patchattn.evaluation.tasks.sample import DocumentError, Draft, Sample, finish
from patchattn.evaluation.tasks.tracking import variable_tracking

_RULER: dict[str, Callable[[Material, int, random.Random], Draft]] = {
    **NEEDLES,
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
}
_SHIPPED = {kind: partial(draft, kind) for kind in get_args(Kind)}
_FAMILIES = {**_RULER, "kv": key_value, "copy": long_copy, "few_shot": few_shot, **_SHIPPED}

TEXT_LOSS = "text"
"""Name of the measurement that is no task: loss on the text by position."""

TASKS: tuple[str, ...] = (*_FAMILIES, TEXT_LOSS)
"""Names of all tasks."""

GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(_RULER),
    "shipped": (*_SHIPPED, TEXT_LOSS),
    "all": (*_RULER, "kv", "copy", "few_shot", TEXT_LOSS),
}
"""Names for several tasks. `shipped` is what the shipped model was trained on, `all` what other models are asked."""


def make_sample(task: str, material: Material, *, length: int, seed: int | str = 0) -> Sample:
    """Make one prompt of a task.

    Args:
        task: One of `TASKS`, apart from `"text"`.
        material: The text and the tokenizer.
        length: Tokens in the prompt and the answer's budget together.
        seed: Everything random follows from it.

    Returns:
        The sample. The same arguments give the same sample.

    Raises:
        DocumentError: There is no such task, the length is too small for it, or the tokenizer can't write its answers.

    Example:
        >>> from patchattn import demo
        >>> _, tokenizer = demo.load()
        >>> material = Material(demo.sample_text(), tokenizer)
        >>> sample = make_sample("niah_single_1", material, length=512)
        >>> len(sample.prompt) + sample.budget, len(sample.answers)
        (512, 1)
    """
    if task not in _FAMILIES:
        raise _unknown(task)
    rng = random.Random(f"{seed}/{task}/{length}")
    return finish(task, _FAMILIES[task](material, length, rng), material.encoder, length=length, rng=rng)


def chosen_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Replace groups by their tasks; each task once, in the order of the names.

    Raises:
        DocumentError: There is no such task or group.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise _unknown(name)
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return tuple(found)


def _unknown(name: str) -> DocumentError:
    return DocumentError(
        f"There is no task {name!r}.", fix=f"Choose from {', '.join(TASKS)}, or a group: {', '.join(GROUPS)}."
    )
