"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchattn.cli import demo as demo_command
from patchattn.cli import doctor as doctor_command
from patchattn.cli.problems import explained

app = typer.Typer(
    name="patchattn",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def about() -> None:
    """Selective long-context attention: each head decides for each query whether it reads far keys.

    Start with **patchattn demo**, which compares dense and patched attention on a small model that ships with the
    package. If something looks wrong, **patchattn doctor** says what works on this machine.
    """


@app.command()
def demo(
    *,
    text: Annotated[
        Path | None, typer.Option(help="Text to hide facts in, UTF-8. Default: Python source that ships along.")
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
        int | None, typer.Option(help="Last tokens that are always attended. Default: 256 without a policy.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in the document. Default: the model's context, at most 4,096.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Facts to hide and to ask for.")] = 24,
    backend: Annotated[str, typer.Option(help="auto, blockwise, flex or reference.")] = "auto",
    device: Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where to save the picture of open heads.")] = Path("heads.png"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Ask a model for facts hidden far back in a text: dense, then patched.

    Prints one table (right answers, text loss, open fraction, realised density, prefill seconds, decode tokens per
    second) and saves a picture of the heads that read far keys.

    **Examples**

    - `patchattn demo`: the shipped model at its full context, under a minute on two cores
    - `patchattn demo --text notes.txt --threshold 0.4 --window 512`: your text; more heads closed, a wider window
    - `patchattn demo --model Qwen/Qwen3-0.6B --length 16384 --device cuda`: another model, on a GPU
    """
    with explained():
        demo_command.run(
            demo_command.Choice(
                text=text,
                model=model,
                policy=policy,
                threshold=threshold,
                window=window,
                length=length,
                questions=questions,
                backend=backend,
                device=device,
                out=out,
                json=json,
            )
        )


@app.command()
def doctor(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Say what works on this machine: versions, devices, and every backend checked against the reference.

    The exit code is 0 if the backend that `auto` chooses on every device gives the right numbers, and 1 if not. A
    backend that is not chosen may fail without harm. Compiling `flex` can take a minute.

    **Examples**

    - `patchattn doctor`: tables for reading
    - `patchattn doctor --json`: the same for a bug report
    """
    with explained():
        raise typer.Exit(0 if doctor_command.run(as_json=json) else 1)
