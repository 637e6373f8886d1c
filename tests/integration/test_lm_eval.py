"""EleutherAI's lm-evaluation-harness runs on a patched model as on any other one.

A tiny model and a local task for each kind of request; batches of rows of unequal length, so that there is padding.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import patchattn
from patchattn import MomentGate, OpenGate, Policy
from patchattn.testing import tiny_model

# The extra `dev` brings lm_eval along, except for Python 3.10, where its dependencies have no such versions.
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="lm_eval is not installed with Python 3.10")

ROOT = Path(__file__).parents[2]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.json}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {do_sample: false, max_gen_toks: 8, until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What its dependencies say to each other is not ours to put right.
        import lm_eval
    return lm_eval


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character that a line of text may have; fits the tiny model's vocabulary."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "\n": 4}
    vocabulary |= {chr(code): code - 27 for code in range(32, 127)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=characters, **named)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    lines = [
        {"question": f"row {at} says {at * 37 % 100}, " * (3 + 2 * at), "choices": ["yes", "no", "so"], "gold": at % 3}
        for at in range(5)
    ]
    (tmp_path / "data.json").write_text("\n".join(json.dumps(line | {"answer": "so"}) for line in lines))
    for name, kind in (("local_generate", GENERATE), ("local_choose", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path) + kind)
    return tmp_path


def answers(lm_eval: ModuleType, model: Any, tokenizer: Any, tasks: Path) -> tuple[list[str], list[float]]:
    """Run both tasks; returns what was written, and the log-likelihoods of the choices."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=["local_generate", "local_choose"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert {"exact_match,none", "acc,none"} <= {name for result in found["results"].values() for name in result}
    written = [row["resps"][0][0] for row in found["samples"]["local_generate"]]
    likelihoods = [choice[0][0] for row in found["samples"]["local_choose"] for choice in row["resps"]]
    return written, likelihoods


def test_the_harness_sees_dense_results_through_open_gates_and_others_through_deciding_ones(
    lm_eval: ModuleType, tokenizer: Any, tasks: Path
) -> None:
    model = tiny_model("llama")
    written, likelihoods = answers(lm_eval, model, tokenizer, tasks)
    assert len(written) == 5
    assert len(likelihoods) == 15
    regions: dict[str, int] = {"sink_size": 4, "window_size": 16, "min_bulk": 0}

    with patchattn.patch(model, Policy(**regions, gate=OpenGate())) as handle:
        open_written, open_likelihoods = answers(lm_eval, model, tokenizer, tasks)
    assert open_written == written
    assert open_likelihoods == pytest.approx(likelihoods, abs=1e-3)
    for phase in ("prefill", "decode"):
        assert handle.report().open_fraction(phase) == 1.0

    with patchattn.patch(model, Policy(**regions, gate=MomentGate(threshold=0.1, estimate="saturating"))) as handle:
        _, gated_likelihoods = answers(lm_eval, model, tokenizer, tasks)
    assert gated_likelihoods != pytest.approx(likelihoods, abs=1e-2)
    for phase in ("prefill", "decode"):
        assert 0.01 < handle.report().open_fraction(phase) < 0.99
    assert not handle.report().dense_calls_by_reason()


@pytest.mark.usefixtures("lm_eval", "quick_demo")
def test_the_recipe_checks_its_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["06_lm_eval.py", "--length", "400", "--samples", "2"])
    runpy.run_path(str(ROOT / "recipes" / "06_lm_eval.py"), run_name="__main__")
    lines = capsys.readouterr().out
    for row in ("dense", "open", "moment", "closed"):
        assert f"{row:7} exact match" in lines


@pytest.mark.usefixtures("lm_eval")
def test_the_harness_runs_its_own_needles_offline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The shipped model can't answer them: a real model is asked in tests/real."""
    from wonderwords import random_word

    # Of pairs of all its words the harness makes a list of millions when it is imported.
    few = {kind: words[:50] for kind, words in random_word._DEFAULT_CATEGORIES.items()}
    monkeypatch.setattr(random_word, "_DEFAULT_CATEGORIES", few)
    (tmp_path / "mine.txt").write_text("This is a sentence of mine. This is another one! " * 400)
    recipe = str(ROOT / "recipes" / "09_lm_eval_needles.py")
    asked = ["--tasks", "niah_single_1,niah_single_2", "--length", "1024", "--samples", "1", "--most", "2"]
    monkeypatch.setattr(sys, "argv", [recipe, *asked, "--text", str(tmp_path / "mine.txt")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(recipe, run_name="__main__")
    printed = capsys.readouterr().out
    for task in ("niah_single_1", "niah_single_2"):
        assert re.search(rf"^{task}: dense \d\.000, default \d\.000, closed \d\.000$", printed, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [recipe, *asked])
    with pytest.raises(SystemExit, match="niah_single_2: needs --text"):
        runpy.run_path(recipe, run_name="__main__")
