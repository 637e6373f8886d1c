"""Where a drafted text is another than the dense one, and whether dense attention was stable there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from patchattn.evaluation import drafted
from patchattn.evaluation.answers import step, write
from patchattn.evaluation.drafted import gaps_and_moves, is_level
from patchattn.hf.drafting import generate_plainly
from patchattn.testing import tiny_model

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama").double()


def of_prompt(model: Any, tokens: Sequence[int]) -> Any:
    return step(model, tokens, None)[1]


def test_a_plain_generation_is_greedy_and_leaves_the_settings_of_the_model(model: Any) -> None:
    settings = model.generation_config
    settings.repetition_penalty, settings.max_new_tokens = 5.0, 3
    try:
        text = generate_plainly(model, PROMPT, None, 8)
        assert text == write(model, PROMPT, None, 8)[0]
        assert generate_plainly(model, PROMPT, of_prompt(model, PROMPT[:30]), 8) == text
        assert generate_plainly(model, PROMPT, None, 8, stop={text[4]}) == text[: text.index(text[4]) + 1]
        assert model.generation_config is settings
    finally:
        settings.repetition_penalty = settings.max_new_tokens = None


@pytest.mark.parametrize("known", [None, 10, 39])
def test_another_token_is_level_where_the_best_two_are(known: int | None, model: Any, monkeypatch: Any) -> None:
    dense = write(model, PROMPT, None, 6)[0]
    other = [*dense[:3], (dense[3] + 1) % 128, *dense[4:]]
    cache = None if known is None else of_prompt(model, PROMPT[:known])
    assert not is_level(model, PROMPT, cache, dense, other)
    if cache is not None:
        assert int(cache.get_seq_length()) == known
    gap = torch.tensor([5.0, 5.0, 5.0, 1e-7, 5.0])
    for most, level in ((2e-7, True), (0.5e-7, False)):
        moves = torch.tensor([0.0, most, 0.0, 0.0, 0.0])
        monkeypatch.setattr(drafted, "gaps_and_moves", lambda *_, moves=moves: (gap, moves))
        assert is_level(model, PROMPT, cache, dense, other) is level
    assert not is_level(model, PROMPT, cache, dense, dense[:4])


def test_gaps_are_those_of_the_two_best_and_hardly_move_in_double_precision(model: Any) -> None:
    text = write(model, PROMPT, None, 7)[0]
    logits = model(torch.tensor([PROMPT + text])).logits[0, len(PROMPT) - 1 : -1].detach()
    with torch.no_grad():
        given = of_prompt(model, PROMPT[:-1]), torch.tensor([PROMPT[-1:]]), torch.tensor(text)
        gaps, moves = gaps_and_moves(model, *given, logits, 3)
    best = logits.sort(descending=True).values
    torch.testing.assert_close(gaps, (best[:, 0] - best[:, 1]).float(), atol=1e-5, rtol=1e-5)
    assert moves.max() < 1e-5


def test_gaps_move_by_a_step_of_the_numbers_at_least() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    text = write(model, PROMPT, None, 7)[0]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([PROMPT + text[:at]])).logits[:, -1] for at in range(7)])
        given = of_prompt(model, PROMPT[:-1]), torch.tensor([PROMPT[-1:]]), torch.tensor(text)
        _, moves = gaps_and_moves(model, *given, logits, 3)
    best = logits.max(1).values
    steps = torch.nextafter(best, torch.full_like(best, torch.inf)).float() - best.float()
    assert (moves >= steps / 2).all()  # in batches the best logit may be just below a power of two
    assert (moves > 0).all()
