"""The small language model that ships with the library, and held-out text for it.

The model is made for demonstrations and tests of long-context attention; its card is `README.md`
in `model_folder`. Nothing here needs a network.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from patchattn.hf.loading import load_pretrained


def model_folder() -> Path:
    """Return the folder that holds the model's configuration, weights, tokenizer and card."""
    return Path(__file__).parent / "model"


def load() -> tuple[Any, Any]:
    """Load the shipped model and its tokenizer.

    Returns:
        A `LlamaForCausalLM` in bfloat16 and evaluation mode, on the CPU, and its tokenizer.

    Example:
        >>> model, tokenizer = load()
        >>> model.config.max_position_embeddings
        4096
    """
    return load_pretrained(model_folder(), dtype="bfloat16", local_files_only=True)


def sample_text() -> str:
    """Return about 400 kB of Python source text that the model was not trained on."""
    path = Path(__file__).parent / "text" / "stdlib.txt.gz"
    return gzip.decompress(path.read_bytes()).decode("ascii")
