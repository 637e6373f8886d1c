"""`evaluate`: what it measures, keeps and says, on a tiny model; and the tables and policies that belong to it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, StaticGate, demo
from patchattn.errors import MissingPackageError, PatchStateError, PolicyError, ReportError, UnsupportedModelError
from patchattn.evaluation import (
    Cell,
    DocumentError,
    Drafts,
    Evaluation,
    Material,
    evaluate,
    loss,
    make_sample,
    named_policy,
    runner,
)
from patchattn.evaluation.agreement import Agreement
from patchattn.evaluation.answers import answered, stop_tokens, write
from patchattn.evaluation.cells import PhaseCounts
from patchattn.evaluation.loss import BINS, by_position, losses
from patchattn.evaluation.policies import heads_by_oracle
from patchattn.evaluation.results import csv_text, markdown
from patchattn.evaluation.rows import Store

TEXT = demo.sample_text()[:12_000]
REGIONS: dict[str, int] = {"sink_size": 4, "window_size": 32, "min_bulk": 0}
POLICIES = {"all open": Policy(**REGIONS, gate=OpenGate()), "closed": Policy(**REGIONS, gate=ClosedGate())}


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model, tokenizer = demo.load()
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def found(shipped: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    checkpoint = tmp_path_factory.mktemp("cells") / "cells.jsonl"
    return (
        evaluate(
            *shipped,
            POLICIES,
            text=TEXT,
            lengths=[400],
            tasks=["fact", "text", "cwe"],
            samples=3,
            checkpoint=checkpoint,
        ),
        checkpoint,
    )


def test_open_gates_are_dense_and_closed_gates_find_nothing(found: tuple[Evaluation, Path]) -> None:
    evaluation, _ = found
    dense, opened, closed = (evaluation.cell(policy, "fact", 400) for policy in evaluation.policies)
    assert dense.scores == opened.scores
    assert dense.score > closed.score
    dense, opened, closed = (evaluation.cell(policy, "text", 400) for policy in evaluation.policies)
    assert len(dense.losses) == 3
    assert all(len(parts) == BINS for parts in dense.losses)
    assert opened.loss == pytest.approx(dense.loss, abs=1e-4)
    assert closed.loss > dense.loss + 0.01
    for phase in ("prefill", "decode"):
        assert evaluation.counts("all open", 400, phase).open_fraction == 1
        assert evaluation.counts("closed", 400, phase).open_fraction == 0
        assert evaluation.counts("closed", 400, phase).realised_density < 0.6
        assert math.isnan(evaluation.counts("dense", 400, phase).open_fraction)


def test_open_gates_agree_with_dense_and_closed_ones_do_not(found: tuple[Evaluation, Path]) -> None:
    evaluation, _ = found
    dense, opened, closed = (evaluation.summary(policy, 400) for policy in evaluation.policies)
    assert dense.text is dense.answers is dense.drop is dense.worst_task is None
    # 256 places in each of three texts, all of which lie beyond the largest sink and window.
    assert [one.tokens for one in evaluation.cell("closed", "text", 400).agreements] == [256] * 3
    assert (opened.text.top1.value, opened.answers.top1.value) == pytest.approx((1, 1), abs=0.03)
    assert max(opened.text.kl.value, opened.answers.kl.value) < 2e-3
    assert closed.text.kl.low > 10 * opened.text.kl.high
    assert closed.answers.top1.value < 0.9
    assert (opened.drop.value, opened.worst_task) == (0, None)
    assert (closed.worst_task, closed.worst_drop.value) == ("fact", dense.mean_score)


def test_the_right_answer_is_predicted_as_in_one_reading(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    sample = make_sample("list", Material(TEXT, tokenizer), length=400, seed=3)
    assert len(sample.target) > 5
    score, logits, written = answered(model, tokenizer, sample)
    with torch.no_grad():
        whole = model(torch.tensor([[*sample.prompt, *sample.target]])).logits[0]
    torch.testing.assert_close(logits, whole[len(sample.prompt) - 1 : -1], atol=1e-3, rtol=1e-3)
    free, _ = write(model, sample.prompt, None, sample.budget)
    assert written == free[: len(written)]
    assert score == sample.score(free, tokenizer)


def test_places_lie_beyond_the_windows_that_leave_some() -> None:
    assert runner._places(1024, [80, 272, 1040]) == [272 + at * 751 // 256 for at in range(256)]
    assert runner._places(100, [90, 20]) == list(range(90, 99))
    assert runner._places(100, [1040]) == list(range(99))


def test_several_seeds_are_put_together(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"text": TEXT, "lengths": [300], "tasks": ["fact", "text"], "samples": 2}
    policies = {"closed": POLICIES["closed"]}
    one = [evaluate(*shipped, policies, seed=seed, **arguments) for seed in (4, 9)]
    both = evaluate(*shipped, policies, seed=(4, 9), checkpoint=tmp_path / "cells.jsonl", **arguments)
    assert both.seeds == (4, 9)
    for policy in both.policies:
        assert both.cell(policy, "fact", 300).scores == sum((it.cell(policy, "fact", 300).scores for it in one), ())
        assert both.cell(policy, "text", 300).losses == one[0].cell(policy, "text", 300).losses
        means = tuple(it.mean_score(policy, 300) for it in one)
        assert both.summary(policy, 300).mean_by_seed == means
        assert both.mean_score(policy, 300) == pytest.approx(sum(means) / 2)
    assert "| mean by seed |" in markdown(both)
    with (tmp_path / "cells.jsonl").open() as file:
        assert len(file.readlines()) == 2 * (2 + 1)


def test_a_new_policy_measures_dense_predictions_again_and_says_so(
    shipped: tuple[Any, Any], found: tuple[Evaluation, Path]
) -> None:
    evaluation, checkpoint = found
    told: set[str] = set()
    later = evaluate(
        *shipped,
        {"closed": POLICIES["closed"], "default": Policy(**REGIONS)},
        text=TEXT, lengths=[400], tasks=["fact"], samples=3, checkpoint=checkpoint,
        progress=lambda what, *_: told.add(what),
    )  # fmt: skip
    assert told == {
        f"{who}: fact, 400 tokens{more}" for who, more in [("dense", ", again"), ("closed", ""), ("default", "")]
    }
    assert later.cell("dense", "fact", 400) == evaluation.cell("dense", "fact", 400)
    assert 0 < later.summary("default", 400).answers.kl.value < evaluation.summary("closed", 400).answers.kl.value


def test_what_does_not_fit_is_left_out_and_said(found: tuple[Evaluation, Path]) -> None:
    evaluation, _ = found
    assert evaluation.cell("dense", "cwe", 400) is None
    assert any("Left out at 400 tokens: The task cwe" in note for note in evaluation.notes)
    assert "| cwe | - | - | - |" in markdown(evaluation)


def test_a_second_run_goes_on_from_the_cells_of_the_first(
    shipped: tuple[Any, Any], found: tuple[Evaluation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, checkpoint = found
    arguments: dict[str, Any] = {"text": TEXT, "lengths": [400], "samples": 3, "checkpoint": checkpoint}
    monkeypatch.setattr(runner, "answered", None)
    monkeypatch.setattr(runner, "losses_and_logits", None)
    again = evaluate(*shipped, POLICIES, tasks=["fact", "text", "cwe"], **arguments)
    assert again == evaluation
    # The same policy under another name is the same measurement; another seed is not.
    renamed = evaluate(*shipped, {"mine": POLICIES["closed"]}, tasks=["fact"], **arguments)
    assert renamed.cell("mine", "fact", 400).scores == evaluation.cell("closed", "fact", 400).scores
    with pytest.raises(TypeError):
        evaluate(*shipped, POLICIES, tasks=["fact"], **arguments, seed=1)
    with pytest.raises(TypeError):
        evaluate(*shipped, {"drafts": Drafts(policy=POLICIES["closed"])}, tasks=["fact"], **arguments)


def test_drafts_answer_as_dense_attention_does(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"text": TEXT, "lengths": [400], "tasks": ["list"], "samples": 2}
    policies = {"drafts": Drafts(policy=POLICIES["closed"]), "closed": POLICIES["closed"]}
    found = evaluate(*shipped, policies, checkpoint=tmp_path / "cells.jsonl", **arguments)
    dense, drafts, closed = (found.summary(name, 400) for name in found.policies)
    assert (drafts.same, drafts.texts, drafts.level) == (2, 2, 0)
    assert drafts.mean_score == dense.mean_score
    assert 0 <= drafts.kept < drafts.drafted
    assert drafts.answers.top1.value == 1
    assert math.isnan(drafts.counts["prefill"].open_fraction)
    assert drafts.counts["decode"].open_fraction == 0
    assert closed.same < 2
    text = markdown(found)
    assert f"| same text | - | 2/2 | {closed.same}/2 |" in text
    assert f"| drafts kept | - | {drafts.kept / drafts.drafted:.1%} | - |" in text
    assert "4 tokens each, all verified" in text
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [line["same_text"] for line in lines if line["policy"] == "drafts"] == ["1.00000"]
    assert not any("drafted" in note for note in found.notes)
    again = evaluate(*shipped, policies, checkpoint=tmp_path / "cells.jsonl", **arguments)
    assert again == found


def test_answers_too_short_or_too_near_to_draft_are_said(shipped: tuple[Any, Any]) -> None:
    wide = {"wide": Drafts(policy=Policy(window_size=1024, min_bulk=0))}
    found = evaluate(*shipped, wide, text=TEXT, lengths=[300], tasks=["fact"], samples=1)
    assert any(note.startswith("wide at 300 tokens: nothing was drafted") for note in found.notes)


def test_cells_survive_a_run_that_was_broken_off(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl", Cell)
    assert store.rows() == []
    cell = Cell(
        "a",
        "fact",
        9,
        3,
        (1.0, 0.5),
        agreements=(Agreement(1, 0, 0.5),),
        counts={"decode": PhaseCounts(1, 2, 3, 4)},
        key="k",
    )
    store.add(cell)
    with store.path.open("a") as file:
        file.write('{"policy": "b", "ta')
    assert store.rows() == [cell]
    store.add(dataclasses.replace(cell, key="l"))
    assert [found.key for found in store.rows()] == ["k", "l"]
    store.path.write_text("# Notes\n")
    with pytest.raises(ReportError, match="not a file of results"):
        store.rows()


def test_a_tokenizer_without_a_chat_template_is_said(shipped: tuple[Any, Any]) -> None:
    evaluation = evaluate(*shipped, {"closed": POLICIES["closed"]}, text=TEXT, lengths=[600], tasks=["chat"], samples=1)
    assert any("no chat template" in note for note in evaluation.notes)


def test_progress_ends_at_all_tokens(shipped: tuple[Any, Any]) -> None:
    told = []
    evaluate(
        *shipped,
        {"closed": POLICIES["closed"]},
        text=TEXT,
        lengths=[300],
        tasks=["fact"],
        samples=2,
        progress=lambda *what: told.append(what),
    )
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("closed: fact, 300 tokens", 1200, 1200)


def test_gates_that_are_never_asked_are_said(shipped: tuple[Any, Any]) -> None:
    policies = {"wide": Policy(window_size=1024, min_bulk=0), "late": Policy(**REGIONS | {"min_bulk": 5000})}
    evaluation = evaluate(*shipped, policies, text=TEXT, lengths=[300], tasks=["fact"], samples=1)
    assert any(note.startswith("wide at 300 tokens: no query had keys beyond sink 16") for note in evaluation.notes)
    assert any(note.startswith("late at 300 tokens: no query had 5000 keys beyond") for note in evaluation.notes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policies": {}}, PolicyError, "Expected policies by name"),
        ({"policies": {"dense": Policy()}}, PolicyError, "none of them 'dense'"),
        ({"lengths": []}, DocumentError, "lengths of at least 1"),
        ({"lengths": [0]}, DocumentError, "lengths of at least 1"),
        ({"samples": 0}, DocumentError, "0 samples"),
        ({"seed": ()}, DocumentError, "and a seed"),
        ({"code": ""}, DocumentError, "The code is empty"),
        ({"lengths": [5000]}, DocumentError, "at most 4,096 tokens"),
        ({"text": ""}, DocumentError, "text is empty"),
        ({"tasks": ["riddle"]}, DocumentError, "no task 'riddle'"),
        ({"tasks": []}, DocumentError, "No tasks were named"),
        ({"lengths": [40]}, DocumentError, "without any haystack"),
        ({"tasks": ["text"], "text": "a few words\n"}, DocumentError, "too few to measure text loss"),
        ({"policies": {"a": Policy(layers=(99,))}}, PolicyError, "layers"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    shipped: tuple[Any, Any],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "answered", None)
    arguments: dict[str, Any] = {"policies": POLICIES, "text": TEXT, "lengths": [400], "tasks": ["fact"]}
    with pytest.raises(error, match=message):
        evaluate(*shipped, **arguments | change)
    assert not patchattn.is_patched(shipped[0])


def test_patched_and_headless_models_are_refused(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    arguments: dict[str, Any] = {"text": TEXT, "lengths": [400]}
    with patchattn.patch(model), pytest.raises(PatchStateError, match="patched already"):
        evaluate(model, tokenizer, POLICIES, **arguments)
    with pytest.raises(UnsupportedModelError, match="no head to write with"):
        evaluate(AutoModel.from_config(model.config), tokenizer, POLICIES, **arguments)


def made_up(**fields: Any) -> Evaluation:
    counts: Any = {"counts": {"prefill": PhaseCounts(1, 4, 3, 4), "decode": PhaseCounts()}}
    cells = (
        Cell("dense", "fact", 64, 0, scores=(1.0, 0.5, 0.0)),
        Cell("dense", "text", 64, losses=((1.0, 3.0), (3.0, 1.0))),
        Cell("a|b", "fact", 64, 0, (0.0, 0.0, 0.0), agreements=(Agreement(4, 3, 0.8), Agreement(4, 1, 0.8)), **counts),
        Cell("a|b", "text", 64, losses=((1.0, 4.0), (2.0, 2.0)), agreements=(Agreement(256, 192, 2.56),), **counts),
    )
    policies = {"dense": None, "a|b": Policy()}
    return Evaluation(
        **{
            "model": "<b>*model*</b>",
            "tasks": ("fact", "text"),
            "lengths": (64,),
            "policies": policies,
            "backend": "blockwise",
            "samples": 3,
            "seeds": (0,),
            "cells": cells,
            "notes": ("a note with | and `code`",),
        }
        | fields
    )


def test_markdown_holds_the_numbers_and_escapes_the_texts() -> None:
    text = markdown(made_up())
    assert text.startswith("# Evaluation of \\<b\\>\\*model\\*\\</b\\>\n")
    assert "| fact | 0.50 (0.13-0.87) | 0.00 (0.00-0.56) |" in text
    assert "| drop of mean | - | 50.0 (" in text
    assert "| worst task | - | fact |" in text
    assert "| answer agreement | - | 50.0% (25.0-75.0) |" in text
    assert "| answer KL | - | 0.200 |" in text
    assert "| text loss | 2.0000 | 2.2500 |" in text
    assert "| loss change | - | +12.5% (0.0, 25.0) |" in text
    assert "| text agreement | - | 75.0% |" in text
    assert "| text KL | - | 0.010 |" in text
    assert "by seed" not in text
    assert "| open, prefill | - | 25.0% |" in text
    assert "| density, prefill | - | 75.0% |" in text
    assert "| open, decode | - | - |" in text
    assert "a note with \\| and \\`code\\`" in text
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {4}


def test_csv_and_json_hold_the_same_numbers(tmp_path: Path) -> None:
    evaluation = made_up()
    lines = list(csv.DictReader(io.StringIO(csv_text(evaluation))))
    assert [line["policy"] for line in lines] == ["dense", "dense", "a|b", "a|b"]
    assert lines[0]["score"] == "0.5000"
    assert (lines[0]["drop"], lines[2]["drop"], lines[2]["seed"], lines[3]["seed"]) == ("", "0.50000", "0", "")
    assert (lines[2]["agreement"], lines[2]["agreement_low"], lines[3]["kl"]) == ("0.50000", "0.25000", "0.01000")
    assert lines[3]["text_loss"] == "2.25000"
    assert lines[3]["loss_change"] == "0.12500"
    assert lines[3]["prefill_open_fraction"] == "0.25000"
    assert lines[3]["decode_open_fraction"] == ""
    paths = evaluation.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"evaluation.{kind}" for kind in ("md", "csv", "json", "png")]
    assert paths[3].read_bytes().startswith(b"\x89PNG")
    kept = json.loads(paths[2].read_text())
    assert kept["summary"][1]["mean_score"] == 0.0
    assert kept["summary"][0]["text_loss"] == 2.0
    assert kept["summary"][1]["decode_open_fraction"] is None
    assert kept["summary"][1]["worst_task"] == "fact"
    assert kept["summary"][1]["answers"]["top1"] == [0.5, 0.25, 0.75]
    assert kept["summary"][0]["text"] is None
    assert tuple(Cell.from_dict(cell) for cell in kept["cells"]) == evaluation.cells


def test_evaluations_of_text_only_and_of_tasks_only_are_drawn(tmp_path: Path) -> None:
    for tasks in (("fact",), ("text",)):
        path = made_up(tasks=tasks, model="costs $5 and $6").save(tmp_path)[3]
        assert path.stat().st_size > 5000
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="Can't make the folder"):
        made_up().save(tmp_path / "file")


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="need matplotlib"):
        made_up().save(tmp_path)


@pytest.mark.parametrize("most", [2**28, 1])
def test_loss_by_position_is_the_models_own(
    shipped: tuple[Any, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = shipped
    tokens = tokenizer(TEXT)["input_ids"][:600]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    each = functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    expected = [part.mean().item() for part in each.tensor_split(BINS)]
    monkeypatch.setattr(loss, "_MOST_LOGITS", most)  # the second time in calls of 256 tokens
    assert by_position(losses(model, tokens)) == pytest.approx(expected, abs=1e-4)


def test_writing_stops_after_a_stop_token(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    prompt = tokenizer(TEXT[:300])["input_ids"]
    free, _ = write(model, prompt, None, 6)
    assert len(free) == 6
    assert free == model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    stopped, _ = write(model, prompt, None, 6, stop={free[2]})
    assert stopped == free[: free.index(free[2]) + 1]


def test_stop_tokens_come_from_model_and_tokenizer() -> None:
    settings = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[5, 6]))
    assert stop_tokens(settings, SimpleNamespace(eos_token_id=7)) == {5, 6, 7}
    assert stop_tokens(SimpleNamespace(), SimpleNamespace(eos_token_id=None)) == set()


def test_named_policies(shipped: tuple[Any, Any]) -> None:
    base = Policy(**REGIONS)
    assert named_policy("dense", base) is None
    assert named_policy("default", base) == base
    assert named_policy("default:0.9", base) == Policy(**REGIONS, gate=MomentGate(threshold=0.9))
    lognormal = MomentGate(threshold=0.8, estimate="lognormal")
    assert named_policy("lognormal:0.8", base) == Policy(**REGIONS, gate=lognormal)
    assert named_policy("oracle:0.3", base) == Policy(**REGIONS, gate=OracleGate(threshold=0.3))
    assert named_policy("open", base) == POLICIES["all open"]
    assert named_policy("closed", base) == POLICIES["closed"]
    heads = [(1, 0), (0, 2), (0, 0), (1, 1)]
    static = named_policy("static:0.5", base, ranked_heads=lambda _: heads)
    assert static == Policy(**REGIONS, gate=StaticGate(open_heads=tuple(heads[:2])))
    by_task = {"kv": heads, None: heads[::-1]}.__getitem__
    transferred = named_policy("static-transfer:kv:0.5", base, ranked_heads=by_task)
    assert transferred == static
    assert named_policy("static-transfer:kv", base, ranked_heads=by_task).gate.open_heads == ((1, 0),)
    calibration: Any = SimpleNamespace(policy=Policy(window_size=7), heads_by_oracle=lambda: heads[::-1])
    assert named_policy("calibrated", base, calibration=calibration) == Policy(window_size=7)
    static = named_policy("static", base, calibration=calibration)
    assert static == Policy(**REGIONS, gate=StaticGate(open_heads=((1, 1),)))
    transferred = named_policy("static-transfer:kv", base, calibration=calibration, ranked_heads=by_task)
    assert transferred.gate.open_heads == ((1, 0),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "no policy 'best'"),
        ("open:0.5", "no policy 'open:0.5'"),
        ("default:much", "no number"),
        ("oracle:1.5", "no number"),
        ("calibrated", "needs a calibration"),
        ("static", "needs ranked heads"),
        ("static-transfer:kv", "needs ranked heads"),
        ("static-transfer", "names no task"),
        ("static-transfer:riddle", "names no task"),
        ("static-transfer:kv:2", "no number"),
    ],
)
def test_wrong_names_of_policies_are_refused(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        named_policy(name, Policy())


def test_heads_are_ranked_by_how_often_the_oracle_opens_them(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    prompt = tokenizer(TEXT)["input_ids"][:400]
    ranked = heads_by_oracle(model, [prompt], Policy(**REGIONS))
    assert sorted(ranked) == [(layer, head) for layer in range(5) for head in range(6)]
    with patchattn.patch(model, Policy(**REGIONS, gate=OracleGate(threshold=0.8))) as handle, torch.no_grad():
        model(torch.tensor([prompt]))
    fractions = handle.report().head_open_fractions("prefill")
    used = [fractions[layer][head] for layer, head in ranked]
    assert used == sorted(used, reverse=True)
    with pytest.raises(PolicyError, match="can't be ranked"):
        heads_by_oracle(model, [prompt[:20]], Policy(**REGIONS))
