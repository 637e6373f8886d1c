"""The refusal of more tokens than a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchattn.errors import PatchAttnError
from patchattn.hf.architecture import context_of


def check_context(model: Any, lengths: Sequence[int], error: type[PatchAttnError]) -> None:
    """Refuse lengths that a model does not read, before work is spent on the shorter ones.

    Args:
        model: The model.
        lengths: Tokens in each text.
        error: Class of the error to raise.
    """
    most, longest = context_of(model), max(lengths, default=0)
    if most is not None and longest > most:
        raise error(
            f"The model reads at most {most:,} tokens and a text was to have {longest:,}.",
            fix=f"choose a length of at most {most}, or a model with a longer context",
        )
