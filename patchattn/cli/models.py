"""Load the model that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer

from patchattn import demo
from patchattn.calibration.places import fix_for, looks_like_path, no_folder
from patchattn.cli.problems import stop
from patchattn.hf.loading import MissingTokenizerError, first_line, load_pretrained

# Of a model, and of an adapter for one.
_CONFIGURATIONS = ("config.json", "adapter_config.json")


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
    folder = Path(name)
    if not folder.is_dir() and looks_like_path(name):
        raise _not_loaded(name, no_folder(name))
    if folder.is_dir() and not any((folder / file).is_file() for file in _CONFIGURATIONS):
        raise _not_loaded(name, f"the folder has no {_CONFIGURATIONS[0]}, so there is no model in it.")
    where = "" if folder.is_dir() else f"{no_folder(name)} From the Hub: "
    try:
        return load_pretrained(name)
    except MissingTokenizerError as error:
        if not folder.is_dir():
            raise _not_loaded(name, f"{where}{error}") from None
        raise stop(
            f"The model in {name!r} has no tokenizer that can be read: {error}",
            fix="put the model's tokenizer beside it: AutoTokenizer.from_pretrained(ID).save_pretrained(FOLDER)",
        ) from None
    # Files of others raise what comes: SafetensorError, KeyError, RuntimeError of sizes that do not fit.
    except Exception as error:
        raise _not_loaded(name, f"{where}{first_line(error)}") from None


def _not_loaded(name: str, reason: str) -> typer.Exit:
    otherwise = "give a folder made by save_pretrained, or the Hub id of a causal language model"
    fix = otherwise if Path(name).is_dir() else fix_for(name, otherwise)
    return stop(f"Can't load {name!r} as a causal language model: {reason}", fix=fix)
