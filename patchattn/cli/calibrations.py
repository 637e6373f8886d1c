"""`patchattn inspect`, `push`, `pull` and `card`: look at a calibration, and share it."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from patchattn.calibration import Calibration
from patchattn.calibration.card import card_text, write_card
from patchattn.calibration.files import writing
from patchattn.calibration.findings import Findings, RiskRow, name_of
from patchattn.calibration.price_table import PriceTable, price_table
from patchattn.cli.options import Json
from patchattn.writing import made

HubId = Annotated[str, typer.Argument(help="Hub id: namespace/name.")]
Place = Annotated[str, typer.Argument(help="Folder or Hub id of a calibration.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]

_ENDS = ("heads\nnever open", "heads\nalways open")
_SOURCES = {"prompt": "prompt", "calibration": "calibration's own text"}


def inspect(
    calibration: Place,
    *,
    revision: Revision = None,
    plots: Annotated[Path | None, typer.Option(help="Folder to write the plots and the card into.")] = None,
    json: Json = False,
) -> None:
    """Show what a calibration holds: what was measured, what a risk costs, what a KL costs, and a row for each layer.

    **Examples**

    - `patchattn inspect calibrations/patchattn-demo`
    - `patchattn inspect org/model-patchattn --revision v1 --plots plots`
    """
    found = _read(calibration, revision=revision)
    if plots is not None:
        with writing(plots), made(plots):
            write_card(found.findings, plots)
    show(found, where=calibration, as_json=json)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a calibration.")],
    repo: HubId,
    *,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    pull_request: Annotated[bool, typer.Option(help="Open a pull request in place of a commit.")] = False,
    json: Json = False,
) -> None:
    """Publish a calibration with its card; prints the commit.

    **Examples**

    - `patchattn push calibrations/my-model org/my-model-patchattn`
    - `patchattn push calibrations/my-model org/my-model-patchattn --private --message "128k tokens"`
    """
    commit = Calibration.from_pretrained(folder).push_to_hub(
        repo, private=private, commit_message=message, create_pr=pull_request
    )
    _print(dumps({"repo": repo, "commit": commit}) if json else commit)


def pull(
    repo: HubId,
    folder: Annotated[Path, typer.Argument(help="Folder to write the calibration into.")],
    *,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Get a calibration from the Hub, check it, and write it into a folder.

    **Examples**

    - `patchattn pull org/my-model-patchattn calibrations/my-model --revision v1`
    """
    found = _read(repo, revision=revision)
    found.save_pretrained(folder)
    if json:
        show(found, where=str(folder), as_json=True)
    else:
        _print(f"Calibration of {found.manifest.model} on {found.manifest.n_documents} documents, in {folder}")


def card(
    calibration: Place,
    *,
    write: Annotated[bool, typer.Option("--write", help="Write card and plots into the folder.")] = False,
    json: Json = False,
) -> None:
    """Print the model card of a calibration, or write it again.

    **Examples**

    - `patchattn card calibrations/my-model`
    - `patchattn card calibrations/my-model --write`
    """
    found = Calibration.from_pretrained(Path(calibration)) if write else _read(calibration)
    if write:
        write_card(found.findings, Path(calibration))
    text = card_text(found.findings)
    if json:
        _print(dumps({"calibration": calibration, "written": write, "card": text}))
    else:
        _print(f"{calibration}/README.md" if write else text)


def _read(where: str, *, revision: str | None = None) -> Calibration:
    """Read a calibration from a folder or the Hub; the commit it was taken at goes to standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibration = Calibration.from_pretrained(where, revision=revision)
    for warning in caught:
        Console(stderr=True).print(str(warning.message), style="dim", markup=False, soft_wrap=True)
    return calibration


def show(calibration: Calibration, *, where: str, as_json: bool) -> None:
    """Print the manifest, what risks and KLs cost, and a row for each layer."""
    findings = calibration.findings
    rows, prices = findings.risk_table(), price_table(findings)
    found = {
        "calibration": where,
        "manifest": calibration.manifest.model_dump(mode="json"),
        "policy": calibration.policy.model_dump(mode="json"),
        "risks": [asdict(row) for row in rows],
        "prices": None if prices is None else asdict(prices),
        "layers": _layers(findings),
    }
    console = Console()
    if as_json:
        console.print_json(dumps(found))
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
    if prices is not None:
        _print_prices(console, prices)
    target = findings.shown_target()
    chosen = [f"open at {name_of(target)}", "missed"] if target else []
    layers = _table("layer", "open by exact share", *chosen, "bias", "spread")
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
    risks = _table("alpha", "promise for", "open pairs", "missed mass", *_ENDS)
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


def _print_prices(console: Console, prices: PriceTable) -> None:
    """Print what a KL costs, what came of it on held-out documents, and which heads matter."""
    targets = _table("KL asked", "open pairs", "KL\nexpected", "KL\npredicted", "open pairs\nif promised", *_ENDS)
    for row in prices.targets:
        targets.add_row(
            f"{row.nats:g}",
            f"{row.open_fraction:.1%}",
            f"{row.expected:.2g}",
            f"{row.predicted:.2g}",
            row.promise(),
            str(row.never_open),
            str(row.always_open),
        )
    console.print(targets)
    console.print(
        "KL to dense attention in nats per token: how far predictions move. Predicted: what closing costs, added up; "
        "expected: as measured on held-out documents.",
        style="dim",
    )
    if prices.tried:
        tried = _table("tried on held-out documents: KL predicted", "KL measured", "can be promised", "open pairs")
        for row in prices.tried:
            known = (f"{value:.2g}" for value in (row.predicted, row.measured, row.bound))
            tried.add_row(*known, f"{row.open_fraction:.1%}")
        console.print(tried)
    dearest = _table("closing costs most: layer", "head", "KL", "of the price")
    for head in prices.dearest:
        dearest.add_row(str(head.layer), str(head.query_head), f"{head.nats:.2g}", f"{head.share:.1%}")
    console.print(dearest)
    console.print(f"{prices.concentration()}.", highlight=False)


def _table(first: str, *others: str) -> Table:
    """Make a table whose columns but the first are numbers."""
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _layers(findings: Findings) -> list[dict[str, Any]]:
    target, tensors, index = findings.shown_target(), findings.tensors, findings.index
    found = None if target is None else findings.expected(findings.by_mass(target))
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


def _print(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
