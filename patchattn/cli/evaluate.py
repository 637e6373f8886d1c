"""`patchattn evaluate`: one table of long-range tasks and policies for any model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patchattn import demo, evaluation
from patchattn.calibration import Calibration
from patchattn.cli.models import load
from patchattn.cli.options import Backend, Device, Json
from patchattn.cli.problems import check_out, read_text, stop
from patchattn.cli.progress import progress
from patchattn.evaluation import Drafts, Evaluation, Material, make_sample, named_policy
from patchattn.evaluation.documents import DocumentError, check_longest
from patchattn.evaluation.policies import NAMES, fitting_window, heads_by_oracle, transfer_task
from patchattn.evaluation.results import about
from patchattn.evaluation.tasks import TEXT_LOSS, chosen_tasks
from patchattn.hf.weights import input_device, input_dtype
from patchattn.policy import DEFAULT_WINDOW, Policy

SHIPPED = "demo"
"""What the shipped model is called on the command line."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RESULTS = "cells.jsonl"
_RANKING_PROMPTS = 4


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a causal language model, or demo for the shipped model.")
    ],
    *,
    lengths: Annotated[str, typer.Option(help="Tokens in prompt and answer, with commas between several.")],
    policies: Annotated[
        str,
        typer.Option(
            help="Short names and policy files (.json), with commas between them: default, an estimate such as "
            "lognormal, oracle, static, open, closed, calibrated; a number as in default:0.8 sets threshold or share. "
            "static-transfer:TASK ranks its heads on a task that is not measured. With --calibration: budget:0.3 opens "
            "so many pairs; if it has prices, kl:0.01 keeps so close to dense, in nats per token, and static-price:0.3 "
            "ranks its heads by price. drafts: closed heads draft what dense attention verifies, with drafts:0.6 those "
            "that open at this threshold. Dense is always measured."
        ),
    ] = "default,closed",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks and groups (ruler, plain, shipped, all), with commas between them. Default: all; for demo, "
            "shipped."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task at each length, for each seed.")] = 20,
    seed: Annotated[
        str, typer.Option(help="Everything random follows from it; several, with commas between, add up.")
    ] = "0",
    text: Annotated[
        Path | None,
        typer.Option(
            help="Real text for haystacks and text loss, UTF-8. Default: the prose that comes with Python; for demo, "
            "Python source that ships along."
        ),
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(help="Source code for the task code, UTF-8. Default: Python source that ships along."),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Folder or Hub id of a calibration of the model.")] = None,
    sink: Annotated[int | None, typer.Option(help="First tokens always attended, under short names.")] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Last tokens always attended, under short names. Default: a quarter of the shortest length, "
            f"at least 64 and at most {DEFAULT_WINDOW:,}."
        ),
    ] = None,
    min_bulk: Annotated[
        int, typer.Option(min=0, help="Queries with fewer far keys attend densely, under short names.")
    ] = 0,
    backend: Backend = "auto",
    device: Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the model was saved.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for table, numbers and picture; a broken-off run goes on from it.")
    ] = None,
    json: Json = False,
) -> None:
    """Ask a model long-range questions, as it came and under policies, and print one table.

    Needles in a haystack, variable tracking and word counts after RULER, key-value pairs, long copy, few-shot examples
    far away, facts in plain English, a chat, code, and the loss of a text by position; and how closely each policy
    predicts what dense attention predicts. All of it is made from a seed, for any tokenizer and any length;
    docs/reference/tasks.md describes each. Tasks that do not fit a length are left out, and a note says so.

    **Examples**

    - `patchattn evaluate demo --lengths 1024 --samples 5`: the shipped model, two minutes on two cores
    - `patchattn evaluate Qwen/Qwen3-0.6B --lengths 4096,32768 --policies default,static --device cuda --out found`
    - `patchattn evaluate org/model --lengths 8192 --tasks ruler,text --policies mine.json,default:0.9 --text notes.txt`
    """
    at, seeds = _numbers(lengths, "lengths", "1024,4096", least=1), _numbers(seed, "seed", "0,1,2", least=0)
    chosen = chosen_tasks(_split(tasks or ("shipped" if model == SHIPPED else "all")))
    given = None if text is None else read_text(text)
    source = demo.sample_text() if code is None else read_text(code)
    base = _base(min(at), sink=sink, window=window, min_bulk=min_bulk)
    files = _policy_files(policies, chosen)
    if dtype is not None and dtype not in _DTYPES:
        raise stop(f"Unknown dtype {dtype!r}.", fix=f"Use {', '.join(_DTYPES)}.")
    if out is not None:
        check_out(out)
        import matplotlib  # noqa: F401
    measured = None if calibration is None else Calibration.from_pretrained(calibration)
    loaded, tokenizer = load(None if model == SHIPPED else model, device)
    check_longest(loaded, *at)
    if dtype is not None:
        loaded = loaded.to(_DTYPES[dtype])
    haystack = demo.default_text(loaded)[0] if given is None else given
    material = Material(haystack, tokenizer, code=source)

    def ranked_heads(task: str | None) -> list[tuple[int, int]]:
        tasks = chosen if task is None else (task,)
        return heads_by_oracle(loaded, _ranking_prompts(material, tasks, min(at), seeds[0]), base)

    named = {
        name: policy or named_policy(name, base, calibration=measured, ranked_heads=ranked_heads)
        for name, policy in files.items()
    }
    with progress() as tell:
        found = evaluation.evaluate(
            loaded,
            tokenizer,
            {name: policy for name, policy in named.items() if policy is not None},
            text=haystack,
            lengths=at,
            tasks=chosen,
            samples=samples,
            seed=seeds,
            code=source,
            calibration=measured,
            backend=backend,
            name="the shipped model" if model == SHIPPED else model,
            checkpoint=None if out is None else out / _RESULTS,
            progress=tell,
        )
    saved = [] if out is None else found.save(out)
    if json:
        Console().print_json(dumps({**found.to_dict(), "saved": [str(path) for path in saved]}))
    else:
        _show(found, loaded, saved)


