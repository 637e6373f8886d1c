"""The shipped model, its calibration and documents for it, as all results pages use them."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]

from patchattn import demo
from patchattn.calibration import Calibration
from patchattn.evaluation.documents import Document, Kind, make_document, tokenize_text

LENGTHS = (1024, 2048, 4096)
WINDOWS = (64, 128, 256)
SINK = 16
KINDS_PER_1024: dict[str, tuple[Kind, ...]] = {"facts": ("fact",) * 9, "chains and lists": ("chain", "list") * 3}
"""What is planted and asked for, in every 1,024 tokens."""

TASKS = ("plain text", "planted line", "question", "answer")
"""What the token of a query belongs to; a query whose next token is part of an answer counts as `answer`."""

WORK = Path("runs/evaluate")
"""Folder of what was measured; a recipe that finds its rows there goes on from them."""

_CALIBRATION = Path(__file__).parents[2] / "calibrations" / "patchattn-demo"


def command_line(page: str, description: str | None) -> argparse.Namespace:
    """Parse what the commands that share the work between processes take: `processes`, `work` and `out`.

    Args:
        page: Name of the files that the command writes.
        description: Its module's docstring, whose first line is shown.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the rows; a run goes on from what is there")
    parser.add_argument("--out", type=Path, default=Path("docs/results") / page, help="without suffix")
    return parser.parse_args()


@cache
def load() -> tuple[Any, Any, Any]:
    """Return the model in float32 on one thread, its tokenizer and its tokenized text.

    On processors without fast bfloat16 products float32 is three times as fast; differences then come from the gates
    and not from rounding.
    """
    torch.set_num_threads(1)
    model, tokenizer = demo.load()
    return model.float(), tokenizer, tokenize_text(demo.sample_text(), tokenizer)


@cache
def calibration() -> Calibration:
    """Return the shipped calibration for the same weights in float32; it was measured in bfloat16."""
    shipped = Calibration.from_pretrained(_CALIBRATION)
    fingerprint = shipped.manifest.fingerprint.model_copy(update={"dtype": "float32"})
    return Calibration(
        shipped.manifest.model_copy(update={"fingerprint": fingerprint}), shipped.policy, shipped.tensors
    )


def document(kinds: str, length: int, seed: str) -> Document:
    """Make one document of held-out Python source with planted lines, all asked for at the end."""
    _, tokenizer, text = load()
    planted = KINDS_PER_1024[kinds] * (length // 1024)
    return make_document(text, tokenizer, length=length, kinds=planted, seed=seed)


def tasks_of(one: Document) -> Tensor:
    """Say for each token of a document which of `TASKS` it belongs to, [tokens] int64."""
    found = torch.zeros(len(one.token_ids), dtype=torch.long)
    for start, end in one.planted:
        found[start:end] = 1
    for question in one.questions:
        found[question.start : question.answer_start - 1] = 2
        found[question.answer_start - 1 : question.answer_end - 1] = 3
    return found
