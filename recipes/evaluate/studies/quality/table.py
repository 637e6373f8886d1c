"""The table of the page, one line for each gate at one place: from it the page is made, and a later run goes on."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from context import Context
from studies.quality.places import TASKS, Place

from patchattn.errors import ReportError
from patchattn.evaluation.statistics import Interval

NAME = "quality"
FORMATS = {"number": ".6f"}
"""How numbers are written, see `csv_text`. Lines that are kept stay as they are; some of them have four digits."""

Key = tuple[Place, str, str]
"""What a line is named after: a place, the kind of the gate, and its setting."""

DENSE = ("dense", "")
"""Kind and setting of dense attention, which the others are compared with."""


def ends_of(name: str) -> list[str]:
    """Name the columns of an interval."""
    return [f"{name}_{end}" for end in Interval._fields]


COLUMNS = (
    *Place._fields,
    "gate",
    "setting",
    *(f"{name}_{part}" for part in ("context", "appended") for name in ("open", "density")),
    *(f"task_{at}" for at in range(max(map(len, TASKS.values())))),
    "text_loss",
    *ends_of("points"),
    "worst_task",
    *ends_of("worst"),
    *ends_of("loss"),
    "agreement",
    *ends_of("kl"),
    "answers_kl",
)
"""The columns. Tasks are in the order of `TASKS`. Dense attention has a `text_loss`, nats per token; the others have
its relative change, `loss`. What compares with dense attention is empty in its own line."""


class Read(NamedTuple):
    """What was opened and read, of pairs asked and of keys that dense attention scores; NaN where nothing can open."""

    open_fraction: float
    realised_density: float


@dataclass(frozen=True)
class Line:
    """One line of the table, in numbers, as precise as the table is; NaN where it says nothing.

    Args:
        place: Where.
        family: Kind of the gate; `dense` for dense attention.
        setting: What tells gates of one kind apart.
        right: Share of right answers by task.
        text_loss: Mean loss of the text, nats per token, of dense attention.
        context: What was read of the keys while the contexts were read.
        appended: The same of questions and text.
        points: Points that the answers lie above dense attention.
        worst: The task that loses most, and its points.
        rise: Relative change of the text loss.
        agreement: Share of the text's tokens where dense attention holds the same one the most likely.
        kl: Mean KL of the text to dense, nats per token.
    """

    place: Place
    family: str
    setting: str
    right: dict[str, float]
    text_loss: float
    context: Read
    appended: Read
    points: Interval
    worst: tuple[str, Interval]
    rise: Interval
    agreement: float
    kl: Interval

    @property
    def key(self) -> Key:
        """What the line is named after."""
        return self.place, self.family, self.setting

    @property
    def is_dense(self) -> bool:
        """Whether it is that of dense attention."""
        return (self.family, self.setting) == DENSE

    @classmethod
    def of(cls, columns: Mapping[str, str]) -> Line:
        """Read the columns of a line."""

        def number(name: str) -> float:
            return float(columns[name] or math.nan)

        def interval(name: str) -> Interval:
            return Interval(*map(number, ends_of(name)))

        def read(part: str) -> Read:
            return Read(number(f"open_{part}"), number(f"density_{part}"))

        place, family, setting = key_of(columns)
        return cls(
            *(place, family, setting),
            right={task: number(f"task_{at}") for at, task in enumerate(TASKS[place.model])},
            text_loss=number("text_loss"),
            context=read("context"),
            appended=read("appended"),
            points=interval("points"),
            worst=(columns["worst_task"], interval("worst")),
            rise=interval("loss"),
            agreement=number("agreement"),
            kl=interval("kl"),
        )


def key_of(columns: Mapping[str, str]) -> Key:
    """Return what a line is named after."""
    return Place(columns["model"], int(columns["length"]), int(columns["window"])), columns["gate"], columns["setting"]


def rows_of(lines: Iterable[str]) -> list[dict[str, str]]:
    """Read the lines of a table, by column.

    Raises:
        ReportError: It has other columns.
    """
    found = csv.DictReader(lines)
    if tuple(found.fieldnames or ()) != COLUMNS:
        raise ReportError(
            f"Expected a table with the columns {', '.join(COLUMNS)}; got {found.fieldnames}.",
            fix="Delete the table to measure everything again.",
        )
    return list(found)


def kept(context: Context) -> dict[Key, dict[str, str]]:
    """Read the lines of the table that an earlier run has written, by what they are named after; none without one."""
    for folder in context.tables:
        path = folder / f"{NAME}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                return {key_of(row): row for row in rows_of(file)}
    return {}
