import random

import pytest

from patchattn.evaluation.facts import MOST_FACTS, draw_facts


@pytest.mark.parametrize("count", [1, 16, 17, MOST_FACTS])
def test_facts_can_be_told_apart(count):
    facts = draw_facts(random.Random(count), count)
    assert len(facts) == count
    for field in ("statement", "question", "lead", "answer"):
        assert len({getattr(fact, field) for fact in facts}) == count


def test_an_answer_follows_its_lead_in_the_statement():
    for fact in draw_facts(random.Random(0), MOST_FACTS):
        assert f"{fact.lead} {fact.answer}" in fact.statement


def test_kinds_differ_as_far_as_there_are_any():
    facts = draw_facts(random.Random(1), 16)
    without_names = {fact.lead.replace(word, "") for fact in facts for word in fact.lead.split() if word.istitle()}
    assert len(without_names) >= 16


def test_the_same_seed_draws_the_same_facts():
    assert draw_facts(random.Random("a"), 5) == draw_facts(random.Random("a"), 5)
    assert draw_facts(random.Random("a"), 5) != draw_facts(random.Random("b"), 5)
