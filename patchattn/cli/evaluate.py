"""`patchattn evaluate`: one table of long-range tasks and policies for any model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from patchattn import demo
from patchattn.calibration import Calibration
from patchattn.cli.models import load
from patchattn.cli.problems import check_out, read_text, stop
from patchattn.evaluation import Evaluation, Material, evaluate, make_sample, named_policy
from patchattn.evaluation.documents import DocumentError, check_longest
from patchattn.evaluation.policies import NAMES, heads_by_oracle
from patchattn.evaluation.results import about, rows
from patchattn.evaluation.tasks import TEXT_LOSS, chosen_tasks
from patchattn.hf.weights import input_device, input_dtype
from patchattn.policy import Policy

SHIPPED = "demo"
"""What the shipped model is called on the command line."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RESULTS = "cells.jsonl"
_WINDOW_SHARE = 16
_WINDOWS = (64, 1024)


@dataclass(frozen=True)
class Choice:
    """What the user asked for; the fields are the options of `patchattn evaluate`."""

    model: str
    lengths: str
    policies: str
    tasks: str | None
    samples: int
    seed: int
    text: Path | None
    calibration: str | None
    sink: int | None
    window: int | None
    min_bulk: int
    backend: str
    device: str
    dtype: str | None
    out: Path | None
    json: bool


def run(choice: Choice) -> None:
    """Measure and print; with a folder, save everything there and go on where an earlier run was broken off."""
    lengths = _lengths(choice.lengths)
    tasks = chosen_tasks(_split(choice.tasks or ("shipped" if choice.model == SHIPPED else "all")))
    text = demo.sample_text() if choice.text is None else read_text(choice.text)
    base = _base(choice, lengths)
    files = _policy_files(choice.policies)
    if choice.dtype is not None and choice.dtype not in _DTYPES:
        raise stop(f"Unknown dtype {choice.dtype!r}.", fix=f"Use {', '.join(_DTYPES)}.")
    if choice.out is not None:
        check_out(choice.out)
        import matplotlib  # noqa: F401
    calibration = None if choice.calibration is None else Calibration.from_pretrained(choice.calibration)
    model, tokenizer = load(None if choice.model == SHIPPED else choice.model, choice.device)
    check_longest(model, max(lengths))
    if choice.dtype is not None:
        model = model.to(_DTYPES[choice.dtype])
    material = Material(text, tokenizer)
    policies = {}
    for name, policy in files.items():
        found = policy or named_policy(
            name,
            base,
            calibration=calibration,
            ranked_heads=lambda: heads_by_oracle(
                model, _ranking_prompts(material, tasks, min(lengths), choice.seed), base
            ),
        )
        if found is not None:
            policies[name] = found
    with _progress(Console(stderr=True)) as tell:
        found = evaluate(
            model,
            tokenizer,
            policies,
            text=text,
            lengths=lengths,
            tasks=tasks,
            samples=choice.samples,
            seed=choice.seed,
            calibration=calibration,
            backend=choice.backend,
            name="the shipped model" if choice.model == SHIPPED else choice.model,
            checkpoint=None if choice.out is None else choice.out / _RESULTS,
            progress=tell,
        )
    saved = [] if choice.out is None else found.save(choice.out)
    if choice.json:
        Console().print_json(json.dumps({**found.to_dict(), "saved": [str(path) for path in saved]}))
    else:
        _show(found, model, saved)


def _show(found: Evaluation, model: Any, saved: list[Path]) -> None:
    console = Console()
    kind = f"{input_device(model).type}, {str(input_dtype(model)).removeprefix('torch.')}"
    console.print(f"[bold]{escape(found.model)}[/], {kind}, {found.samples} samples of each task", highlight=False)
    for length in found.lengths:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(f"{length:,} tokens", no_wrap=True)
        for name in found.policies:
            table.add_column(escape(name), justify="right")
        for name, texts in rows(found, length):
            table.add_row(escape(name), *map(escape, texts))
        console.print(table)
    for line in (*about(found)[1:], *found.notes):
        console.print(line, style="dim", highlight=False, markup=False)
    if saved:
        console.print("\nSaved: " + escape(", ".join(map(str, saved))), soft_wrap=True, highlight=False)


def _ranking_prompts(material: Material, tasks: tuple[str, ...], length: int, seed: int) -> list[tuple[int, ...]]:
    """Make prompts with their answers to rank heads on, one of each task; none of them is asked in the evaluation."""
    prompts = []
    for task in tasks:
        if task == TEXT_LOSS:
            continue
        try:
            sample = make_sample(task, material, length=length, seed=f"{seed}/rank")
        except DocumentError:  # The evaluation leaves this task out, and says so.
            continue
        prompts.append(sample.prompt + sample.target)
    return prompts or material.stretches(length, 1)


def _base(choice: Choice, lengths: tuple[int, ...]) -> Policy:
    """Return what short names start from; the window is a sixteenth of the shortest length unless it is given."""
    window = min(max(min(lengths) // _WINDOW_SHARE, _WINDOWS[0]), _WINDOWS[1])
    fields: dict[str, Any] = {"window_size": window if choice.window is None else choice.window}
    if choice.sink is not None:
        fields["sink_size"] = choice.sink
    return Policy(**fields, min_bulk=choice.min_bulk)


def _policy_files(names: str) -> dict[str, Policy | None]:
    """Read the policies that are files; the others are None by their short names."""
    found: dict[str, Policy | None] = {}
    for name in _split(names):
        path = Path(name)
        if name.split(":")[0] in NAMES:
            found[name] = None
        elif path.suffix == ".json":
            title = name if path.stem in {*found, *NAMES} else path.stem
            found[title] = Policy.model_validate_json(read_text(path))
        else:
            named_policy(name, Policy())  # Says which names there are.
    return found


def _lengths(given: str) -> tuple[int, ...]:
    try:
        lengths = tuple(dict.fromkeys(int(part) for part in _split(given)))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise stop(
            f"Expected lengths in tokens with commas between them, got {given!r}.",
            fix="For instance --lengths 1024,4096.",
        )
    return lengths


def _split(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    bar = Progress(
        TextColumn("{task.description:36}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