def _show(found: Evaluation, model: Any, saved: list[Path]) -> None:
    console = Console()
    kind = f"{input_device(model).type}, {str(input_dtype(model)).removeprefix('torch.')}"
    console.print(f"[bold]{escape(found.model)}[/], {kind}, {found.samples} samples of each task", highlight=False)
    for length in found.lengths:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(f"{length:,} tokens", no_wrap=True)
        for name in found.policies:
            table.add_column(escape(name), justify="right", overflow="fold")
        for name, texts in found.rows(length):
            table.add_row(escape(name), *map(escape, texts))
        console.print(table)
    for line in (*about(found)[1:], *found.notes):
        console.print(line, style="dim", highlight=False, markup=False)
    if saved:
        console.print("\nSaved: " + escape(", ".join(map(str, saved))), soft_wrap=True, highlight=False)


def _ranking_prompts(material: Material, tasks: tuple[str, ...], length: int, seed: int) -> list[tuple[int, ...]]:
    """Make prompts with their answers to rank heads on; none of them is asked in the evaluation.

    One of each task, and at least four in all.
    """
    prompts = []
    asked = [task for task in tasks if task != TEXT_LOSS]
    for at, task in itertools.product(range(-(-_RANKING_PROMPTS // max(1, len(asked)))), asked):
        try:
            sample = make_sample(task, material, length=length, seed=f"{seed}/rank{at or ''}")
        except DocumentError:  # The evaluation leaves this task out, and says so.
            continue
        prompts.append(sample.prompt + sample.target)
    return prompts or material.stretches(length, _RANKING_PROMPTS)


def _base(shortest: int, *, sink: int | None, window: int | None, min_bulk: int) -> Policy:
    """Return what short names start from."""
    given: dict[str, Any] = {} if sink is None else {"sink_size": sink}
    return Policy(**given, window_size=fitting_window(shortest) if window is None else window, min_bulk=min_bulk)


def _policy_files(names: str, tasks: Sequence[str]) -> dict[str, Policy | Drafts | None]:
    """Read the policies that are files; the others are None by their short names, which fit the tasks measured."""
    found: dict[str, Policy | Drafts | None] = {}
    for name in _split(names):
        path = Path(name)
        if (task := transfer_task(name)) in tasks:
            raise stop(
                f"The policy {name} ranks its heads on {task}, which it would be judged on too.",
                fix=f"Leave {task} out of --tasks, or rank on another task.",
            )
        if name.split(":")[0] in NAMES:
            found[name] = None
        elif path.suffix == ".json":
            title = name if path.stem in {*found, *NAMES} else path.stem
            found[title] = Policy.model_validate_json(read_text(path))
        else:
            named_policy(name, Policy())  # Says which names there are.
    return found


def _numbers(given: str, what: str, example: str, *, least: int) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in _split(given)))
    except ValueError:
        found = ()
    if not found or min(found) < least:
        raise stop(
            f"Expected --{what} as whole numbers from {least} on, with commas between them; got {given!r}.",
            fix=f"For instance --{what} {example}.",
        )
    return found


def _split(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]
