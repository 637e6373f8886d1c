"""What the rows of one gate at one place add up to, against dense attention on the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain
from operator import add
from typing import Any

import numpy as np
from studies.quality.measuring import Row
from studies.quality.places import Place
from studies.quality.table import COLUMNS, DENSE, Key, ends_of

from patchattn.evaluation.cells import PhaseCounts
from patchattn.evaluation.statistics import Interval, bootstrap, ratio_of_sums


@dataclass(frozen=True)
class Summary:
    """One gate at one place.

    Args:
        place: Where.
        rows: Its rows.
        dense: The rows of dense attention on the same documents, in the same order.
    """

    place: Place
    rows: Sequence[Row]
    dense: Sequence[Row]

    @property
    def family(self) -> str:
        """Kind of the gate."""
        return self.rows[0].family

    @property
    def setting(self) -> str:
        """What tells gates of one kind apart."""
        return self.rows[0].setting

    @property
    def tasks(self) -> list[str]:
        """Tasks in order."""
        return list(dict.fromkeys(row.task for row in self.rows))

    @cached_property
    def context(self) -> PhaseCounts:
        """What the gates did in the contexts."""
        return reduce(add, (row.context for row in self.rows))

    @cached_property
    def appended(self) -> PhaseCounts:
        """What the gates did in questions and text."""
        return reduce(add, (row.appended for row in self.rows))

    def right(self, task: str) -> float:
        """Share of right answers of one task."""
        return float(np.mean(list(chain.from_iterable(row.hits for row in self.rows if row.task == task))))

    @cached_property
    def points(self) -> Interval:
        """Points that the answers lie above dense attention, mean over the tasks, bootstrap over questions."""
        return self._points(self.tasks)

    @cached_property
    def worst(self) -> tuple[str, Interval]:
        """The task that loses most, and its points above dense attention."""
        found = {task: self._points([task]) for task in self.tasks}
        task = min(found, key=lambda name: found[name].value)
        return task, found[task]

    def _points(self, tasks: Sequence[str]) -> Interval:
        changes, weights = [], []
        for task in tasks:
            pairs = [(a, b) for a, b in zip(self.rows, self.dense, strict=True) if a.task == task]
            found = [x - y for a, b in pairs for x, y in zip(a.hits, b.hits, strict=True)]
            changes += found
            weights += [1 / len(found)] * len(found)
        scaled = 100 * np.array(changes) * np.array(weights) * len(changes) / len(tasks)
        return bootstrap(scaled, lambda drawn: drawn @ scaled)

    @cached_property
    def rise(self) -> Interval:
        """Relative change of the text loss, bootstrap over documents."""
        found = ratio_of_sums([sum(row.losses) for row in self.rows], [sum(row.losses) for row in self.dense])
        return Interval(*(end - 1 for end in found))

    @cached_property
    def kl(self) -> Interval:
        """Mean KL of the text to dense attention, nats per token, bootstrap over documents."""
        return ratio_of_sums([row.text.kl_sum for row in self.rows], [row.text.tokens for row in self.rows])

    @cached_property
    def top1(self) -> Interval:
        """Agreement with dense attention in the text, bootstrap over documents."""
        return ratio_of_sums([row.text.agreed for row in self.rows], [row.text.tokens for row in self.rows])

    @property
    def answers_kl(self) -> float:
        """Mean KL of the answers' tokens, nats per token."""
        return reduce(add, (row.answers for row in self.rows)).kl

    @property
    def key(self) -> Key:
        """What the line of the table is named after."""
        return self.place, self.family, self.setting

    def columns(self) -> dict[str, Any]:
        """Return the line of the table; see `COLUMNS`. What is not there is empty."""
        found: dict[str, Any] = {
            **self.place._asdict(),
            "gate": self.family,
            "setting": self.setting,
            **{f"task_{at}": self.right(task) for at, task in enumerate(self.tasks)},
        }
        if (self.family, self.setting) == DENSE:
            found["text_loss"] = sum(sum(row.losses) for row in self.rows) / sum(len(row.losses) for row in self.rows)
        else:
            name, worst = self.worst
            found |= {
                "open_context": self.context.open_fraction,
                "density_context": self.context.realised_density,
                "open_appended": self.appended.open_fraction,
                "density_appended": self.appended.realised_density,
                **dict(zip(ends_of("points"), self.points, strict=True)),
                "worst_task": name,
                **dict(zip(ends_of("worst"), worst, strict=True)),
                **dict(zip(ends_of("loss"), self.rise, strict=True)),
                "agreement": self.top1.value,
                **dict(zip(ends_of("kl"), self.kl, strict=True)),
                "answers_kl": self.answers_kl,
            }
        # Where nothing can open the fraction is NaN.
        return {name: "" if (value := found.get(name, "")) != value else value for name in COLUMNS}


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Summarise all gates, place by place, dense attention first; those with a document missing are left out."""
    found: dict[tuple[Place, str, str], dict[tuple[str, int], Row]] = {}
    for row in rows:
        of_gate = found.setdefault((Place(row.model, row.length, row.window), row.family, row.setting), {})
        of_gate[row.task, row.document] = row
    listed = []
    for (place, _, _), of_gate in found.items():
        dense = found.get((place, *DENSE), {})
        if of_gate.keys() == dense.keys():
            listed.append(Summary(place, list(of_gate.values()), [dense[key] for key in of_gate]))
    return listed
