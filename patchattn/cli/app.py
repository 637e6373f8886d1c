"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from patchattn.cli import calibrate as calibrate_command
from patchattn.cli import calibrations
from patchattn.cli import demo as demo_command
from patchattn.cli import doctor as doctor_command
from patchattn.cli import evaluate as evaluate_command
from patchattn.cli.calibrations import Json
from patchattn.cli.problems import explained

Backend = Annotated[str, typer.Option(help="auto, blockwise, flex or reference.")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, mps.")]

app = typer.Typer(
    name="patchattn",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# The options of a long command are the fields of its `Choice`, so that they are named once.


@app.callback()
def about() -> None:
    """Selective long-context attention: each head decides for each query whether it reads far keys.

    Start with **patchattn demo**, which compares dense and patched attention on a small model that ships with the
    package. If something looks wrong, **patchattn doctor** says what works on this machine.
    """


@app.command()
@explained()
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
    backend: Backend = "auto",
    device: Device = "cpu",
    out: Annotated[
        Path, typer.Option(help="Where to save the picture of open heads; report.html goes beside it.")
    ] = Path("heads.png"),
    json: Json = False,
) -> None:
    """Ask a model for facts hidden far back in a text: dense, then patched.

    Prints one table (right answers, text loss, open fraction, realised density, prefill seconds, decode tokens per
    second) and saves a picture of the heads that read far keys, and a page to look into: which heads opened for which
    tokens of the text.

    **Examples**

    - `patchattn demo`: the shipped model at its full context, under a minute on two cores
    - `patchattn demo --text notes.txt --threshold 0.4 --window 512`: your text; more heads closed, a wider window
    - `patchattn demo --model Qwen/Qwen3-0.6B --length 16384 --device cuda`: another model, on a GPU
    """
    demo_command.run(demo_command.Choice(**locals()))


@app.command()
@explained()
def doctor(
    *,
    json: Json = False,
) -> None:
    """Say what works on this machine: versions, devices, and every backend checked against the reference.

    The exit code is 0 if the backend that `auto` chooses on every device gives the right numbers, and 1 if not. A
    backend that is not chosen may fail without harm. Compiling `flex` can take a minute.

    **Examples**

    - `patchattn doctor`: tables for reading
    - `patchattn doctor --json`: the same for a bug report
    """
    raise typer.Exit(0 if doctor_command.run(as_json=json) else 1)


@app.command()
@explained()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a causal language model, or demo for the shipped model.")
    ],
    *,
    lengths: Annotated[str, typer.Option(help="Tokens in prompt and answer, with commas between several.")],
    policies: Annotated[
        str,
        typer.Option(
            help="Short names and policy files (.json), with commas between them: default, oracle, static, open, "
            "closed, calibrated; a number as in default:0.8 sets threshold or share. Dense is always measured."
        ),
    ] = "default,closed",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks and groups (ruler, shipped, all), with commas between them. Default: all; for demo, shipped."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task at each length.")] = 20,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option(help="Real text for haystacks and text loss, UTF-8. Default: Python source that ships along."),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Folder or Hub id of a calibration of the model.")] = None,
    sink: Annotated[int | None, typer.Option(help="First tokens always attended, under short names.")] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Last tokens always attended, under short names. Default: a sixteenth of the shortest length, "
            "at least 64 and at most 1,024."
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
    far away, and the loss of a text by position. All of it is made from a seed, for any tokenizer and any length;
    docs/reference/tasks.md describes each. Tasks that do not fit a length are left out, and a note says so.

    **Examples**

    - `patchattn evaluate demo --lengths 1024 --samples 5`: the shipped model, two minutes on two cores
    - `patchattn evaluate Qwen/Qwen3-0.6B --lengths 4096,32768 --policies default,static --device cuda --out found`
    - `patchattn evaluate org/model --lengths 8192 --tasks ruler,text --policies mine.json,default:0.9 --text notes.txt`
    """
    evaluate_command.run(evaluate_command.Choice(**locals()))


@app.command()
@explained()
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of a causal language model. Default: the shipped model.")
    ] = None,
    *,
    texts: Annotated[str, typer.Option(help="A text file, a folder with .txt files, or a quoted pattern of files.")],
    out: Annotated[Path, typer.Option(help="Folder for the calibration, its card and its plots.")],
    lengths: Annotated[
        list[int] | None, typer.Option(help="Tokens in a document; repeat for several lengths, used in turn.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Documents to measure. Default: all the texts give.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy as a JSON file; the calibration brings it along.")] = None,
    sink: Annotated[int | None, typer.Option(help="First tokens that are always attended.")] = None,
    window: Annotated[int | None, typer.Option(help="Last tokens that are always attended.")] = None,
    min_bulk: Annotated[
        int | None, typer.Option(help="Queries with fewer far keys attend densely. Default: where patching pays.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Risk in (0, 1) of the calibration's own policy, without --policy.")
    ] = 0.02,
    moments: Annotated[
        Literal["prompt", "calibration"] | None,
        typer.Option(help="Where the gate takes key moments from. Default: as in --policy, or prompt."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which documents are drawn, and their order.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the model on the card, for instance its Hub id.")] = None,
    corpus: Annotated[str | None, typer.Option(help="What the text is, for the card.")] = None,
    key_moments: Annotated[bool, typer.Option(help="Also measure moments of the keys.")] = True,
    device: Annotated[
        str,
        typer.Option(
            help="Device of the model: cpu, cuda, cuda:1, mps. Under torchrun, cuda is one GPU for each process."
        ),
    ] = "cpu",
    json: Json = False,
) -> None:
    """Measure what each head of a model misses when it is closed, and write a calibration.

    Goes on where an earlier run into the same folder was broken off. Under torchrun the processes share the documents,
    which needs the extra `parallel`.

    **Examples**

    - `patchattn calibrate Qwen/Qwen3-0.6B --texts "books/*.txt" --lengths 8192 --out calibrations/qwen3-0.6b`
    - `patchattn calibrate --texts notes --window 256 --documents 64 --out calibrations/demo`: the shipped model
    - `torchrun --nproc-per-node 4 -m patchattn.cli calibrate MODEL --texts books --device cuda --out found`: four GPUs
    """
    calibrate_command.run(calibrate_command.Choice(**locals()))


for _command in (calibrations.inspect, calibrations.push, calibrations.pull, calibrations.card):
    app.command()(explained()(_command))
