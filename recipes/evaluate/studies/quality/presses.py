"""Presses of kvpress beside the gates: what they keep of a document, chosen once, before the questions are known.

They are measured by `pressing.py` in an environment of their own, for kvpress needs transformers before 5.3.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from context import Context, Job, Measurement
from pydantic import TypeAdapter
from studies.quality.cases import presses
from studies.quality.documents import Asked
from studies.quality.lines import missing
from studies.quality.measuring import Row, dense_predictions, document, read_densely
from studies.quality.places import DOCUMENTS, PLACES, TASKS

from patchattn.evaluation.cells import PhaseCounts

TEXTS, TOKENS = 50, 512
"""What DuoAttention's heads are scored on: as many texts as kvpress takes, and tokens of each."""


@dataclass
class Pressed:
    """Every press on one document.

    They know no window: the rows have that of the place at which they are shown. `digest` says which tokens were read,
    which must be the same in both environments.
    """

    model: str
    length: int
    task: str
    document: int
    digest: str
    rows: list[Row]


def digest(one: Asked) -> str:
    """Say in a few letters which tokens a document has."""
    return hashlib.sha256(repr((one.context, one.questions, one.following)).encode()).hexdigest()[:12]


def counts_of(one: Asked, kept: Sequence[int]) -> dict[str, PhaseCounts]:
    """Count keys: all in the context, and those kept with what was appended before each token itself.

    Args:
        one: The document.
        kept: Keys of the context that each query head of each layer has left.
    """

    def counted(before: Sequence[int], tokens: int) -> int:
        return sum(before) * tokens + len(before) * tokens * (tokens + 1) // 2

    tokens = len(one.context)
    lengths = [*(len(ids) for ids, _ in one.questions), len(one.following)]
    scored, causal = (sum(counted(before, length) for length in lengths) for before in (kept, [tokens] * len(kept)))
    return {
        "context": read_densely(len(kept), tokens),
        "appended": PhaseCounts(scored_keys=scored, causal_keys=causal),
    }


def jobs(context: Context) -> list[Job]:
    """List the documents of the places of which the table has not got every press, with an environment of kvpress."""
    wanted = {place for place, *name in missing(context) if tuple(name) in presses()}
    return [
        (place.model, place.length, task, index)
        for place in PLACES
        if place in wanted
        for index, task in itertools.product(range(DOCUMENTS[place.model]), TASKS[place.model])
    ]


def measure(context: Context, name: str, length: int, task: str, index: int) -> Pressed:
    """Measure every press on one document, in the environment of kvpress.

    Raises:
        ValueError: The environments tokenize the document differently.
    """
    dense_predictions(context, name, length, task, index)  # from here on they are on disk, for both
    script = Path(__file__).with_name("pressing.py")
    command = [context.options["kvpress_python"], script, context.work, context.options["real_model"]]
    command += [name, str(length), task, str(index)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = TypeAdapter(Pressed).validate_json(printed.splitlines()[-1])
    here = digest(document(context, name, length, task, index)[1])
    if found.digest != here:
        raise ValueError(
            f"The environment of kvpress reads other tokens ({found.digest}) than this one ({here}), so its rows can't "
            "be compared. Make it with the same version of Python, and tokenizers that agree."
        )
    return found


PRESSED = Measurement("quality.presses", Pressed, ("model", "length", "task", "document"), jobs, measure)


def rows(context: Context) -> list[Row]:
    """Read the rows of the presses that are there."""
    return [row for pressed in PRESSED.store(context).rows() for row in pressed.rows]
