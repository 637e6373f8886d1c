"""`patchattn demo`: load model, text and policy, compare dense, patched and drafts, print one table."""

from __future__ import annotations

import math
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patchattn.cli.models import load
from patchattn.cli.options import Backend, Device, Json
from patchattn.cli.policies import in_words
from patchattn.cli.problems import read_text, stop
from patchattn.cli.progress import progress
from patchattn.demo import default_policy, default_text
from patchattn.demo.compare import Comparison, compare
from patchattn.evaluation.drafted import DRAFT
from patchattn.hf.architecture import context_of
from patchattn.hf.weights import input_device, input_dtype
from patchattn.policy import DEFAULT_WINDOW, Policy
from patchattn.writing import check_path

_LONGEST = 4096
_PAGE = "report.html"
_AS_DENSE = "as dense"


def demo(
    *,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to hide facts in, UTF-8. Default: Python's own prose; for the shipped model, Python."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of any causal language model. Default: the shipped model.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy as a JSON file, as Policy.model_dump_json() writes it.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Local share in (0, 1) from which a head closes; lower is cheaper.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help=f"Last tokens that are always attended. Default: a quarter of the length, at most {DEFAULT_WINDOW:,}; "
            "256 for the shipped model."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in the document. Default: the model's context, at most 4,096.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Facts to hide and to ask for.")] = 16,
    backend: Backend = "auto",
    device: Device = "cpu",
    out: Annotated[
        Path, typer.Option(help="Where to save the picture of open heads; report.html goes beside it.")
    ] = Path("heads.png"),
    json: Json = False,
) -> None:
    """Ask a model for facts hidden far back in a text: dense, patched, and with lossless drafts.

    Prints one table (right answers, text loss, agreement with dense, texts equal to dense's, drafted tokens kept, open
    fraction, realised density, time to first token, tokens per second) and saves a picture of the heads that read far
    keys, and a page to look into: which heads opened for which tokens of the text. Instruct models are asked in their
    chat template, base models without one.

    **Examples**

    - `patchattn demo`: the shipped model at its full context, under a minute on two cores
    - `patchattn demo --text notes.txt --threshold 0.4 --window 512`: your text; more heads closed, a wider window
    - `patchattn demo --model Qwen/Qwen3-0.6B --length 16384 --device cuda`: another model, on a GPU
    """
    read = None if policy is None else Policy.model_validate_json(read_text(policy))
    _policy(read or Policy(), threshold=threshold, window=window)  # Refused before the model is loaded.
    given = None if text is None else (read_text(text), str(text))
    _check_out(out)
    with progress() as tell:
        tell("loading the model", 0, 1)
        loaded, tokenizer = load(model, device)
        haystack, source = given or default_text(loaded)
        length = min(context_of(loaded) or _LONGEST, _LONGEST) if length is None else length
        found = compare(
            loaded,
            tokenizer,
            haystack,
            _policy(read or default_policy(loaded, length), threshold=threshold, window=window),
            length=length,
            questions=questions,
            backend=backend,
            progress=lambda what, done: tell(what, done, 1),
        )
    name = model or "the shipped model"
    found.report.plot(out, title=_title(found))
    page = out.with_name(_PAGE)
    has_text = _save_page(found, page, tokenizer, name)
    if json:
        saved = {"picture": str(out), "page": str(page)}
        Console().print_json(dumps({"model": model or "shipped", "text": source, **found.to_dict(), **saved}))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{escape(name)}, {found.length:,} tokens, {questions} questions")
    console.print(_table(found))
    if not found.measures_answers:
        console.print(
            f"Dense attention itself answers only {found.dense.right} of {found.questions}: these questions do not "
            "measure this model. Agreement and KL do.\n",
            style="bold",
        )
    for line in _notes(found, loaded, source):
        console.print(line, style="dim")
    console.print(f"\nPicture of the heads that read far keys: [bold]{escape(str(out))}", soft_wrap=True)
    content = (
        "heads, and decisions over text, questions and right answers"
        if has_text
        else "heads; not the text, as some calls were dense"
    )
    console.print(f"Page to look into ({content}): [bold]{escape(str(page))}", soft_wrap=True)


def _save_page(found: Comparison, path: Path, tokenizer: Any, name: str) -> bool:
    """Save the page of the patched run; says whether the text is in it, for which every token must have been gated."""
    report = found.report
    gated = any(report.timeline.values()) and len(report.timeline_of().phases) == len(found.tokens)
    tokens = found.tokens if gated else None
    report.to_html(path, tokens=tokens, tokenizer=tokenizer, title=f"What the gates of {name} did")
    return gated


def _policy(start: Policy, *, threshold: float | None, window: int | None) -> Policy:
    """Put options on top of a policy."""
    fields: dict[str, Any] = start.model_dump()
    if threshold is not None:
        fields["gate"]["threshold"] = threshold
    if window is not None:
        fields["window_size"] = window
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


