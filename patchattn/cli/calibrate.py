"""`patchattn calibrate`: measure a calibration."""

from __future__ import annotations

import glob
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from patchattn.calibration import Calibration
from patchattn.cli.calibrations import show
from patchattn.cli.models import load
from patchattn.cli.problems import check_out, read_text, stop
from patchattn.cli.processes import Process, joined, rank
from patchattn.gates import MomentGate
from patchattn.gates.thresholds import RiskTarget
from patchattn.measuring.collect import calibrate
from patchattn.policy import Policy
from patchattn.writing import tidied


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
