"""The documents of a calibration: cut from texts, drawn, shared out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from patchattn.errors import CalibrationError
from patchattn.hf.loading import beginning

_ONE_IN = 5
"""With moments of the calibration, one document in so many gives moments and nothing else."""


def cut_documents(
    tokenizer: Any,
    texts: Iterable[str],
    lengths: Sequence[int],
    *,
    documents: int | None,
    seed: int,
    local: tuple[int, int],
) -> list[Tensor]:
    """Cut texts into documents with bulk keys; see `calibrate`.

    Returns:
        Token ids of each document, [tokens] int64, each with what the tokenizer puts before a text.

    Raises:
        CalibrationError: No document has bulk keys, or there are fewer than `documents`.
    """
    found: list[Tensor] = []
    first = list(beginning(tokenizer))
    for index, text in enumerate(texts):
        length = lengths[index % len(lengths)]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        step = length - len(first)
        pieces = [ids[begin : begin + step] for begin in range(0, max(len(ids) - step + 1, 1), step)]
        found += [torch.tensor(first + piece) for piece in pieces if len(first) + len(piece) > sum(local)]
    if not found or len(found) < (documents or 0):
        raise CalibrationError(
            f"The texts give {len(found)} documents of more than {sum(local)} tokens (sink and window)"
            + (f"; {documents} were asked for." if documents else "."),
            fix="give more or longer texts, or a smaller window or length",
        )
    random.Random(seed).shuffle(found)
    return found[:documents]


def share_out(count: int, source: str) -> tuple[list[int], list[int]]:
    """Say which documents give key moments only, and which are measured.

    The promise needs documents that the estimate has never seen, so with moments of the calibration every fifth
    document gives moments and nothing else.

    Raises:
        CalibrationError: Too few documents.
    """
    if source == "prompt":
        return [], list(range(count))
    if count < _ONE_IN:
        raise CalibrationError(
            f'moments="calibration" needs {_ONE_IN} documents or more, one of {_ONE_IN} for the moments; there are '
            f"{count}.",
            fix="give more texts",
        )
    apart = list(range(_ONE_IN - 1, count, _ONE_IN))
    return apart, [index for index in range(count) if index % _ONE_IN != _ONE_IN - 1]


def digest_of(documents: list[Tensor]) -> str:
    """Return the sha256 of all token ids, in order."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little") + ids.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()