def _table(found: Comparison) -> Table:
    dense, patched, drafts = found.dense, found.patched, found.drafts
    phases = tuple(patched.open_fraction)
    both = " / ".join(phases)
    table = Table("measured", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = {"dense": dense, "patched": patched} | ({"drafts": drafts} if drafts else {})
    for name in columns:
        table.add_column(name, justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells[: len(columns)])

    row("answers right", *(f"{one.right}/{found.questions}" for one in columns.values()))
    change = patched.text_loss / dense.text_loss - 1
    row("text loss (nats per token)", f"{dense.text_loss:.3f}", f"{patched.text_loss:.3f} ({change:+.1%})", _AS_DENSE)
    names = " / ".join(found.agreement)
    agreed = {name: agreement.top1 for name, agreement in found.agreement.items()}
    kl = {name: agreement.kl for name, agreement in found.agreement.items()}
    row(f"agreement with dense, {names}", "100%", _joined(agreed, "{:.1%}"), _AS_DENSE)
    row(f"KL to dense (nats), {names}", "0", _joined(kl, "{:.4f}"), _AS_DENSE)
    if drafts:
        level = f" + {drafts.level} level" if drafts.level else ""
        row("texts equal to dense", "", "", f"{drafts.same}/{drafts.texts}{level}")
        kept = f"{drafts.kept / drafts.drafted:.0%} of {drafts.drafted}" if drafts.drafted else "none drafted"
        row("drafted tokens kept", "", "", kept)
    row(f"open fraction, {both}", "100%", _joined(patched.open_fraction, "{:.1%}"))
    row(f"realised density, {both}", "100%", _joined(patched.realised_density, "{:.1%}"))
    limits = {phase: 1 / density for phase, density in patched.realised_density.items()}
    row("limit of the speed-up (1 / density)", "1x", _joined(limits, "{:.1f}x"))
    seconds, *others = (one.first_token_seconds for one in columns.values())
    row("time to first token (seconds)", f"{seconds:.2f}", *(f"{one:.2f} ({seconds / one:.2f}x)" for one in others))
    speed, *others = (one.tokens_per_second for one in columns.values())
    row("tokens per second", f"{speed:.1f}", *(f"{one:.1f} ({one / speed:.2f}x)" for one in others))
    return table


def _joined(parts: dict[str, float], pattern: str) -> str:
    return " / ".join("-" if math.isnan(number) else pattern.format(number) for number in parts.values())


def _title(found: Comparison) -> str:
    fraction = found.report.open_fraction()
    overall = "no query was asked" if math.isnan(fraction) else f"{fraction:.0%} overall"
    return f"Queries that read far keys, percent per head ({overall})"


def _notes(found: Comparison, model: Any, source: str) -> list[str]:
    """Say what the rows of the table mean and how they were measured."""
    compared = found.agreement
    device = input_device(model).type
    threads = torch.get_num_threads()
    hardware = f"{device}, {threads} {'thread' if threads == 1 else 'threads'}" if device == "cpu" else device
    notes = [
        in_words(found.policy),
        f"Run: {hardware}, {str(input_dtype(model)).removeprefix('torch.')}, backend {found.backend}.",
        f"Text: {source}.",
        f"Answers: asked {found.manner}; right means every token, written greedily. "
        f"The facts lie {found.nearest:,} to {found.furthest:,} tokens before the first question.",
        f"Text loss: over the {found.text_tokens:,} tokens of the text between the facts.",
        "Agreement: how often both predict the same token after the same tokens, "
        f"{compared['text'].tokens:,} of the text beyond the first window, {compared['answers'].tokens:,} of answers.",
        "KL: how far the predicted probabilities of these tokens are from dense ones; 0 is equal.",
        "Open fraction: how many pairs (query head, query) read the keys beyond sink and window.",
        "Realised density: keys really scored, of those that dense attention scores.",
        *_notes_of_drafts(found),
        *found.report.notes(),
        f"Time to first token: to read {found.prefill_tokens:,} tokens and write one. Tokens per second: after that, "
        f"with generate and its dynamic cache. Best of {found.rounds} rounds, all columns in turn.",
    ]
    if device == "cpu":
        notes.append("On a CPU a static cache writes faster, dense and patched: docs/how-to/choose-a-cache.md.")
    return notes


def _notes_of_drafts(found: Comparison) -> list[str]:
    """Say how the column of drafts came to be, or why there is none."""
    drafts = found.drafts
    if drafts is None:
        return [f"No lossless drafts: {found.no_drafts}"]
    notes = [
        "Drafts: patchattn.draft, closed heads with the same window; dense attention reads the text and verifies. "
        f"{drafts.texts} texts, an answer and what follows it, with {DRAFT} tokens a draft; for tokens per second the "
        "number adapts, down to none where drafting does not pay."
    ]
    if drafts.same < drafts.texts:
        notes.append(
            f"Texts that are not equal: {drafts.texts - drafts.same}, of which level: {drafts.level}. Level is a text "
            "that parts from dense where its two best tokens lie no further apart than rounding moves them when it "
            "reads several tokens at once."
        )
    return notes
