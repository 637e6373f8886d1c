"""Facts in plain English, which any English model can be asked for: in a long text, and in a long chat."""

from __future__ import annotations

import random
from collections.abc import Callable

from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.facts import MOST_FACTS, draw_facts
from patchattn.evaluation.material import Material
from patchattn.evaluation.sample import Draft
from patchattn.evaluation.units import Units, cut, weave

_FACTS_PER_1024_TOKENS = 4
_FEWEST_FACTS = 4
_TOKENS_PER_TURN = 512
_UNBROKEN = 64

Turn = dict[str, str]
"""Who speaks, `role`, and what is said, `content`."""

# Two texts that no template changes, to find where passages go.
_FIRST, _NEXT = "(the first passage)", "(the next passage)"


def english(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw facts about people, four for every 1,024 tokens but at least four, planted in the text; one is asked for."""
    facts = draw_facts(rng, min(max(_FEWEST_FACTS, _FACTS_PER_1024_TOKENS * length // 1024), MOST_FACTS))
    asked = rng.choice(facts)
    return Draft(
        before="The text below says some things about people. You will be asked about one of them.\n\n",
        after=f"\nQuestion: {asked.question}\nAnswer: {asked.lead}",
        continuation=f" {asked.answer}",
        answers=(asked.answer,),
        haystack=material.lines(rng),
        planted=tuple(f"{fact.statement}\n" for fact in facts),
        exact=True,
    )


def chat(material: Material, length: int, rng: random.Random) -> Draft:
    """Draw a chat: the first turn says four facts, the turns after it bring passages of the text, the last one asks.

    It is written with the tokenizer's chat template, or with "User:" and "Assistant:" where it has none.
    """
    del length
    facts = draw_facts(rng, _FEWEST_FACTS)
    asked = rng.choice(facts)
    told = " ".join(fact.statement for fact in facts)
    turns = [
        ("user", f"Before we start, please remember what I say about some people, as I will ask for it later. {told}"),
        ("assistant", "I will remember it."),
        ("user", f"Here is a passage that I am reading:\n\n{_FIRST}"),
        ("assistant", "Thank you, I have read this passage."),
        ("user", f"Here is a passage that I am reading:\n\n{_NEXT}"),
        ("assistant", "Thank you, I have read this passage."),
        ("user", f"Now back to what I told you first. {asked.question}"),
    ]
    text = _written(material, [{"role": role, "content": content} for role, content in turns])
    before, _, rest = text.partition(_FIRST)
    between, _, after = rest.partition(_NEXT)
    return Draft(
        before=before,
        after=after + asked.lead,
        continuation=f" {asked.answer}",
        answers=(asked.answer,),
        haystack=_passages(material, between, rng),
        exact=True,
    )


def _written(material: Material, turns: list[Turn]) -> str:
    """Write a chat up to where the assistant answers, without what the tokenizer puts before any text."""
    tokenizer = material.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in turns) + "Assistant: "
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not 0 <= text.find(_FIRST) < text.find(_NEXT):
        raise DocumentError("The chat template leaves out what was said.", fix="Leave out the task chat.")
    return text.removeprefix(tokenizer.bos_token or "") if material.begin else text


def _passages(material: Material, between: str, rng: random.Random) -> Callable[[int], Units]:
    """Return a haystack of passages of about 512 tokens, with what stands between two of them."""
    (turn,) = material.encode([between])

    def haystack(size: int) -> Units:
        turns = max(0, size // (_TOKENS_PER_TURN + len(turn)))
        body = size - turns * len(turn)
        lines = cut(material.lines(rng)(body), body)
        pieces = [line[at : at + _UNBROKEN] for line in lines for at in range(0, len(line), _UNBROKEN)]
        tokens: list[int] = []
        weave(tokens, pieces, (((at + 1) / (turns + 1), turn) for at in range(turns)), share=0.5)
        return [tuple(tokens)]

    return haystack


TASKS = {"english": english, "chat": chat}
