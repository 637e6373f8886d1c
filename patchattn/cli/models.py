"""Load the model that a command names."""

from __future__ import annotations

from typing import Any

import torch

from patchattn import demo
from patchattn.cli.problems import stop


def load(name: str | None, device: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        name: Folder or Hub id; None means the shipped model.
        device: Where to put it.
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        raise stop(f"Unknown device {device!r}.", fix="Use cpu, cuda, cuda:1 or mps.") from None
    from transformers.utils import logging

    # Two progress bars at a time tear each other apart.
    logging.disable_progress_bar()
    model, tokenizer = demo.load() if name is None else _load_by_name(name)
    try:
        return model.to(place), tokenizer
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise stop(
            f"Can't move the model to {device}: {str(error).splitlines()[0]}",
            fix="Choose a device that `patchattn doctor` lists.",
        ) from None


def _load_by_name(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise stop(
            f"Can't load {name!r} as a causal language model: {str(error).strip().splitlines()[0]}",
            fix="Give a folder made by save_pretrained, or the Hub id of a causal language model.",
        ) from None
    return model.eval(), tokenizer
