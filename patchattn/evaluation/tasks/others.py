"""Tasks beyond RULER's: key-value pairs, a passage to repeat, and few-shot examples far away."""

from __future__ import annotations

import random

from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft
from patchattn.evaluation.words import draw_uuid, draw_word

_TOKENS_PER_LINE = 256
_LINES = (2, 64)
_WORDS_PER_LINE = 5
_SHOTS_PER_GROUP = 4
_GROUPS = {
    "animal": ("horse", "goat", "whale", "eagle", "spider", "rabbit", "tiger", "salmon", "donkey", "camel"),
    "tool": ("hammer", "saw", "drill", "wrench", "shovel", "chisel", "pliers", "rake", "screwdriver", "axe"),
    "colour": ("red", "yellow", "purple", "green", "brown", "white", "orange", "black", "pink", "blue"),
    "weather": ("rain", "snow", "fog", "thunder", "hail", "wind", "sunshine", "storm", "drizzle", "frost"),
}


def key_value(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw a task that asks for the value of one key in a JSON object of UUIDs.

    Source: "Lost in the Middle", arXiv 2307.03172, section 3. Instructions are worded anew.
    """
    del length
    taken: set[str] = set()
    key, value = (material.draw_new(lambda: draw_uuid(rng), taken) for _ in range(2))
    return Draft(
        before="The JSON object below maps keys to values. Find the value of one key.\n{\n",
        after=f'}}\nKey: "{key}"\nThe value of this key is: "',
        continuation=value,
        answers=(value,),
        haystack=material.stream(lambda: f'"{draw_uuid(rng)}": "{draw_uuid(rng)}",\n'),
        planted=(f'"{key}": "{value}",\n',),
    )


def long_copy(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw a passage of meaningless lines, one for every 256 tokens of length but at least 2 and at most 64, to repeat.

    The score is the share of the lines that are repeated without a mistake.
    """
    count = min(max(length // _TOKENS_PER_LINE, _LINES[0]), _LINES[1])
    lines = tuple(" ".join(draw_word(rng) for _ in range(_WORDS_PER_LINE)) for _ in range(count))
    passage = "".join(f"{line}\n" for line in lines)
    return Draft(
        before="Somewhere in the text below a passage stands between the words BEGIN and END. Remember it.\n",
        after="\nThe text is over. Repeat the passage between BEGIN and END, line by line.\nBEGIN\n",
        continuation=passage + "END",
        answers=lines,
        haystack=material.lines(rng),
        planted=(f"BEGIN\n{passage}END\n",),
    )


def few_shot(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw sixteen examples that sort words into four groups with made-up names, distracting text, and a new word.

    Source: the long few-shot prompts with distractors of arXiv 2502.09647, here with words to be sorted into groups in
    place of exercises from a data set.
    """
    del length
    taken: set[str] = set()
    names = {group: material.draw_new(lambda: draw_word(rng), taken) for group in _GROUPS}
    drawn = {group: rng.sample(words, _SHOTS_PER_GROUP + 1) for group, words in _GROUPS.items()}
    shots = [(word, names[group]) for group, words in drawn.items() for word in words[1:]]
    rng.shuffle(shots)
    group = rng.choice(list(_GROUPS))
    examples = "".join(f"Word: {word}\nGroup: {name}\n\n" for word, name in shots)
    return Draft(
        before=f"Each word belongs to one of four groups. Learn the groups from these examples.\n\n{examples}"
        "The text that follows has nothing to do with the groups.\n\n",
        after=f"\nThe text is over. To which of the four groups does this word belong?\n\n"
        f"Word: {drawn[group][0]}\nGroup:",
        continuation=f" {names[group]}",
        answers=(names[group],),
        haystack=material.lines(rng),
    )


TASKS = {"kv": key_value, "copy": long_copy, "few_shot": few_shot}
