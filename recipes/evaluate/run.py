"""Make a page of docs/results: `python recipes/evaluate/run.py NAME`.

NAME is a study, a module of `studies/`. Its docstring's first line is what `--help` says of it. It offers

- `MEASURED`: the `Measurement`s that it is made of, in the order in which they are made. Studies may share one. A
  measurement lists its jobs and measures one at a time; here they are spread over processes, rows are kept as soon as
  they are there, and a command that is started again does what is missing.
- `page(context) -> Page`: Markdown, picture and tables, made of `MEASUREMENT.rows(context)`. It measures nothing.
- `add_options(parser)`, where it takes options; `context.options` has them. One that changes what is measured belongs
  into the jobs.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from context import ROOT, Context, Job, Measurement
from page import Page

from patchattn.evaluation.rows import csv_text

STUDIES = sorted(path.stem for path in (Path(__file__).parent / "studies").iterdir() if path.stem[0] not in "_.")
PAGES, TABLES = ROOT / "docs" / "results", ROOT / "recipes" / "evaluate" / "results"


def measure_missing(measurement: Measurement, context: Context, processes: int) -> None:
    """Measure the jobs that have no row yet."""
    done = measurement.done(context)
    missing = [job for job in measurement.jobs(context) if job not in done]
    if not missing:
        return
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for at, row in enumerate(pool.imap_unordered(partial(_measure, measurement.measure, context), missing)):
            measurement.store(context).add(row)
            print(f"\r{measurement.name}: {at + 1} of {len(missing)} rows", end="", flush=True)
    print()


def _measure(measure: Callable[..., Any], context: Context, job: Job) -> Any:
    return measure(context, *job)


def write(page: Page, name: str, pages: Path, tables: Path) -> None:
    """Write a page and its picture into one folder, its tables into another."""
    for folder in (pages, tables):
        folder.mkdir(parents=True, exist_ok=True)
    (pages / f"{name}.md").write_text(page.markdown, encoding="utf-8")
    if page.picture is not None:
        page.picture.savefig(pages / f"{name}.png")
    for table, rows in page.tables.items():
        (tables / f"{table}.csv").write_text(csv_text(rows, **page.formats), encoding="utf-8")


def main() -> None:
    """Measure what is missing, then write page, picture and tables."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--processes", type=int, default=2, help="of one thread each")
    shared.add_argument("--work", type=Path, default=Path("runs/evaluate"), help="folder of what was measured")
    shared.add_argument("--out", type=Path, help="of all files; default: docs/results, and recipes/evaluate/results")
    parser = argparse.ArgumentParser(description="Make a page of docs/results.")
    named = parser.add_subparsers(dest="study", metavar="NAME", required=True)
    studies = {name: importlib.import_module(f"studies.{name}") for name in STUDIES}
    for name, study in studies.items():
        own = named.add_parser(name, parents=[shared], help=(study.__doc__ or "").splitlines()[0])
        getattr(study, "add_options", lambda _: None)(own)
    arguments = parser.parse_args()
    tables = [arguments.out, TABLES] if arguments.out else [TABLES]
    study, context = studies[arguments.study], Context(arguments.work, vars(arguments), tables)
    for measurement in study.MEASURED:
        measure_missing(measurement, context, arguments.processes)
    page = study.page(context)
    write(page, arguments.study, arguments.out or PAGES, arguments.out or TABLES)
    if page.note:
        print(page.note)


if __name__ == "__main__":
    main()
