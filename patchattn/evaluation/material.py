"""What tasks are made of: the user's text, a tokenizer, and lines to fill a prompt with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from patchattn.evaluation.documents import DocumentError, tokenize_text
from patchattn.evaluation.units import Units, take
from patchattn.hf.loading import beginning

# Five short sentences that say nothing, as RULER's noise does.
_NOISE = "The river is wide. The hill is steep. The road is long. On we walk. Then we turn around.\n"


class Material:
    """A text and a tokenizer, ready for tasks of any length.

    Args:
        text: Real text; its lines are haystack, and its tokens are what text loss is measured on.
        tokenizer: Any Hugging Face tokenizer.
        code: Source code, haystack of the task `code`; None takes the text.

    Raises:
        DocumentError: The text is empty, or has no tokens.
    """

    def __init__(self, text: str, tokenizer: Any, *, code: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._line_break = self._plain(["\n"])[0]
        self.begin = beginning(tokenizer)
        """What the tokenizer puts before a text: BOS for most, nothing for some."""
        self.source = f"{text}\n{code or ''}".lower()
        self.text = tokenize_text(text, tokenizer)
        self.code = self.text if code is None else tokenize_text(code, tokenizer)
        for what, found in (("text", self.text), ("code", self.code)):
            if not found.lines:
                raise DocumentError(
                    f"The {what} is empty, or the tokenizer makes no tokens of it.",
                    fix="Give some text to fill the prompts with, and the model's own tokenizer.",
                )
        self.n_tokens = sum(map(len, self.text.tokens))
        """Tokens in the text."""

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode(self, texts: Sequence[str]) -> Units:
        """Return the tokens of each text as they are after a line break, so that they can be put side by side.

        At the start of a text, some tokenizers put a space that is not there within it.
        """
        if not self._line_break:
            return [tuple(ids) for ids in self._plain(texts)]
        found, size = [], len(self._line_break)
        after_break = self._plain([f"\n{text}" for text in texts])
        for text, ids in zip(texts, after_break, strict=True):
            if ids[:size] == self._line_break:
                found.append(tuple(ids[size:]))
            else:  # The line break became one token with what follows.
                found.append(tuple(self._plain([text])[0]))
        return found

    def lines(self, rng: random.Random) -> Callable[[int], Units]:
        """Return a haystack of consecutive lines of the text, from a random one on; a short text is repeated."""
        return lambda size: take(self.text.tokens_from(rng.randrange(len(self.text.lines))), size)

    def noise(self) -> Callable[[int], Units]:
        """Return a haystack that repeats the same line."""
        (unit,) = self.encode([_NOISE])
        return lambda size: [unit] * -(-size // len(unit))

    def stream(self, draw: Callable[[], str]) -> Callable[[int], Units]:
        """Return a haystack of lines that are drawn one after the other."""

        def haystack(size: int) -> Units:
            units: Units = []
            while (missing := size - sum(map(len, units))) > 0:
                units += take(self.encode([draw() for _ in range(max(1, missing // 64))]), missing)
            return units

        return haystack

    def draw_new(self, draw: Callable[[], str], taken: set[str]) -> str:
        """Draw a string that is neither in the text nor part of what was drawn before, and add it to `taken`."""
        while True:
            found = draw()
            if found.lower() not in self.source and not any(found in other or other in found for other in taken):
                taken.add(found)
                return found

    def stretches(self, length: int, most: int) -> list[tuple[int, ...]]:
        """Cut the text into at most `most` stretches of `length` tokens that do not overlap, spread evenly.

        Raises:
            DocumentError: The text is shorter than one.
        """
        body = length - len(self.begin)
        count = min(most, self.n_tokens // body)
        if count < 1:
            raise DocumentError(
                f"The text has {self.n_tokens:,} tokens, too few to measure text loss at a length of {length:,}.",
                fix=f"Give a longer text, choose a length of at most {self.n_tokens}, or leave out the task text.",
            )
        tokens = [token for line in self.text.tokens for token in line]
        step = (self.n_tokens - body) // max(count - 1, 1)
        return [(*self.begin, *tokens[at * step : at * step + body]) for at in range(count)]
