"""Collect the text the model is trained on: the standard library of the running Python."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Tests, generated tables and other packages' code: long literals and data teach little.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "turtledemo",
        "ensurepip",
        "__pycache__",
        "distutils",
        "config",
    }
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_MIN_BYTES = 1_000
_HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class SourceFile:
    """One module of the standard library.

    Args:
        name: Path relative to the library's folder, with forward slashes.
        text: Its source, ASCII only.
    """

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file belongs to the held-out split: a hash of its name decides."""
        return zlib.crc32(self.name.encode()) % 100 < _HELD_OUT_PERCENT


def collect() -> list[SourceFile]:
    """Read the standard library's modules in a fixed order.

    Returns:
        The files, sorted by name; both splits. Select with `SourceFile.held_out`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(p in _SKIPPED_FOLDERS or p.startswith(_SKIPPED_PREFIXES) for p in relative.parts):
            continue
        data = path.read_bytes()
        if len(data) < _MIN_BYTES or not data.isascii():
            continue
        text = data.decode("ascii").replace("\r\n", "\n").expandtabs(4)
        files.append(SourceFile(relative.as_posix(), text))
    return files


def join(files: list[SourceFile]) -> str:
    """Concatenate files, one blank line between two of them."""
    return "\n".join(file.text.rstrip("\n") + "\n" for file in files)


def train_tokenizer(text: str, *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training split.

    Every digit and every line break is a token of its own, so that a number has as many
    tokens as digits and a text has the same tokens read whole or line by line.

    Args:
        text: Training text.
        vocab_size: Number of tokens, special tokens included.

    Returns:
        A tokenizer that puts `<|bos|>` in front of a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
