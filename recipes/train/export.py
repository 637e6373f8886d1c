"""Write a checkpoint as a Hugging Face model folder, in bfloat16.

python recipes/train/export.py --run runs/demo --to patchattn/demo/model
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

# Recipes run from a checkout: the package beside them is used, installed or not.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from checkpoint import load_checkpoint
from corpus import SourceFile, collect
from model import build_model

_SAMPLE_BYTES = 400_000


def export_model(run: Path, folder: Path) -> None:
    """Write configuration, weights and tokenizer; each file is replaced in one move."""
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    model = build_model(tokenizer.vocab_size)
    load_checkpoint(run / "checkpoint.safetensors", model)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, do_sample=False)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def export_text(files: list[SourceFile], path: Path) -> None:
    """Write the first 400 kB of held-out files, whole files only, as one compressed text."""
    parts, size = [], 0
    for file in (f for f in files if f.held_out):
        part = f"# file: {file.name}\n{file.text.rstrip()}\n\n"
        if size + len(part) <= _SAMPLE_BYTES:
            parts.append(part)
            size += len(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No time stamp: the same text gives the same file.
    path.write_bytes(gzip.compress("".join(parts).encode("ascii"), compresslevel=9, mtime=0))


def main() -> None:
    """Export the model and, where asked for, the held-out text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--to", type=Path, required=True, help="model folder to write")
    parser.add_argument("--text", type=Path, help="also write the held-out text to this .txt.gz")
    arguments = parser.parse_args()
    export_model(arguments.run, arguments.to)
    if arguments.text is not None:
        export_text(collect(), arguments.text)


if __name__ == "__main__":
    main()
