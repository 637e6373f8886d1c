"""Facts about people in plain English, and questions about them that any English model can answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from patchattn.evaluation.words import draw_number


@dataclass(frozen=True)
class Fact:
    """Something that a text says of a person, once.

    Args:
        statement: The sentence that is planted.
        question: What is asked for later.
        lead: How the answer begins; what is asked for follows after one space.
        answer: A word or a number.
    """

    statement: str
    question: str
    lead: str
    answer: str


_NAMES = (
    *("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Maria"),
    *("Nathan", "Olivia", "Peter", "Quinn", "Rachel", "Samuel", "Tina", "Umar", "Vera", "Walter", "Xenia", "Yusuf"),
    *("Zoe", "Anton", "Bella", "Clara", "Derek", "Edith", "Felix", "Gloria", "Hugo", "Ivan", "Julia", "Kevin", "Laura"),
    *("Martin", "Nina", "Oscar", "Paula", "Robert", "Sarah", "Thomas", "Ursula", "Victor", "Wendy"),
)
_VALUES = {
    "fruit": "apple banana cherry grape lemon mango melon orange peach pear plum pineapple coconut strawberry",
    "city": "Paris London Berlin Madrid Rome Vienna Prague Warsaw Athens Cairo Tokyo Sydney Toronto Chicago Boston",
    "color": "red blue green yellow purple pink brown black white gray",
    "pet": "cat dog rabbit hamster parrot turtle snake lizard pony goat duck pig",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "instrument": "violin flute trumpet piano guitar harp cello oboe clarinet",
    "sport": "tennis boxing rowing golf judo fencing sailing hockey skiing archery",
    "language": "Spanish German Italian Russian Greek Arabic Japanese Korean Polish Turkish",
    "job": "baker nurse lawyer farmer painter plumber teacher butcher barber carpenter",
    "drink": "coffee tea milk cocoa juice water cider",
    "metal": "gold silver copper iron bronze brass platinum titanium",
    "flower": "rose tulip lily daisy sunflower violet poppy",
    "planet": "Mars Venus Jupiter Saturn Mercury Neptune Pluto Uranus",
    "vehicle": "train bus bicycle boat taxi tram helicopter motorcycle",
}
# What is said, what is asked, and how the answer begins. A value comes after the lead in the same words.
_PATTERNS = {
    "fruit": ("{name}'s favorite fruit is the {value}.", "What is {name}'s favorite fruit?"),
    "city": ("{name} was born in the city of {value}.", "In which city was {name} born?"),
    "color": ("{name} painted the kitchen {value}.", "What color did {name} paint the kitchen?"),
    "pet": ("{name} keeps a {value} as a pet.", "Which pet does {name} keep?"),
    "locker": ("The locker of {name} has the number {value}.", "What number does the locker of {name} have?"),
    "day": ("{name} goes swimming every {value}.", "On which day does {name} go swimming?"),
    "month": ("The wedding of {name} is in {value}.", "In which month is the wedding of {name}?"),
    "instrument": ("{name} plays the {value} in an orchestra.", "Which instrument does {name} play in an orchestra?"),
    "sport": ("{name} won a medal in {value}.", "In which sport did {name} win a medal?"),
    "language": ("{name} learned to speak {value} at school.", "Which language did {name} learn to speak at school?"),
    "job": ("{name} works as a {value}.", "What does {name} work as?"),
    "drink": ("For breakfast {name} drinks a cup of {value}.", "What does {name} drink for breakfast?"),
    "metal": ("The ring of {name} is made of {value}.", "What is the ring of {name} made of?"),
    "flower": ("{name} planted a {value} in the garden.", "What did {name} plant in the garden?"),
    "planet": ("{name} wrote a book about {value}.", "What did {name} write a book about?"),
    "vehicle": ("{name} travels to work by {value}.", "How does {name} travel to work?"),
}

MOST_FACTS = len(_NAMES)
"""How many facts of one text can be told apart: each is about another person."""


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draw facts about different people, of different kinds as far as there are any.

    Of one kind, no two have the same answer.

    Args:
        rng: Draws everything.
        count: Number of facts, at most `MOST_FACTS`.

    Example:
        >>> fact = draw_facts(random.Random(3), 1)[0]
        >>> (fact.lead + " " + fact.answer) in fact.statement
        True
    """
    names = rng.sample(_NAMES, count)
    kinds = [kind for _ in range(-(-count // len(_PATTERNS))) for kind in rng.sample(sorted(_PATTERNS), len(_PATTERNS))]
    taken: set[str] = set()
    return [_draw(rng, kind, name, taken) for kind, name in zip(kinds, names, strict=False)]


def _draw(rng: random.Random, kind: str, name: str, taken: set[str]) -> Fact:
    values = _VALUES[kind].split() if kind in _VALUES else [draw_number(rng, digits=4)]
    value = rng.choice([value for value in values if value not in taken])
    taken.add(value)
    statement, question = _PATTERNS[kind]
    lead, _, _ = statement.partition(" {value}")
    return Fact(statement.format(name=name, value=value), question.format(name=name), lead.format(name=name), value)
