"""The small language model that ships with the library, and held-out text for it.

The model is made for demonstrations and tests of long-context attention; its card is `README.md`
in `model_folder`. Nothing here needs a network.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from patchattn.evaluation.policies import fitting_window
from patchattn.gates import MomentGate
from patchattn.hf.architecture import name_of
from patchattn.hf.loading import load_pretrained
from patchattn.policy import Policy


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


def prose() -> str:
    """Return 465,000 characters of English: the reference that comes with CPython, `pydoc_data.topics`.

    Raises:
        ImportError: This Python comes without it.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def is_shipped(model: Any) -> bool:
    """Say whether a model is the one that ships with the library, which has read Python and no English."""
    return Path(name_of(model)).absolute() == model_folder().absolute()


def default_policy(model: Any, length: int) -> Policy:
    """Return the policy of the demo: every query with bulk keys is asked, and the window fits the length.

    The shipped model answers with heads that look up single keys, so it has the estimate that opens for those.
    """
    if is_shipped(model):
        return Policy(window_size=256, min_bulk=0, gate=MomentGate(threshold=0.6, estimate="guarded"))
    return Policy(window_size=fitting_window(length), min_bulk=0)


def default_text(model: Any) -> tuple[str, str]:
    """Return the text that a model is shown by default, and what it is, in words.

    The shipped model gets `sample_text`, any other the English reference prose that comes with CPython.
    """
    if not is_shipped(model):
        try:
            return prose(), "the reference prose that comes with Python, pydoc_data.topics"
        except ImportError:
            pass  # Some ways of installing Python leave it out.
    return sample_text(), "Python source that ships along"
