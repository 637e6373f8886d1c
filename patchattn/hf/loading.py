"""Making models: from a folder or the Hub, and tiny ones from a configuration."""

from __future__ import annotations

from os import PathLike
from textwrap import shorten
from typing import Any

import torch


class MissingTokenizerError(ValueError):
    """A model without a tokenizer that can be read; says why."""


def load_pretrained(name: str | PathLike[str], *, dtype: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode, on the CPU.

    Args:
        name: Folder or Hub id.
        dtype: Dtype of the weights; `"auto"` takes the one that they were saved in.
        **options: More arguments of `from_pretrained`, for both.

    Raises:
        MissingTokenizerError: There is no tokenizer, or it can't be read.
        ValueError: Some weights are not there; they would be random.
        Exception: Whatever else transformers and the readers of files raise.
    """
    # Not at import: transformers takes seconds, and most of the library works without it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # The readers of files raise what comes: KeyError, TypeError, ImportError.
    except Exception as error:
        raise MissingTokenizerError(shorten(str(error), 300) or type(error).__name__) from error
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them.")
    return model.eval(), tokenizer


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """Return what a tokenizer puts before a text: the start token for most, nothing for many chat models.

    Some name a start token that they put nowhere, because it is one of their chat template's.
    """
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain), 0)
    return tuple(whole[:at])


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or what it is called if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def random_model(family: str, fields: dict[str, Any], *, has_images: bool, seed: int, dtype: torch.dtype) -> Any:
    """Make a model with random weights from the fields of its configuration, in evaluation mode.

    Args:
        family: The `model_type` of its configuration.
        fields: Fields of the configuration.
        has_images: Whether it is a vision-language model.
        seed: Seed of the weights; the global random state is left as it was.
        dtype: dtype of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(family, **fields)
    auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The grouped products of other implementations of experts exist in single and half precision only.
        model = auto.from_config(config, dtype=dtype, experts_implementation="eager")
        for parameter in model.parameters():
            # A matrix that starts at zero, as Gemma 3's projection of images, would hide what goes through it.
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=config.get_text_config().initializer_range)
    return model.eval()
