"""`patchattn calibrate`, `inspect`, `push`, `pull` and `card`: measure a calibration, look at it, share it."""

from __future__ import annotations

import glob
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from patchattn.calibration import Calibration
from patchattn.calibration.card import card_text, risk_table, write_card
from patchattn.calibration.collect import calibrate
from patchattn.cli.models import load
from patchattn.cli.problems import read_text, stop
from patchattn.policy import MomentGate, Policy, RiskTarget

_SHOWN_ALPHA = 0.02


@dataclass(frozen=True)
class Choice:
    """What the user asked for; the fields are the options of `patchattn calibrate`."""

    model: str | None
    texts: str
    out: Path
    lengths: tuple[int, ...]
    documents: int | None
    policy: Path | None
    sink: int | None
    window: int | None
    min_bulk: int | None
    alpha: float
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
    if choice.out.exists() and not choice.out.is_dir():
        raise stop(f"{choice.out} is not a folder.", fix="Choose another --out.")
    choice.out.mkdir(parents=True, exist_ok=True)
    rank = _join_processes()
    model, tokenizer = load(choice.model, choice.device)
    bar = Progress(
        TextColumn("measuring documents"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=rank > 0,
    )
    with bar:
        task = bar.add_task("", total=None)
        calibration = calibrate(
            model,
            tokenizer,
            texts,
            policy,
            lengths=choice.lengths or None,
            documents=choice.documents,
            seed=choice.seed,
            corpus=choice.corpus or f"{len(texts)} files",
            model_name=choice.name or ("patchattn-demo" if choice.model is None else None),
            key_moments=choice.key_moments,
            checkpoint=choice.out / ".checkpoint",
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    if rank == 0:
        calibration.save_pretrained(choice.out)
        show(calibration, where=str(choice.out), as_json=choice.json)


def read(where: str, *, revision: str | None = None) -> Calibration:
    """Read a calibration from a folder or the Hub; the commit it was taken at goes to standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibration = Calibration.from_pretrained(where, revision=revision)
    for warning in caught:
        Console(stderr=True).print(str(warning.message), style="dim", markup=False, soft_wrap=True)
    return calibration


def show(calibration: Calibration, *, where: str, as_json: bool) -> None:
    """Print the manifest, what risks cost, and a row for each layer."""
    rows = risk_table(calibration)
    found = {
        "calibration": where,
        "manifest": calibration.manifest.model_dump(mode="json"),
        "policy": calibration.policy.model_dump(mode="json"),
        "risks": [asdict(row) for row in rows],
        "layers": _layers(calibration),
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
        f"{manifest.fingerprint.dtype}.",
        highlight=False,
    )
    risks = Table("alpha", "promise for", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("open pairs", "missed mass", "heads never open", "heads always open"):
        risks.add_column(name, justify="right")
    for row in rows:
        scope = "each head" if row.scope == "head" else "mean over heads"
        if row.open_fraction is None or row.missed_mass is None:
            risks.add_row(f"{row.alpha:g}", scope, f"needs {row.documents_needed} documents", "", "", "")
        else:
            risks.add_row(
                f"{row.alpha:g}",
                scope,
                f"{row.open_fraction:.1%}",
                f"{row.missed_mass:.2%}",
                str(row.never_open),
                str(row.always_open),
            )
    console.print(risks)
    layers = Table("layer", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("open by exact share", f"open at alpha {_SHOWN_ALPHA:g}", "missed", "bias", "spread"):
        layers.add_column(name, justify="right")
    for row in found["layers"]:
        layers.add_row(
            str(row["layer"]),
            f"{row['oracle_open_fraction']:.1%}",
            "-" if row["open_fraction"] is None else f"{row['open_fraction']:.1%}",
            "-" if row["missed_mass"] is None else f"{row['missed_mass']:.2%}",
            f"{row['bias']:+.2f}",
            f"{row['spread']:.2f}",
        )
    console.print(layers)
    console.print(
        "Means over the heads of a layer; bias and spread of the estimated log mass in nats. Measured on dense "
        "activations.",
        style="dim",
    )


def push(folder: Path, repo: str, *, private: bool | None, message: str | None, pull_request: bool) -> str:
    """Publish a folder; returns the commit."""
    return Calibration.from_pretrained(folder).push_to_hub(
        repo, private=private, commit_message=message, create_pr=pull_request
    )


def write_cards(folder: Path) -> None:
    """Write the card and the pictures of a folder again."""
    write_card(Calibration.from_pretrained(folder), folder)


def text_of_card(where: str) -> str:
    """Return the card of a folder or repository without writing it."""
    return card_text(read(where))


def _layers(calibration: Calibration) -> list[dict[str, Any]]:
    target = RiskTarget(alpha=max(_SHOWN_ALPHA, 1 / (calibration.manifest.n_documents + 1)))
    enough = target.alpha == _SHOWN_ALPHA
    found = calibration.expected(calibration.thresholds(target))
    index = calibration.manifest.estimates.index(_estimate(calibration))
    rows = []
    for at, layer in enumerate(calibration.manifest.layers):
        rows.append(
            {
                "layer": layer,
                "oracle_open_fraction": float(calibration.tensors["oracle_open_fraction"][at].mean()),
                "alpha": _SHOWN_ALPHA,
                "open_fraction": float(found.open_fraction[at].mean()) if enough else None,
                "missed_mass": float(found.missed_mass[at].mean()) if enough else None,
                "bias": float(calibration.tensors["bias"][index, at].mean()),
                "spread": float(calibration.tensors["spread"][index, at].mean()),
            }
        )
    return rows


def _estimate(calibration: Calibration) -> str:
    gate, measured = calibration.policy.gate, calibration.manifest.estimates
    return gate.estimate if isinstance(gate, MomentGate) and gate.estimate in measured else measured[0]


def _policy(choice: Choice) -> Policy:
    """Read the policy file, or ask for a risk; options go on top."""
    if choice.policy is None:
        fields: dict[str, Any] = Policy(gate=MomentGate(threshold=RiskTarget(alpha=choice.alpha))).model_dump()
    else:
        try:
            fields = Policy.model_validate_json(choice.policy.read_text(encoding="utf-8")).model_dump()
        except (OSError, UnicodeDecodeError):
            raise stop(f"Can't read {choice.policy}.", fix="Give the path of a policy file.") from None
    for name, value in (
        ("sink_size", choice.sink),
        ("window_size", choice.window),
        ("min_bulk", choice.min_bulk),
    ):
        if value is not None:
            fields[name] = value
    return Policy.model_validate(fields)


def _texts(pattern: str) -> list[str]:
    """Read the files of a folder, of a pattern, or one file; in the order of their names."""
    base = Path(pattern)
    paths = sorted(base.rglob("*.txt")) if base.is_dir() else [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise stop(f"No text file fits {pattern!r}.", fix="Give a file, a folder with .txt files, or a quoted pattern.")
    return [read_text(path) for path in paths]


def _join_processes() -> int:
    """Join the other processes where `torchrun` started several; returns the rank of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
