"""`patchattn demo`: load model, text and policy, compare dense with patched, print one table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from patchattn import demo
from patchattn.cli.models import load
from patchattn.cli.problems import read_text, stop
from patchattn.demo.compare import Comparison, compare
from patchattn.hf.architecture import context_of
from patchattn.hf.weights import input_device, input_dtype
from patchattn.policy import Policy
from patchattn.writing import check_path

_SHIPPED_LENGTH = 4096
_PAGE = "report.html"


@dataclass(frozen=True)
class Choice:
    """What the user asked for; the fields are the options of the command."""

    text: Path | None
    model: str | None
    policy: Path | None
    threshold: float | None
    window: int | None
    length: int | None
    questions: int
    backend: str
    device: str
    out: Path
    json: bool


def run(choice: Choice) -> None:
    """Compare, print, and save the picture and the page."""
    policy = _policy(choice)
    text = demo.sample_text() if choice.text is None else read_text(choice.text)
    _check_out(choice.out)
    errors = Console(stderr=True)
    with _progress(errors) as tell:
        tell("loading the model", 0.0)
        model, tokenizer = load(choice.model, choice.device)
        comparison = compare(
            model,
            tokenizer,
            text,
            policy,
            length=_default_length(model) if choice.length is None else choice.length,
            questions=choice.questions,
            backend=choice.backend,
            progress=tell,
        )
    name = choice.model or "the shipped model"
    comparison.report.plot(choice.out, title=_title(comparison))
    page = choice.out.with_name(_PAGE)
    has_text = _save_page(comparison, page, tokenizer, name)
    if choice.json:
        saved = {"picture": str(choice.out), "page": str(page)}
        found = {"model": choice.model or "shipped", **comparison.to_dict(), **saved}
        Console().print_json(json.dumps(found))
        return
    console = Console()
    console.print(f"[bold]{escape(name)}, {comparison.length:,} tokens, {choice.questions} questions", highlight=False)
    console.print(_table(comparison))
    for line in _notes(comparison, model):
        console.print(line, style="dim", highlight=False)
    console.print(
        f"\nPicture of the heads that read far keys: [bold]{escape(str(choice.out))}", soft_wrap=True, highlight=False
    )
    content = "heads and decisions over the text" if has_text else "heads; not the text, as some calls were dense"
    console.print(f"Page to look into ({content}): [bold]{escape(str(page))}", soft_wrap=True, highlight=False)


def _save_page(found: Comparison, path: Path, tokenizer: Any, name: str) -> bool:
    """Save the page of the patched run; says whether the text is in it, for which every token must have been gated."""
    report = found.report
    gated = any(report.timeline.values()) and len(report.timeline_of().phases) == len(found.tokens)
    tokens = found.tokens if gated else None
    report.to_html(path, tokens=tokens, tokenizer=tokenizer, title=f"What the gates of {name} did")
    return gated


def _policy(choice: Choice) -> Policy:
    """Read the policy file, or take the demo's own; options go on top."""
    if choice.policy is None:
        fields: dict[str, Any] = Policy(window_size=256, min_bulk=0).model_dump()
    else:
        fields = Policy.model_validate_json(read_text(choice.policy)).model_dump()
    if choice.threshold is not None:
        fields["gate"]["threshold"] = choice.threshold
    if choice.window is not None:
        fields["window_size"] = choice.window
    return Policy.model_validate(fields)


def _check_out(path: Path) -> None:
    """Refuse before minutes of work what would fail after them."""
    if path.suffix.lower() not in {".png", ".pdf", ".svg"}:
        raise stop(
            f"Can't save a picture as {path.name!r}.", fix="End the name given to --out with .png, .pdf or .svg."
        )
    for each in (path, path.with_name(_PAGE)):
        check_path(each)
    import matplotlib  # noqa: F401


def _default_length(model: Any) -> int:
    return min(context_of(model) or _SHIPPED_LENGTH, _SHIPPED_LENGTH)


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    bar = Progress(
        TextColumn("{task.description:28}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda description, done: bar.update(task, description=description, completed=done)


def _table(found: Comparison) -> Table:
    dense, patched = found.dense, found.patched
    phases = tuple(patched.open_fraction)
    both = " / ".join(phases)
    change = patched.text_loss / dense.text_loss - 1
    table = Table("measured", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("dense", justify="right")
    table.add_column("patched", justify="right")
    table.add_row("answers right", f"{dense.right}/{found.questions}", f"{patched.right}/{found.questions}")
    table.add_row("text loss (nats per token)", f"{dense.text_loss:.3f}", f"{patched.text_loss:.3f} ({change:+.1%})")
    table.add_row(f"open fraction, {both}", "100%", _joined(patched.open_fraction, "{:.1%}"))
    table.add_row(f"realised density, {both}", "100%", _joined(patched.realised_density, "{:.1%}"))
    limits = {phase: 1 / density for phase, density in patched.realised_density.items()}
    table.add_row("limit of the speed-up (1 / density)", "1x", _joined(limits, "{:.1f}x"))
    table.add_row("prefill (seconds)", f"{dense.prefill_seconds:.2f}", f"{patched.prefill_seconds:.2f}")
    table.add_row(
        "decode (tokens per second)", f"{dense.decode_tokens_per_second:.1f}", f"{patched.decode_tokens_per_second:.1f}"
    )
    return table


def _joined(by_phase: dict[str, float], pattern: str) -> str:
    return " / ".join("-" if math.isnan(number) else pattern.format(number) for number in by_phase.values())


def _title(found: Comparison) -> str:
    fraction = found.report.open_fraction()
    overall = "no query was asked" if math.isnan(fraction) else f"{fraction:.0%} overall"
    return f"Queries that read far keys, percent per head ({overall})"


def _notes(found: Comparison, model: Any) -> list[str]:
    """Say what the rows of the table mean and how they were measured."""
    policy = found.policy
    device = input_device(model).type
    threads = torch.get_num_threads()
    hardware = f"{device}, {threads} {'thread' if threads == 1 else 'threads'}" if device == "cpu" else device
    gate = ", ".join(f"{key} {value}" for key, value in policy.gate.model_dump().items() if key != "open_heads")
    return [
        f"Policy: sink {policy.sink_size}, window {policy.window_size}, gate {gate.removeprefix('kind ')}.",
        f"Run: {hardware}, {str(input_dtype(model)).removeprefix('torch.')}, backend {found.backend}.",
        "Answers: written greedily, one question after the other on one cache; right means every token. "
        f"The facts lie {found.nearest:,} to {found.furthest:,} tokens before the first question.",
        f"Text loss: over {found.text_tokens:,} tokens of plain text.",
        "Open fraction: how many pairs (query head, query) read the keys beyond sink and window.",
        "Realised density: keys really scored, of those that dense attention scores.",
        *found.report.notes(),
        f"Prefill: {found.prefill_tokens:,} tokens, median of three. Decode: one token at a time after that.",
    ]
