"""Pseudo-words and numbers: they can be drawn from a seed, and no model has seen what they stand for."""

from __future__ import annotations

import random
import string
import uuid

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "", "n", "r", "s", "l", "x")


def draw_word(rng: random.Random) -> str:
    """Draw a pseudo-word of two syllables, such as `tranos`."""
    syllables = (
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS if last else ("",)) for last in (False, True)
    )
    return "".join(syllables)


def draw_name(rng: random.Random) -> str:
    """Draw two pseudo-words with a hyphen, such as `tranos-veka`."""
    return f"{draw_word(rng)}-{draw_word(rng)}"


def draw_number(rng: random.Random, *, digits: int) -> str:
    """Draw a number of so many digits, the first of them not zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def draw_letters(rng: random.Random, *, letters: int) -> str:
    """Draw so many small letters."""
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(letters))


def draw_uuid(rng: random.Random) -> str:
    """Draw a UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
