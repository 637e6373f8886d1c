"""`patchattn calibrate`: measure a calibration."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from patchattn.cli.calibrations import show
from patchattn.cli.models import load
from patchattn.cli.options import Json
from patchattn.cli.problems import check_out, read_text, stop
from patchattn.cli.processes import Process, joined, rank
from patchattn.gates import MomentGate
from patchattn.gates.thresholds import KLTarget, RiskTarget
from patchattn.measuring import collect
from patchattn.policy import Policy
from patchattn.writing import tidied

_ALPHA = 0.02


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
        float | None,
        typer.Option(help=f"Risk in (0, 1) of the calibration's own policy, without --policy. Default: {_ALPHA:g}."),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(
            help="KL to dense of the calibration's own policy, nats per token, in place of --alpha; brings --prices."
        ),
    ] = None,
    prices: Annotated[
        bool,
        typer.Option(
            "--prices",
            help="Also measure what closing does to the model's output, for targets in KL: reads up to 20 documents "
            "again with a backward pass, and others with thresholds that are tried.",
        ),
    ] = False,
    held_out: Annotated[
        int,
        typer.Option(
            min=1, help="With --prices, measure the KL on at most so many: 9 allow a promise of 0.01 nats, 49 of 0.002."
        ),
    ] = 16,
    moments: Annotated[
        Literal["prompt", "calibration"] | None,
        typer.Option(help="Where the gate takes key moments from. Default: as in --policy, or prompt."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which documents are drawn, and their order.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the model on the card, for instance its Hub id.")] = None,
    corpus: Annotated[str | None, typer.Option(help="What the text is, for the card.")] = None,
    note: Annotated[str, typer.Option(help="What a reader of the card should know besides: one paragraph.")] = "",
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
    - `patchattn calibrate --texts notes --window 256 --kl 0.01 --out calibrations/demo`: predictions that stay close
    - `torchrun --nproc-per-node 4 -m patchattn.cli calibrate MODEL --texts books --device cuda --out found`: four GPUs
    """
    chosen = _policy(policy, alpha=alpha, kl=kl, moments=moments, sink_size=sink, window_size=window, min_bulk=min_bulk)
    read = _texts(texts)
    if rank() == 0:
        check_out(out)
    with joined(device) as process:
        loaded, tokenizer = load(model, process.device)
        with tidied(out), _progress(process) as tell:
            found = collect.calibrate(
                loaded,
                tokenizer,
                read,
                chosen,
                lengths=lengths,
                documents=documents,
                seed=seed,
                corpus=corpus or f"{len(read)} files",
                model_name=name or ("patchattn-demo" if model is None else None),
                note=note,
                key_moments=key_moments,
                prices=prices or _asks_for_kl(chosen),
                held_out=held_out,
                checkpoint=out / ".checkpoint",
                progress=tell,
            )
            if process.rank == 0:
                found.save_pretrained(out)
    if process.rank == 0:
        show(found, where=str(out), as_json=json)


@contextmanager
def _progress(process: Process) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar, and warnings, in the first process only: the others say the same."""
    bar = Progress(
        # Prices take some documents more than once.
        TextColumn("readings of documents"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=process.rank > 0,
    )
    with bar, warnings.catch_warnings():
        if process.rank > 0:
            warnings.simplefilter("ignore")
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _asks_for_kl(policy: Policy) -> bool:
    return isinstance(policy.gate, MomentGate) and isinstance(policy.gate.threshold, KLTarget)


def _policy(
    path: Path | None, *, alpha: float | None, kl: float | None, moments: str | None, **given: int | None
) -> Policy:
    """Read the policy file, or ask for a risk or a KL; options go on top."""
    said = [name for name, value in (("--policy", path), ("--alpha", alpha), ("--kl", kl)) if value is not None]
    if len(said) > 1:
        raise stop(
            f"{' and '.join(said)} each say what the calibration's own policy asks for.", fix="Give one of them."
        )
    target = RiskTarget(alpha=_ALPHA if alpha is None else alpha) if kl is None else KLTarget(nats=kl)
    own = Policy(gate=MomentGate(threshold=target))
    start = own if path is None else Policy.model_validate_json(read_text(path))
    fields: dict[str, Any] = start.model_dump()
    if moments is not None:
        if fields["gate"]["kind"] != "moment":
            raise stop(
                f"--moments goes with a moment gate; the policy has the gate {fields['gate']['kind']!r}.",
                fix="Leave --moments out, or choose another policy.",
            )
        fields["gate"] = fields["gate"] | {"moments": moments}
    return Policy.model_validate(fields | {name: value for name, value in given.items() if value is not None})


def _texts(pattern: str) -> list[str]:
    """Read the files of a folder, of a pattern, or one file; in the order of their names."""
    base = Path(pattern)
    paths = sorted(base.rglob("*.txt")) if base.is_dir() else [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise stop(f"No text file fits {pattern!r}.", fix="Give a file, a folder with .txt files, or a quoted pattern.")
    return [read_text(path) for path in paths]
