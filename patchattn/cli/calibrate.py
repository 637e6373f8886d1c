"""`patchattn calibrate`, `inspect`, `push`, `pull` and `card`: measure a calibration, look at it, share it."""

from __future__ import annotations

import glob
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from patchattn.calibration import Calibration
from patchattn.calibration.card import card_text, write_card
from patchattn.calibration.files import writing
from patchattn.calibration.findings import Findings, RiskRow, name_of
from patchattn.cli.models import load
from patchattn.cli.problems import check_out, read_text, stop
from patchattn.cli.processes import Process, joined, rank
from patchattn.gates import MomentGate
from patchattn.gates.thresholds import RiskTarget
from patchattn.measuring.collect import calibrate
from patchattn.policy import Policy
from patchattn.writing import made, tidied

_SOURCES = {"prompt": "prompt", "calibration": "calibration's own text"}


@dataclass(frozen=True)
class Choice:
    """What the user asked for; the fields are the options of `patchattn calibrate`."""

    model: str | None
    texts: str
    out: Path
    lengths: list[int] | None
    documents: int | None
    policy: Path | None
    sink: int | None
    window: int | None
    min_bulk: int | None
    alpha: float
    moments: Literal["prompt", "calibration"] | None
    seed: int
    name: str | None
    corpus: str | None
    key_moments: bool
    device: str
    json: bool


def run(choice: Choice) -> None:
    """Measure, save and show; goes on from where an earlier run with the same choices was broken off."""
    policy = _policy(choice)
    texts = _texts(choice.texts)
    if rank() == 0:
        check_out(choice.out)
    with joined(choice.device) as process:
        calibration = _measure(choice, policy, texts, process)
    if process.rank == 0:
        show(calibration, where=str(choice.out), as_json=choice.json)


