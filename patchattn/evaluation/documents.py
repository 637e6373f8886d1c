"""Documents with planted facts, lists, chains and notes, and questions about them.

A document is real text of an exact number of tokens in which short lines are planted; each
planted line is asked for later, with the answer written out. A model reads the whole document
in one forward pass and is right about a question when every token of the answer is its most
likely next token given the true tokens before it. Any Hugging Face tokenizer will do, and the
same code makes training text and held-out tests: the keys of the two splits never meet.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, get_args

from patchattn.errors import PatchAttnError
from patchattn.evaluation.units import cut, n_shared, take, weave
from patchattn.evaluation.words import draw_number, draw_word
from patchattn.hf.context import check_context
from patchattn.hf.loading import beginning

Kind = Literal["fact", "chain", "list", "note"]
"""What is planted and asked for.

- `fact`: `# key = 48213`, asked for in one of `FACT_PROMPTS`.
- `chain`: the assignments `# a = 48213`, `# b = a`, `# c = b`, far apart; asked: follow `c`.
- `list`: `# list key: one, two, three`; asked: repeat it in order.
- `note`: `# note key: <a line of the text>`; asked: copy that line.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

Split = Literal["train", "test"]
"""Which keys may occur: a hash of the key decides, so the two sets are disjoint."""

FACT_PROMPTS = ("# {key} =", "# What is {key}? It is", "assert {key} ==", "# get({key}) ->")
"""Phrasings of a question for a fact; the answer follows after one space."""

_TEST_KEYS_ONE_IN = 8
_NOTE_CHARACTERS = range(10, 49)


class DocumentError(PatchAttnError, ValueError):
    """A document that can't be made: too little text, more than fits, or a tokenizer that can't write the answer."""

    code = "document"


@dataclass(frozen=True)
class TokenizedText:
    """Lines of a text with their tokens.

    Args:
        lines: The lines, each with its line break.
        tokens: Token ids of each line, without special tokens.
    """

    lines: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def tokens_from(self, line: int) -> Iterator[tuple[int, ...]]:
        """Yield the tokens of each line from one on, over and over."""
        return islice(cycle(self.tokens), line, None)


@dataclass(frozen=True)
class Question:
    """One question in a document, with its answer.

    Args:
        kind: What is asked for.
        prompt: The question's text, which ends right before the answer.
        answer: The right answer, with its leading space.
        planted_at: Index of the document's token at which the first line it needs begins.
        start: Index of the question's first token.
        answer_start: Index of the answer's first token.
        answer_end: One past the answer's last token.
    """

    kind: Kind
    prompt: str
    answer: str
    planted_at: int
    start: int
    answer_start: int
    answer_end: int


@dataclass(frozen=True)
class Document:
    """A text with planted lines and questions.

    Args:
        token_ids: All tokens; the first is the tokenizer's BOS where it has one.
        questions: The questions in the order in which they stand in the text.
        planted: `(start, end)` of each planted line in tokens, `end` exclusive.
    """

    token_ids: tuple[int, ...]
    questions: tuple[Question, ...]
    planted: tuple[tuple[int, int], ...]

    def prompt(self, index: int) -> tuple[int, ...]:
        """Return the tokens to generate the answer of one question from.

        For a document with all questions at the end, the other questions are left out.

        Args:
            index: Which question.

        Returns:
            The document up to its first question, then this question up to its answer.
        """
        question = self.questions[index]
        body = self.token_ids[: self.questions[0].start]
        return body + self.token_ids[question.start : question.answer_start]


@dataclass(frozen=True)
class PlantedTask:
    """What one question needs: the lines to plant, in order, and how to ask; fields as in `Question`."""

    kind: Kind
    planted: tuple[str, ...]
    prompt: str
    answer: str


def check_longest(model: Any, *lengths: int) -> None:
    """Refuse documents that are longer than the model's context.

    Raises:
        DocumentError: See above.
    """
    check_context(model, lengths, DocumentError)


