"""All tasks by name, and the groups they come in. A file of this folder is a family; its `TASKS` draw one, by name."""

from __future__ import annotations

import random
from collections.abc import Sequence

from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draw, Sample, finish
from patchattn.evaluation.tasks import code, english, frequencies, needles, others, planted, tracking

_RULER: dict[str, Draw] = {**needles.TASKS, **tracking.TASKS, **frequencies.TASKS}

_PLAIN: dict[str, Draw] = {**english.TASKS, **code.TASKS}

DRAWN: dict[str, Draw] = {**_RULER, **others.TASKS, **_PLAIN, **planted.TASKS}
"""The tasks that ask a question, by name."""

TEXT_LOSS = "text"
"""Name of the measurement that is no task: loss on the text by position."""

TASKS: tuple[str, ...] = (*DRAWN, TEXT_LOSS)
"""Names of all tasks."""

GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(_RULER),
    "plain": (*_PLAIN, TEXT_LOSS),
    "shipped": (*planted.TASKS, TEXT_LOSS),
    "all": (*_RULER, *others.TASKS, *_PLAIN, TEXT_LOSS),
}
"""Names for several tasks. `plain` is plain English, chat and code; `shipped` is what the shipped model was trained on,
`all` what other models are asked."""


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
    if task not in DRAWN:
        raise _unknown(task)
    rng = random.Random(f"{seed}/{task}/{length}")
    return finish(task, DRAWN[task](material, length, rng), material, length=length, rng=rng)


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
