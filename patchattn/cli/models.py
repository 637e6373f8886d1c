"""Load the model that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from patchattn import demo
from patchattn.calibration.places import fix_for, looks_like_path, no_folder
from patchattn.cli.problems import stop
from patchattn.hf.loading import load_pretrained

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "spiece*")


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
    if not Path(name).is_dir() and looks_like_path(name):
        raise stop(f"Can't load {name!r} as a causal language model: {no_folder(name)}", fix=_fix(name))
    try:
        return load_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise stop(f"Can't load {name!r} as a causal language model: {_why(name, error)}", fix=_fix(name)) from None


def _why(name: str, error: Exception) -> str:
    """Say what a folder lacks, and otherwise what transformers says in its first line."""
    folder = Path(name)
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if not folder.is_dir():
        return f"{no_folder(name)} From the Hub: {line}"
    if not (folder / "config.json").is_file():
        return "the folder has no config.json, so there is no model in it."
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        return "the folder has no tokenizer."
    return line


def _fix(name: str) -> str:
    otherwise = (
        "give a folder into which save_pretrained wrote model and tokenizer, or the Hub id of a causal language model"
    )
    return otherwise if Path(name).is_dir() else fix_for(name, otherwise)
