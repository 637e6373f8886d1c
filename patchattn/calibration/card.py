"""The model card of a calibration: how to use it, what risk costs what, and pictures of the heads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from patchattn.calibration import files
from patchattn.calibration.findings import Findings
from patchattn.calibration.manifest import Manifest
from patchattn.calibration.price_table import price_table
from patchattn.gates.thresholds import KL_BOUND
from patchattn.writing import made

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def card_text(findings: Findings, *, plots: tuple[str, ...] = (), repo: str | None = None) -> str:
    """Write the card as Markdown with a header that the Hub understands.

    Args:
        findings: What the calibration found.
        plots: Paths of the pictures, relative to the card.
        repo: Hub id under which the calibration is published; None leaves a place to fill in.
    """
    manifest = findings.manifest
    of = manifest.fingerprint
    base = [f"base_model: {manifest.model}"] if _HUB_ID.match(manifest.model) else []
    header = ["---", "library_name: patchattn", *base, "license: apache-2.0", "tags:"]
    header += ["- patchattn", "- long-context", "- attention", "- calibration", "---"]
    lengths = ", ".join(f"{length:,}" for length in manifest.lengths)
    commit = f" at commit `{manifest.commit}`" if manifest.commit else ""
    return "\n".join(
        [
            *header,
            "",
            f"# patchattn calibration of {manifest.model}",
            "",
            f"Thresholds per head for patchattn, measured on {manifest.model}{commit}: each attention head decides for "
            f"each query whether it reads the keys beyond the first {manifest.sink_size} and the last "
            f"{manifest.window_size} tokens.",
            "",
            *([manifest.note, ""] if manifest.note else []),
            "```python",
            "import patchattn",
            "",
            f'patchattn.patch(model, calibration="{repo or "NAMESPACE/NAME"}")  # brings its own policy',
            "model.generate(**inputs)",
            "```",
            "",
            "## What a risk costs",
            "",
            *_risk_lines(findings),
            "",
            "Missed mass is the share of a query's attention that lies on keys a closed head does not read. "
            'With `scope="head"` each head keeps the promise by itself, with `scope="model"` the mean over heads does. '
            "The promise: in expectation, for documents like the measured ones in source and length, the mean missed "
            "mass of a document is at most alpha. It is made for dense activations; on a patched model the layers "
            "below are gated too.",
            "",
            *_kl_lines(findings),
            "## What was measured",
            "",
            "| | |",
            "|---|---|",
            f"| text | {manifest.corpus.name} |",
            f"| documents | {manifest.n_documents}, of {lengths} tokens; {manifest.corpus.tokens:,} tokens in all |",
            f"| digest of the tokens (sha256) | `{manifest.corpus.sha256}` |",
            f"| sink, window | {manifest.sink_size}, {manifest.window_size} tokens |",
            f"| model | {of.layers} layers, {of.query_heads} query heads, {of.kv_heads} KV heads of {of.head_dim}, "
            f"{of.dtype} |",
            f"| layers measured | {len(manifest.layers)} |",
            f'| thresholds are for | `moments="{manifest.moments}"` |',
            f"| key moments | {_moments(manifest)} |",
            *_price_lines(manifest),
            f"| versions | {', '.join(f'{name} {version}' for name, version in manifest.versions.items())} |",
            "",
            "## How good the estimate is",
            "",
            *_fit_lines(findings),
            "",
            "Bias and spread are of the estimated minus the true log mass of the far keys, in nats, over the pairs for "
            "which there is a finite estimate; the others open. Recall and precision are against the exact local "
            f"share at {manifest.oracle_threshold:g}, for a threshold of the same share.",
            *(line for plot in plots for line in ("", f"![{Path(plot).stem}]({plot})")),
            "",
        ]
    )


def _risk_lines(findings: Findings) -> list[str]:
    lines = [
        "| alpha | scope | open pairs | missed mass | heads never open | heads always open |",
        "|---|---|---|---|---|---|",
    ]
    for row in findings.risk_table():
        if row.open_fraction is None or row.missed_mass is None:
            lines.append(f"| {row.alpha:g} | {row.scope} | needs {row.documents_needed} documents | | | |")
        else:
            lines.append(
                f"| {row.alpha:g} | {row.scope} | {row.open_fraction:.1%} | {row.missed_mass:.2%} | {row.never_open} "
                f"| {row.always_open} |"
            )
    return lines


def _kl_lines(findings: Findings) -> list[str]:
    """Write the section on KL; nothing without prices."""
    found = price_table(findings)
    if found is None:
        return []
    lines = [
        "## What a KL costs",
        "",
        "| KL asked for | open pairs | KL expected | KL predicted | open pairs if promised | heads never open "
        "| heads always open |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.nats:g} | {row.open_fraction:.1%} | {row.expected:.2g} | {row.predicted:.2g} | {row.promise()} | "
        f"{row.never_open} | {row.always_open} |"
        for row in found.targets
    ]
    lines += [
        "",
        "KL says how far the model's predictions move, in nats per token: on text as the dense model would write it, "
        "the loss rises by so much, so that at 0.01 perplexity rises by 1%. Predicted adds up what each closed pair "
        "costs, between its price in the dense model and its value in a gated one; expected corrects that by what was "
        "measured on documents that chose nothing. What is promised, "
        "with `KLTarget(nats=..., promised=True)`: in expectation, for documents like the measured ones in source and "
        f"length, the KL of the patched model is at most that, where a document counts for {KL_BOUND:g} nats at most. "
        "Nothing is promised for one document, for other text or for answers: a fact that is looked up once hardly "
        "moves a mean over tokens.",
        "",
    ]
    if found.tried:
        lines += ["| tried on held-out documents: KL predicted | KL measured | can be promised | open pairs |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {row.predicted:.2g} | {row.measured:.2g} | {row.bound:.2g} | {row.open_fraction:.1%} |"
            for row in found.tried
        ]
        lines.append("")
    named = ", ".join(f"layer {head.layer} head {head.query_head} ({head.share:.1%})" for head in found.dearest)
    return [*lines, f"{found.concentration()}: {named}.", ""]


def _fit_lines(findings: Findings) -> list[str]:
    lines = [
        "| estimate | pairs with an estimate | bias, median head | spread, median head | recall | precision |",
        "|---|---|---|---|---|---|",
    ]
    margins = findings.everywhere(torch.logit(torch.tensor(findings.manifest.oracle_threshold)))
    for estimate in findings.manifest.estimates:
        of = replace(findings, estimate=estimate)
        found = of.expected(margins)
        known, bias, spread = (of.tensors[name][of.index] for name in ("known_fraction", "bias", "spread"))
        lines.append(
            f"| {estimate} | {known.mean():.1%} | {bias.median():+.2f} | {spread.median():.2f} | "
            f"{found.recall.mean():.1%} | {found.precision.mean():.1%} |"
        )
    return lines


def _moments(manifest: Manifest) -> str:
    if manifest.rotary is None:
        return "none"
    apart = ", which give nothing else" if manifest.moments == "calibration" else ""
    return (
        f"of {manifest.moment_documents} documents{apart}; half precision changes a covariance by at most "
        f"{manifest.covariance_error:.2%}"
    )


def _price_lines(manifest: Manifest) -> list[str]:
    if (source := manifest.prices) is None:
        return []
    return [
        f"| prices | for the {source.estimate} estimate: a probe fitted to {source.fitted} documents, prices from "
        f"{source.priced} others, the KL of the patched model on {source.held_out} yet others |"
    ]


def write_card(findings: Findings, folder: Path, *, repo: str | None = None) -> None:
    """Write `README.md` into a folder, and pictures into `plots/` where matplotlib is installed.

    Args:
        findings: What the calibration found.
        folder: An existing folder.
        repo: See `card_text`.

    Raises:
        CalibrationError: The folder can't be written.
    """
    plots: tuple[str, ...] = ()
    try:
        from patchattn.calibration import pictures
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
    else:
        drawn = pictures.draw(findings)
        with files.writing(folder), made(folder / "plots"):
            for name, data in drawn.items():
                files.write(folder / "plots" / name, data)
        plots = tuple(f"plots/{name}" for name in drawn)
    files.write(folder / "README.md", card_text(findings, plots=plots, repo=repo).encode())
