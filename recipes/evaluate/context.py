"""What every study is made with: the shipped model, its calibration, documents for it, and rows that were measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from patchattn import OpenGate, Policy, demo, patch
from patchattn.calibration import Calibration
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.evaluation.documents import Document, Kind, make_document, tokenize_text
from patchattn.evaluation.rows import Store
from patchattn.evaluation.statistics import Interval, share
from patchattn.hf.observe import observing
from patchattn.measuring.reading import read_document

LENGTHS = (1024, 2048, 4096)
WINDOWS = (64, 128, 256)
LENGTH, WINDOW, SINK = 4096, 256, 16
"""What studies at one length and window only have, tokens."""

POLICY = Policy(sink_size=SINK, window_size=WINDOW, min_bulk=0, gate=OpenGate())
KINDS_PER_1024: dict[str, tuple[Kind, ...]] = {
    "facts": ("fact",) * 9,
    "chains and lists": ("chain", "list") * 3,
    "plain text": (),
}
"""What is planted and asked for, in every 1,024 tokens."""

TASKS = ("plain text", "planted line", "question", "answer")
"""What the token of a query belongs to; a query whose next token is part of an answer counts as `answer`."""

Row = TypeVar("Row")
Job = tuple[Any, ...]


class Context(NamedTuple):
    """What a command was started with.

    Args:
        work: Folder for rows, from which a run goes on.
        options: By name.
        tables: Folders where tables of the page may be, the first one that has a table first.
    """

    work: Path
    options: Mapping[str, Any]
    tables: Sequence[Path] = ()


@dataclass(frozen=True)
class Measurement(Generic[Row]):
    """Something that is measured job by job, in several processes, and kept as one row for each job.

    Args:
        name: Of the file in the folder of rows.
        row: Dataclass of the rows, of what JSON can hold.
        key: Names of the fields that say which job a row is of.
        jobs: From the context to all jobs, the values of those fields; what matters most comes first.
        measure: From the context and the values of one job to its row. Runs in any process.
    """

    name: str
    row: type[Row]
    key: tuple[str, ...]
    jobs: Callable[[Context], Sequence[Job]]
    measure: Callable[..., Row]

    def store(self, context: Context) -> Store:
        """Return the rows on disk."""
        return Store(context.work / f"{self.name}.jsonl", self.row)

    def done(self, context: Context) -> dict[Job, Row]:
        """Read the rows that are there by job, in the order of the jobs; rows of no job are left out."""
        there = {tuple(getattr(row, name) for name in self.key): row for row in self.store(context).rows()}
        return {job: there[job] for job in self.jobs(context) if job in there}

    def rows(self, context: Context) -> list[Row]:
        """Read the rows that are there, in the order of the jobs."""
        return list(self.done(context).values())


class Answered:
    """A row that counts answers: those that are `right`, of those `asked` for."""

    right: int
    asked: int

    @property
    def facts(self) -> Interval:
        """Share of right answers with its Wilson interval."""
        return share(self.right, self.asked)


@cache
def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return the shipped model and its tokenizer.

    On processors without fast bfloat16 products float32 is three times as fast; differences between gates then come
    from the gates and not from rounding.
    """
    model, tokenizer = demo.load()
    # Casting it to the dtype that it has would round the frequencies of the rotary embedding, which are in float32.
    return (model if model.dtype == dtype else model.to(dtype)), tokenizer


@cache
def calibration(dtype: str = "float32") -> Calibration:
    """Return the shipped calibration for the same weights in a dtype; it was measured in bfloat16."""
    shipped = Calibration.from_pretrained(ROOT / "calibrations" / "patchattn-demo")
    fingerprint = shipped.manifest.fingerprint.model_copy(update={"dtype": dtype})
    manifest = shipped.manifest.model_copy(update={"fingerprint": fingerprint})
    return Calibration(manifest, shipped.policy, shipped.tensors)


@cache
def text() -> Any:
    """Return the held-out Python source that documents are cut from, tokenized."""
    return tokenize_text(demo.sample_text(), load()[1])


@cache
def document(kinds: str, length: int, seed: str) -> Document:
    """Make one document of held-out Python source with planted lines, all asked for at the end."""
    planted = KINDS_PER_1024[kinds] * (length // 1024)
    return make_document(text(), load()[1], length=length, kinds=planted, seed=seed)


def documents(seed: str, count: int, *, length: int = LENGTH, kinds: str = "facts") -> list[Document]:
    """Make documents, numbered from 0."""
    return [document(kinds, length, f"{seed}/{at}") for at in range(count)]


def read_densely(listed: Iterable[Document], visit: Callable[[int, AttentionInputs], object]) -> None:
    """Show the layer and the inputs of every attention call while documents are read under `POLICY`."""

    def observer(layer: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        visit(layer, inputs)
        return attend()

    with patch(load()[0], POLICY, record=None) as handle, observing(handle, observer):
        for one in listed:
            read_document(load()[0], torch.tensor(one.token_ids))


def tasks_of(one: Document) -> Tensor:
    """Say for each token of a document which of `TASKS` it belongs to, [tokens] int64."""
    found = torch.zeros(len(one.token_ids), dtype=torch.long)
    for start, end in one.planted:
        found[start:end] = 1
    for question in one.questions:
        found[question.start : question.answer_start - 1] = 2
        found[question.answer_start - 1 : question.answer_end - 1] = 3
    return found
