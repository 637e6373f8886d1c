"""Tests of `patchattn.hf.context`: texts that are longer than a model reads are refused before anything runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import patchattn
from patchattn import CalibrationError, Policy, demo
from patchattn.demo.compare import compare
from patchattn.evaluation import evaluate
from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.loss import losses
from patchattn.evaluation.margins import record_margins
from patchattn.evaluation.policies import heads_by_oracle
from patchattn.hf.context import check_context, context_of
from patchattn.testing import assert_equivalent, tiny_model

POLICY = Policy(sink_size=4, window_size=32, min_bulk=0)


def test_the_context_of_a_model_may_be_nested_or_unknown() -> None:
    assert context_of(tiny_model("gemma3")) == 4096
    for limit in ({"max_position_embeddings": None}, {}):
        config = SimpleNamespace(**limit)
        config.get_text_config = lambda config=config, **_: config
        model = SimpleNamespace(config=config)
        assert context_of(model) is None
        check_context(model, [10**9], CalibrationError)
    check_context(tiny_model("gemma3"), [1, 4096], CalibrationError)
    with pytest.raises(CalibrationError, match=r"reads at most 4,096 tokens and a text was to have 4,097") as caught:
        check_context(tiny_model("gemma3"), [4097, 1], CalibrationError)
    assert "at most 4096" in caught.value.fix


def never(*_: Any, **__: Any) -> None:
    pytest.fail("the model was run")


TOO_LONG = {
    "calibrate": lambda model, tokenizer, text: patchattn.calibrate(model, tokenizer, [text], lengths=(300, 4097)),
    "compare": lambda model, tokenizer, text: compare(model, tokenizer, text, POLICY, length=4097),
    "evaluate": lambda model, tokenizer, text: evaluate(
        model, tokenizer, {"default": POLICY}, text=text, lengths=[300, 4097], tasks=["fact"]
    ),
    "heads_by_oracle": lambda model, *_: heads_by_oracle(model, [range(300), range(4097)], POLICY),
    "record_margins": lambda model, *_: record_margins(model, range(4097), windows=(32,)),
    "losses": lambda model, *_: losses(model, range(4097)),
    "assert_equivalent": lambda model, *_: assert_equivalent(model, POLICY, length=4096, new_tokens=1),
}


@pytest.mark.parametrize("what", list(TOO_LONG))
def test_lengths_beyond_the_context_are_refused(what: str) -> None:
    model, tokenizer = demo.load()
    model.register_forward_pre_hook(never, with_kwargs=True)
    model.base_model.register_forward_pre_hook(never, with_kwargs=True)
    with pytest.raises((DocumentError, CalibrationError, ValueError), match=r"4,?096 (tokens|positions)"):
        TOO_LONG[what](model, tokenizer, demo.sample_text()[:40000])
    assert not patchattn.is_patched(model)
