"""What recipes/real_model.py fetched: a plain model that answers, and that patching leaves right."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchattn
from patchattn import demo
from patchattn.demo.compare import look
from patchattn.demo.questions import make_quiz
from patchattn.hf.loading import load_pretrained
from patchattn.testing import assert_within_budget

pytestmark = pytest.mark.real
LENGTH = 1000


@pytest.fixture(scope="module")
def ids(real_model: tuple[Any, Any]) -> Tensor:
    return real_model[1](demo.sample_text()[: 8 * LENGTH], return_tensors="pt").input_ids[:, :LENGTH]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def policy(**gate: Any) -> patchattn.Policy:
    return patchattn.Policy(window_size=256, min_bulk=0, **gate)


def test_the_folder_says_nothing_of_quantisation(real_folder: Path, real_model: tuple[Any, Any]) -> None:
    config = json.loads((real_folder / "config.json").read_text(encoding="utf-8"))
    assert not [name for name in config if "quant" in name]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 8192
    assert not getattr(real_model[0], "is_quantized", False)
    assert {weights.dtype for weights in real_model[0].parameters()} == {torch.float32}


def test_a_chat_is_written_as_the_model_was_taught(real_model: tuple[Any, Any]) -> None:
    _, tokenizer = real_model
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer(text).input_ids
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert tokens.count(tokenizer.eos_token_id) == 2


def test_a_digit_is_a_token(real_model: tuple[Any, Any]) -> None:
    _, tokenizer = real_model
    assert tokenizer.tokenize(" 42,\n\n    12") == ["Ġ", "4", "2", ",", "ĊĊĠĠĠĠ", "1", "2"]


@pytest.mark.parametrize(
    ("question", "answer"), [("What is the capital of France?", "Paris"), ("What is the opposite of hot?", "cold")]
)
def test_simple_questions_are_answered(question: str, answer: str, real_model: tuple[Any, Any]) -> None:
    model, tokenizer = real_model
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert answer in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


def test_all_its_layers_can_be_patched(real_model: tuple[Any, Any]) -> None:
    support = patchattn.check_support(real_model[0])
    assert isinstance(support, patchattn.Supported)
    assert len(support.layers) == 30


def test_open_gates_equal_the_stock_model(real_model: tuple[Any, Any], ids: Tensor) -> None:
    model, _ = real_model
    plain, truth = logits(model, ids), logits(copy.deepcopy(model).double(), ids)
    with patchattn.patch(model, policy(gate=patchattn.OpenGate())) as handle:
        got = logits(model, ids)
    assert_within_budget(got, plain, truth)
    report = handle.report()
    assert report.open_fraction("prefill") == 1.0
    assert not any(report.dense_calls.values())


def test_the_default_gate_opens_some_and_closes_some(real_model: tuple[Any, Any], ids: Tensor) -> None:
    model, _ = real_model
    with patchattn.patch(model, policy()) as handle:
        got = logits(model, ids)
    assert 0 < handle.report().open_fraction("prefill") < 1
    plain = logits(model, ids)
    assert not torch.equal(got, plain)
    assert (got.argmax(-1) == plain.argmax(-1)).double().mean() > 0.8


@pytest.mark.parametrize("has_template", [True, False])
def test_the_demo_asks_what_the_model_can_answer(has_template: bool, real_model: tuple[Any, Any]) -> None:
    model, tokenizer = real_model
    tokenizer = copy.copy(tokenizer)
    if not has_template:
        tokenizer.chat_template = None
    quiz = make_quiz(model, tokenizer, demo.default_text(model)[0], length=LENGTH, questions=8, seed=0)
    assert quiz.alone == has_template
    assert look(model, quiz, [], lambda weight: None).right >= 6


def test_heads_that_swing_are_found(
    real_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "08_which_heads_swing.py"
    options = ["--model", str(real_folder), "--length", "1024", "--window", "128", "--heads", "3"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [recipe.name, *options])
    runpy.run_path(str(recipe), run_name="__main__")
    printed = capsys.readouterr().out
    swings = [float(swing) for swing in re.findall(r"^\d+\.\d +[\d.]+% +([\d.]+)  ", printed, flags=re.MULTILINE)]
    assert len(swings) == 3
    assert swings == sorted(swings, reverse=True)
    assert swings[0] > 0.1
    assert int(re.search(r"(\d+) of 270 heads", printed)[1]) < 100
    assert (tmp_path / "swinging_heads.png").is_file()


def test_its_calibration_decides_for_each_head(real_folder: Path) -> None:
    folder = Path(__file__).parents[2] / "calibrations" / "smollm2-135m-instruct"
    model, tokenizer = load_pretrained(real_folder)
    ids = tokenizer(demo.prose()[:16000], return_tensors="pt").input_ids[:, :3000]  # beyond the window
    calibration = patchattn.Calibration.from_pretrained(folder)
    static = patchattn.StaticGate.from_calibration(calibration, heads=27)
    assert len(static.open_heads) == 27
    fractions = []
    for gate in (calibration.policy.gate, static):
        policy = calibration.policy.model_copy(update={"gate": gate, "min_bulk": 0})
        with patchattn.patch(model, policy, calibration=calibration) as handle, torch.no_grad():
            model(ids)
            fractions.append(handle.report().open_fraction("prefill"))
    assert 0.02 < fractions[0] < 0.98
    assert fractions[1] == pytest.approx(0.1)
    with patchattn.patch(model, calibration=str(folder)) as handle:
        assert handle.policy.window_size == calibration.manifest.window_size
