"""Which lines the table has, and which of them are to be measured: those that it has not got yet."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache

from context import ROOT, Context, Job
from studies.quality.cases import PRESSES, Case, Rankings, cases, presses
from studies.quality.places import AT_DEFAULT, DOCUMENTS, PLACES, SHORT, TASKS, WHOLE, Place
from studies.quality.table import DENSE, Key, kept

from patchattn.calibration import Calibration
from patchattn.policy import DEFAULT_WINDOW


@cache
def calibration(window: int) -> Calibration | None:
    """Return the calibration of the real model for a window, if there is one."""
    for folder in sorted((ROOT / "calibrations").glob("smollm2-135m-instruct*")):
        found = Calibration.from_pretrained(folder)
        if found.manifest.window_size == window:
            return found
    return None


def listed(place: Place, rankings: Rankings | None, task: str) -> list[Case]:
    """List the gates at one place."""
    return list(cases(rankings, task, None if place.model == "shipped" else calibration(place.window)))


def lines(context: Context, *, all_families: bool = False) -> list[Key]:
    """List dense attention, every gate and every press: what matters most first, at all places.

    `all_families` lists those too that were not chosen to be measured.
    """
    chosen = [] if all_families else context.options["families"]
    found: list[tuple[int, Key]] = []
    for place in PLACES:
        found.append((-1, (place, *DENSE)))
        short = (*SHORT, *AT_DEFAULT) if place.window == DEFAULT_WINDOW else SHORT
        for at, case in enumerate(listed(place, None, TASKS[place.model][0])):
            if (place in WHOLE or case[:2] in short) and (not chosen or case.family in chosen):
                found.append((at, (place, case.family, case.setting)))
    # They know no window, and are shown at the places where every gate is.
    pressed = list(itertools.product(WHOLE, presses())) if not chosen or {*chosen} & {*PRESSES} else []
    return [key for _, key in sorted(found, key=lambda one: one[0])] + [(place, *name) for place, name in pressed]


def missing(context: Context) -> list[Key]:
    """List the lines that are to be measured, dense attention first where one of the others is compared with it.

    They are those that the table has not got, and all that were chosen if they are to be measured `again`; presses only
    with an environment of kvpress.
    """
    there, again, pressed = kept(context), context.options["again"], {*presses()}
    wanted = [
        key
        for key in lines(context)
        if (key not in there or (again and key[1:] != DENSE))
        and (key[1:] not in pressed or context.options["kvpress_python"])
    ]
    compared = {place for place, *_ in wanted}
    return [(place, *DENSE) for place in PLACES if place in compared] + [key for key in wanted if key[1:] != DENSE]


def jobs_of(keys: Iterable[Key]) -> list[Job]:
    """List the documents of each line."""
    return [
        (*place, task, index, *name)
        for place, *name in keys
        for index, task in itertools.product(range(DOCUMENTS[place.model]), TASKS[place.model])
    ]


def jobs_of_gates(context: Context) -> list[Job]:
    """List the jobs of the lines of gates that are to be measured, and of dense attention for all of them."""
    pressed = presses()
    return jobs_of(key for key in missing(context) if key[1:] not in pressed)


def places_to_rank(context: Context) -> list[Place]:
    """List the places where heads are to be ranked, for a gate that is to be measured."""
    wanted = {*missing(context)}

    def needed(place: Place) -> bool:
        cases = listed(place, None, TASKS[place.model][0])
        return any(case.gate is None and (place, case.family, case.setting) in wanted for case in cases)

    return list(filter(needed, PLACES))