def _measure(choice: Choice, policy: Policy, texts: list[str], process: Process) -> Calibration:
    """Measure in all processes, and save in the first."""
    model, tokenizer = load(choice.model, process.device)
    bar = Progress(
        TextColumn("measuring documents"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=process.rank > 0,
    )
    with tidied(choice.out), bar, warnings.catch_warnings():
        if process.rank > 0:
            warnings.simplefilter("ignore")  # The first process says the same.
        task = bar.add_task("", total=None)
        calibration = calibrate(
            model,
            tokenizer,
            texts,
            policy,
            lengths=choice.lengths,
            documents=choice.documents,
            seed=choice.seed,
            corpus=choice.corpus or f"{len(texts)} files",
            model_name=choice.name or ("patchattn-demo" if choice.model is None else None),
            key_moments=choice.key_moments,
            checkpoint=choice.out / ".checkpoint",
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
        if process.rank == 0:
            calibration.save_pretrained(choice.out)
    return calibration


def read(where: str, *, revision: str | None = None) -> Calibration:
    """Read a calibration from a folder or the Hub; the commit it was taken at goes to standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibration = Calibration.from_pretrained(where, revision=revision)
    for warning in caught:
        Console(stderr=True).print(str(warning.message), style="dim", markup=False, soft_wrap=True)
    return calibration


def write_plots(calibration: Calibration, folder: Path) -> None:
    """Write the card and the plots into a folder, which is made."""
    with writing(folder), made(folder):
        write_card(calibration.findings, folder)


def show(calibration: Calibration, *, where: str, as_json: bool) -> None:
    """Print the manifest, what risks cost, and a row for each layer."""
    findings = calibration.findings
    rows = findings.risk_table()
    found = {
        "calibration": where,
        "manifest": calibration.manifest.model_dump(mode="json"),
        "policy": calibration.policy.model_dump(mode="json"),
        "risks": [asdict(row) for row in rows],
        "layers": _layers(findings),
    }
    console = Console()
    if as_json:
        console.print_json(json.dumps(found))
        return
    manifest = calibration.manifest
    console.print(f"[bold]Calibration of {manifest.model}[/], in {where}", highlight=False, soft_wrap=True)
    console.print(
        f"{manifest.n_documents} documents of {', '.join(f'{n:,}' for n in manifest.lengths)} tokens from "
        f"{manifest.corpus.name}; sink {manifest.sink_size}, window {manifest.window_size}, "
        f"{manifest.fingerprint.dtype}; thresholds are for moments of the {_SOURCES[manifest.moments]}.",
        highlight=False,
    )
    _print_risks(console, rows)
    target = findings.shown_target()
    layers = Table("layer", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "open by exact share",
        *([f"open at {name_of(target)}", "missed"] if target else []),
        "bias",
        "spread",
    ):
        layers.add_column(name, justify="right")
    for row in found["layers"]:
        chosen = (f"{row['open_fraction']:.1%}", f"{row['missed_mass']:.2%}") if target else ()
        exact = f"{row['oracle_open_fraction']:.1%}"
        layers.add_row(str(row["layer"]), exact, *chosen, f"{row['bias']:+.2f}", f"{row['spread']:.2f}")
    console.print(layers)
    console.print(
        "Means over the heads of a layer; bias and spread of the estimated log mass in nats. Measured on dense "
        "activations.",
        style="dim",
    )


def _print_risks(console: Console, rows: list[RiskRow]) -> None:
    """Print what can be promised as a table, and below it what would take how many documents."""
    risks = Table("alpha", "promise for", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("open pairs", "missed mass", "heads\nnever open", "heads\nalways open"):
        risks.add_column(name, justify="right")
    needed: dict[str, list[str]] = {}
    for row in rows:
        scope = "each head" if row.scope == "head" else "mean of heads"
        if row.open_fraction is None or row.missed_mass is None:
            needed.setdefault(scope, []).append(f"alpha {row.alpha:g} needs {row.documents_needed} documents")
        else:
            cells = (f"{row.open_fraction:.1%}", f"{row.missed_mass:.2%}", str(row.never_open), str(row.always_open))
            risks.add_row(f"{row.alpha:g}", scope, *cells)
    if risks.rows:
        console.print(risks)
    for scope, lines in needed.items():
        console.print(f"Promise for {scope}: {', '.join(lines)}.", style="dim", highlight=False)


def push(
    folder: Path, repo: str, *, private: bool | None, message: str | None, pull_request: bool, as_json: bool
) -> None:
    """Publish a folder, and print the commit."""
    commit = Calibration.from_pretrained(folder).push_to_hub(
        repo, private=private, commit_message=message, create_pr=pull_request
    )
    _print(json.dumps({"repo": repo, "commit": commit}) if as_json else commit)


def pull(repo: str, folder: Path, *, revision: str | None, as_json: bool) -> None:
    """Write a repository's calibration into a folder, and say what it is."""
    calibration = read(repo, revision=revision)
    calibration.save_pretrained(folder)
    if as_json:
        show(calibration, where=str(folder), as_json=True)
    else:
        documents = calibration.manifest.n_documents
        _print(f"Calibration of {calibration.manifest.model} on {documents} documents, in {folder}")


def card(where: str, *, write: bool, as_json: bool) -> None:
    """Print the card of a folder or repository, or write card and pictures of a folder again."""
    calibration = Calibration.from_pretrained(Path(where)) if write else read(where)
    if write:
        write_card(calibration.findings, Path(where))
    text = card_text(calibration.findings)
    if as_json:
        _print(json.dumps({"calibration": where, "written": write, "card": text}))
    else:
        _print(f"{where}/README.md" if write else text)


def _print(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _layers(findings: Findings) -> list[dict[str, Any]]:
    target, tensors, index = findings.shown_target(), findings.tensors, findings.index_of(None)
    found = None if target is None else findings.expected(findings.thresholds(target))
    return [
        {
            "layer": layer,
            "oracle_open_fraction": float(tensors["oracle_open_fraction"][at].mean()),
            "target": None if target is None else target.model_dump(),
            "open_fraction": None if found is None else float(found.open_fraction[at].mean()),
            "missed_mass": None if found is None else float(found.missed_mass[at].mean()),
            "bias": float(tensors["bias"][index, at].mean()),
            "spread": float(tensors["spread"][index, at].mean()),
        }
        for at, layer in enumerate(findings.manifest.layers)
    ]


def _policy(choice: Choice) -> Policy:
    """Read the policy file, or ask for a risk; options go on top."""
    if choice.policy is None:
        fields: dict[str, Any] = Policy(gate=MomentGate(threshold=RiskTarget(alpha=choice.alpha))).model_dump()
    else:
        try:
            fields = Policy.model_validate_json(choice.policy.read_text(encoding="utf-8")).model_dump()
        except (OSError, UnicodeDecodeError):
            raise stop(f"Can't read {choice.policy}.", fix="Give the path of a policy file.") from None
    if choice.moments is not None:
        if fields["gate"]["kind"] != "moment":
            raise stop(
                f"--moments goes with a moment gate; the policy has the gate {fields['gate']['kind']!r}.",
                fix="Leave --moments out, or choose another policy.",
            )
        fields["gate"] = fields["gate"] | {"moments": choice.moments}
    given = {"sink_size": choice.sink, "window_size": choice.window, "min_bulk": choice.min_bulk}
    return Policy.model_validate(fields | {name: value for name, value in given.items() if value is not None})


def _texts(pattern: str) -> list[str]:
    """Read the files of a folder, of a pattern, or one file; in the order of their names."""
    base = Path(pattern)
    paths = sorted(base.rglob("*.txt")) if base.is_dir() else [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise stop(f"No text file fits {pattern!r}.", fix="Give a file, a folder with .txt files, or a quoted pattern.")
    return [read_text(path) for path in paths]
