"""Common words and frequent words: say which words of a long list occur most often.

Source: RULER, arXiv 2404.06654, appendix B, for the numbers and the distribution of the words. Words are pseudo-words,
and instructions are worded anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft
from patchattn.evaluation.units import Units
from patchattn.evaluation.words import draw_letters, draw_word

_COMMON = 10
_FEWEST_OTHERS = 10
_MANY_WORDS = 20_000
_LONG_FROM = 4096
_MAY_BE_CUT = 10
# The zeta distribution with exponent 2 gives rank k the share 1 / (k^2 zeta(2)).
_ZETA_2 = 1.6449340668482264
_TOKENS_PER_CODED_WORD = 50
_CODED_LETTERS = 6
_DOTS = " ..."


@dataclass(frozen=True)
class _Repeats:
    """How often common and other words occur in the list and in the example, and how many others the example has."""

    common: int
    other: int
    example_common: int
    example_other: int
    example_others: int


_LONG = _Repeats(30, 3, 10, 3, 30)
_SHORT = _Repeats(6, 1, 3, 1, 10)


def common_words(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw a numbered list in which ten words occur more often than the others, after a short one that is solved.

    They occur 30 times and the others 3 times. At lengths under 4,096 tokens, and where a tokenizer needs too many
    tokens for a word, they occur 6 times and the others once.
    """
    taken: set[str] = set()
    common = _draw_words(rng, _COMMON, taken, apart_from=[])
    repeats = _LONG if length >= _LONG_FROM and _fits(_LONG, common, material, length) else _SHORT
    example = _draw_words(rng, _COMMON, taken, apart_from=[])
    example_others = _draw_words(rng, repeats.example_others, taken, apart_from=example)
    example_list = _mixed(example * repeats.example_common, example_others * repeats.example_other, set(example), rng)
    others: list[str] = []
    known: dict[str, tuple[int, ...]] = {}

    def encoded(texts: list[str]) -> Units:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, material.encode(new), strict=True))
        return [known[text] for text in texts]

    def numbered(words: list[str]) -> Units:
        numbers = encoded([str(at + 1) for at in range(len(words))])
        return [number + word for number, word in zip(numbers, encoded([f". {word}\n" for word in words]), strict=True)]

    def cost(n_others: int) -> int:
        """Count the tokens of the list; draws what is new."""
        others.extend(_draw_words(rng, n_others - len(others), taken, apart_from=common))
        return sum(map(len, numbered(common * repeats.common + others[:n_others] * repeats.other)))

    def haystack(size: int) -> Units:
        if (fewest := cost(_FEWEST_OTHERS)) > size:
            raise _too_short("cwe", length + fewest - size)
        chosen = others[: _first(lambda count: cost(count) >= size, _FEWEST_OTHERS)]
        return numbered(_mixed(common * repeats.common, chosen * repeats.other, set(common), rng))

    before = "Below is a numbered list of words. Find out which of them occur most often.\n"
    after = f"Question: Which {_COMMON} words occur most often?\nAnswer: The {_COMMON} most common words are:"
    solved = "".join(f"{at + 1}. {word}\n" for at, word in enumerate(example_list)) + after + _in_a_row(example)
    return Draft(
        before=f"{before}{solved}\n\n{before}",
        after=after,
        continuation=_in_a_row(common),
        answers=tuple(common),
        haystack=haystack,
    )


def _fits(repeats: _Repeats, words: list[str], material: Material, length: int) -> bool:
    """Say whether list and example fit, judged by the tokens that some of the words need."""
    entries = _COMMON * (repeats.common + repeats.example_common) + repeats.example_others * repeats.example_other
    entries += _FEWEST_OTHERS * repeats.other
    per_entry = sum(map(len, material.encode([f"100. {word}\n" for word in words]))) / len(words)
    return 1.2 * entries * per_entry < length


def _draw_words(rng: random.Random, count: int, taken: set[str], *, apart_from: list[str]) -> list[str]:
    """Draw new words, none of which is part of another one of them, or has a word of `apart_from` in it."""
    found: list[str] = []
    while len(found) < count:
        word = draw_word(rng) if len(taken) < _MANY_WORDS else draw_word(rng) + draw_word(rng)
        if word in taken or any(other in word for other in apart_from):
            continue
        if not apart_from and any(other in word or word in other for other in found):
            continue
        taken.add(word)
        found.append(word)
    return found


def _mixed(common: list[str], others: list[str], chosen: set[str], rng: random.Random) -> list[str]:
    """Mix the repeated words; the first entries, which may be cut, are not of the common ones."""
    words = common + others
    rng.shuffle(words)
    for at in range(_MAY_BE_CUT):
        if words[at] in chosen:
            swap = next(later for later in reversed(range(len(words))) if words[later] not in chosen)
            words[at], words[swap] = words[swap], words[at]
    return words


def _in_a_row(words: list[str]) -> str:
    return "".join(f" {at + 1}. {word}" for at, word in enumerate(words))


def frequent_words(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw a text of coded words that occur as often as a zeta distribution with exponent 2 says.

    The most frequent one is dots, which stand for noise; the next three are asked for.
    """
    n_words = max(length // _TOKENS_PER_CODED_WORD, 5)
    drawn: dict[str, None] = {}
    while len(drawn) < n_words:
        drawn[draw_letters(rng, letters=_CODED_LETTERS)] = None
    words = list(drawn)
    ranked = [_DOTS, *(f" {word}" for word in words)]

    def haystack(size: int) -> Units:
        units = material.encode(ranked)

        def cost(total: int) -> int:
            return sum(times * len(unit) for times, unit in zip(_zeta_counts(total, len(units)), units, strict=True))

        counts = _zeta_counts(_first(lambda total: cost(total) > size, 1) - 1, len(units))
        if counts[3] == counts[4]:
            raise _too_short("fwe", 2 * length)
        text = [unit for unit, times in zip(units, counts, strict=True) for _ in range(times)]
        rng.shuffle(text)
        missing = size - sum(map(len, text))
        return [units[0]] * -(-missing // len(units[0])) + text

    return Draft(
        before="The text below is in code. Count how often each coded word occurs; dots are not words.\n",
        after="\nQuestion: Which three coded words occur most often in the text?\n"
        "Answer: The three most frequent coded words are:",
        continuation=" " + ", ".join(words[:3]),
        answers=tuple(words[:3]),
        haystack=haystack,
    )


def _zeta_counts(total: int, ranks: int) -> list[int]:
    return [int(total / (rank * rank * _ZETA_2)) for rank in range(1, ranks + 1)]


def _first(holds: Callable[[int], bool], low: int) -> int:
    """Find the smallest number from `low` on for which a condition holds that stays true once it is."""
    if holds(low):
        return low
    high = 2 * low
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _too_short(task: str, enough: int) -> DocumentError:
    return DocumentError(
        f"The task {task} needs more words than fit.",
        fix=f"Choose a length of {enough} tokens or more, or leave this task out.",
    )


TASKS = {"cwe": common_words, "fwe": frequent_words}