def tokenize_text(text: str, tokenizer: Any) -> TokenizedText:
    """Split a text into lines and tokenize each one.

    Args:
        text: The text to take documents' filling from.
        tokenizer: Any Hugging Face tokenizer.

    Returns:
        The lines that have at least one token.
    """
    lines = text.splitlines(keepends=True)
    if not lines:
        return TokenizedText((), ())
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    pairs = [(line, tuple(ids)) for line, ids in zip(lines, encoded, strict=True) if ids]
    return TokenizedText(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


def is_test_key(key: str) -> bool:
    """Say whether a key belongs to the test split, one in eight does."""
    return zlib.crc32(key.encode()) % _TEST_KEYS_ONE_IN == 0


def make_document(
    text: TokenizedText,
    tokenizer: Any,
    *,
    length: int,
    kinds: Sequence[Kind] = ("fact",) * 25,
    seed: int | str = 0,
    split: Split = "test",
    ask: Literal["end", "throughout"] = "end",
    depth: tuple[float, float] = (0.0, 1.0),
) -> Document:
    """Make a document of an exact number of tokens with one question per planted task.

    Args:
        text: Where the filling comes from; a run of consecutive lines is taken.
        tokenizer: The tokenizer that `text` was tokenized with.
        length: Tokens in the document, BOS included.
        kinds: One entry per task to plant and ask for.
        seed: Everything random follows from it.
        split: Which keys to use.
        ask: `"end"` puts all questions after the filling, in random order; `"throughout"`
            puts each one anywhere after the lines it needs.
        depth: Where planted lines may stand, as fractions of the filling.

    Returns:
        The document. The same arguments give the same document.

    Raises:
        DocumentError: The tasks need more tokens than `length`, the text is empty, or as `draw_task` raises it.

    Example:
        >>> text = tokenize_text(sample, tokenizer)  # doctest: +SKIP
        >>> document = make_document(text, tokenizer, length=4096)  # doctest: +SKIP
        >>> len(document.token_ids), len(document.questions)  # doctest: +SKIP
        (4096, 25)
    """
    rng = random.Random(f"{seed}/{split}/{length}")
    tasks = [draw_task(kind, text, rng, split) for kind in kinds]

    def encoded(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    planted = encoded([line for task in tasks for line in task.planted])
    prompts = encoded([task.prompt for task in tasks])
    asked = encoded([task.prompt + task.answer for task in tasks])
    (line_break,) = encoded(["\n"])
    tokens = list(beginning(tokenizer))
    n_fixed = len(tokens) + sum(map(len, planted + asked)) + len(tasks) * len(line_break)
    if n_fixed > length:
        raise DocumentError(
            f"{len(tasks)} tasks need {n_fixed} tokens and length is {length}.",
            fix="plant fewer tasks, so ask fewer questions, or choose a greater length",
        )
    if not text.lines:
        raise DocumentError("The text has no lines.", fix="Give some text to fill the document with.")
    size = length - n_fixed
    filling = cut(take(text.tokens_from(rng.randrange(len(text.lines))), size), size)

    places = _places(tasks, rng, ask=ask, depth=depth)
    pieces = [(at, asked[index] + line_break if line is None else planted[line]) for at, index, line in places]
    questions: list[Question] = []
    lines: list[tuple[int, int]] = []
    planted_at: dict[int, int] = {}
    for (_, index, line), (start, end) in zip(places, weave(tokens, filling, pieces, share=1), strict=True):
        if line is not None:
            lines.append((start, end))
            planted_at.setdefault(index, start)
            continue
        task, answer_at = tasks[index], start + n_shared(prompts[index], asked[index])
        question = (task.kind, task.prompt, task.answer, planted_at[index], start, answer_at, end - len(line_break))
        questions.append(Question(*question))
    return Document(tuple(tokens), tuple(questions), tuple(lines))


def _places(
    tasks: Sequence[PlantedTask], rng: random.Random, *, ask: str, depth: tuple[float, float]
) -> list[tuple[float, int, int | None]]:
    """Choose where everything stands: depth in the filling, index of the task, and of the line, None for a question.

    A question follows all its lines. Depths above 1 come after all filling.
    """
    found: list[tuple[float, int, int | None]] = []
    n_lines = 0
    for index, task in enumerate(tasks):
        depths = sorted(rng.uniform(*depth) for _ in task.planted)
        found += [(at, index, line) for line, at in enumerate(depths, n_lines)]
        n_lines += len(task.planted)
        found.append((1 + rng.random() if ask == "end" else rng.uniform(depths[-1], 1), index, None))
    return sorted(found, key=lambda place: (place[0], place[2] is not None))


def draw_task(kind: Kind, text: TokenizedText, rng: random.Random, split: Split) -> PlantedTask:
    """Draw one task.

    Raises:
        DocumentError: There is no such kind, or the text has no line to copy.
    """
    if kind == "fact":
        key, value = _draw_key(rng, split), draw_number(rng, digits=5)
        prompt = rng.choice(FACT_PROMPTS).format(key=key)
        return PlantedTask(kind, (f"# {key} = {value}\n",), prompt, f" {value}")
    if kind == "chain":
        first, second, third = (_draw_key(rng, split) for _ in range(3))
        value = draw_number(rng, digits=5)
        planted = (f"# {first} = {value}\n", f"# {second} = {first}\n", f"# {third} = {second}\n")
        return PlantedTask(kind, planted, f"# follow {third} ->", f" {second} -> {first} -> {value}")
    if kind == "list":
        key = _draw_key(rng, split)
        items = ", ".join(draw_word(rng) for _ in range(rng.randint(3, 6)))
        return PlantedTask(kind, (f"# list {key}: {items}\n",), f"# items of {key} in order:", f" {items}")
    if kind == "note":
        key = _draw_key(rng, split)
        line = _draw_line(text, rng)
        return PlantedTask(kind, (f"# note {key}: {line}\n",), f"# copy note {key}:", f" {line}")
    raise DocumentError(f"The task {kind!r} is of an unknown kind.", fix=f"Use {', '.join(KINDS)}.")


def _draw_key(rng: random.Random, split: Split) -> str:
    """Draw a key such as `trano_vexi` of one split."""
    while True:
        key = f"{draw_word(rng)}_{draw_word(rng)}"
        if is_test_key(key) == (split == "test"):
            return key


def _draw_line(text: TokenizedText, rng: random.Random) -> str:
    """Draw a line of the text that is neither very short nor very long."""
    for _ in range(1000):
        line = rng.choice(text.lines).strip()
        if len(line) in _NOTE_CHARACTERS:
            return line
    raise DocumentError(
        "The task note can't be made: the text has no line of 10 to 48 characters to copy.",
        fix="Give other text, or leave this task out.",
    )
