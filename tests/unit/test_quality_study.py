"""The study of quality on a real model: its documents, and what its rows add up to."""

from __future__ import annotations

import copy
import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import DynamicCache

from patchattn import ClosedGate, OpenGate, Policy, demo
from patchattn.evaluation.agreement import Agreement, Predictions
from patchattn.evaluation.cells import PhaseCounts
from patchattn.evaluation.documents import tokenize_text

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
LENGTH = 8000


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes" / "evaluate"))
    return lambda name: importlib.import_module(f"studies.quality.{name}")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes" / "calibrate"))
    return importlib.import_module("documents")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = copy.deepcopy(demo.load()[1])
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def source(tokenizer: Any) -> Any:
    return tokenize_text(demo.sample_text(), tokenizer)


@pytest.mark.parametrize("task", ["needles", "code", "chat", "fact", "chain", "list"])
def test_documents_hold_what_they_ask_for(study: Any, tokenizer: Any, source: Any, task: str) -> None:
    documents = study("documents")
    writer = documents.Writer(source, tokenizer)
    _, make = (documents.OF_REAL | documents.OF_SHIPPED)[task]
    one, same, other = (make(writer, LENGTH, random.Random(seed)) for seed in (0, 0, 1))
    assert one == same != other
    assert len(one.context) == LENGTH
    text = tokenizer.decode(list(one.context))
    for ids, at in one.questions:
        assert 0 < at < len(ids)
        answer = tokenizer.decode(list(ids[at:])).strip()
        assert all(word.strip(",") in text for word in answer.split())
        assert len(ids) < documents.APPENDED
    assert 0 < one.unpredicted < len(one.following) <= documents.APPENDED


def test_a_model_is_calibrated_on_documents_that_end_with_questions(study: Any, tokenizer: Any, recipe: Any) -> None:
    del study
    found = list(recipe.of_real(tokenizer, 4, [LENGTH, LENGTH // 2]))
    assert list(map(len, found)) == [LENGTH, LENGTH // 2] * 2
    prose, _, code, _ = (tokenizer.decode(list(ids)) for ids in found)
    assert prose.count("Question: ") == recipe.ASKED + 2
    assert code.count("\nassert ") >= recipe.ASKED
    assert list(recipe.of_real(tokenizer, 2, [LENGTH, LENGTH // 2])) == found[:2]
    facts = list(recipe.of_shipped(tokenizer, 1, [1024]))
    assert len(facts[0]) == 1024


def test_the_parts_of_a_chat_are_those_of_its_template(study: Any, tokenizer: Any) -> None:
    assert study("documents")._turns(tokenizer) == ("[user]", "[end]\n[assistant]", "[end]\n")


def _row(measuring: Any, task: str, family: str, hits: list[int], losses: list[float], kl: float = 0.0) -> Any:
    text = Agreement(4, 3, kl)
    nothing = PhaseCounts()
    counts = PhaseCounts(1, 4, 30, 100), PhaseCounts(2, 4, 60, 100)
    appended = (nothing, nothing) if family == "dense" else counts
    return measuring.Row("m", 64, 8, task, 0, family, "", hits, losses, Agreement(), text, *appended)


def test_gates_are_compared_with_dense_on_the_same_documents(study: Any) -> None:
    measuring, summary = study("measuring"), study("summary")
    rows = [
        _row(measuring, "a", "dense", [1, 1, 1, 1], [1.0, 1.0]),
        _row(measuring, "b", "dense", [1, 0], [2.0, 2.0]),
        _row(measuring, "b", "gate", [0, 0], [2.0, 3.0], kl=0.2),
        _row(measuring, "a", "gate", [1, 1, 1, 0], [1.0, 2.0], kl=0.6),
        _row(measuring, "a", "half measured", [1, 1, 1, 0], [1.0, 2.0]),
    ]
    dense, gate = summary.summaries(rows)
    assert (dense.family, gate.family) == ("dense", "gate")
    assert gate.points.value == pytest.approx((-25 - 50) / 2), "every task counts alike"
    assert gate.points.low <= gate.points.value <= gate.points.high
    assert gate.worst[0] == "b"
    assert gate.worst[1].value == pytest.approx(-50)
    assert gate.rise.value == pytest.approx(8 / 6 - 1)
    assert gate.kl.value == pytest.approx(0.1)
    assert gate.top1.value == pytest.approx(0.75)
    assert (gate.context.realised_density, gate.appended.realised_density) == (0.3, 0.6)
    assert gate.right("a") == 0.75


def test_gates_come_in_the_same_order_for_every_task(study: Any) -> None:
    cases = study("cases")
    heads = [(layer, head) for layer in range(2) for head in range(5)]
    rankings = cases.Rankings(heads, heads[::-1], {"a": heads, "b": heads[::-1]})
    of_a, of_b = (list(cases.cases(rankings, task, None)) for task in ("a", "b"))
    assert [case[:2] for case in of_a] == [case[:2] for case in of_b]
    assert len({case[:2] for case in of_a}) == len(of_a)
    for prices, expected in (
        (False, {"risk, each head", "budget"}),
        (True, {"price of the output", "static, by price"}),
    ):
        calibration = made_up_calibration(layers=2, query_heads=5, kv_heads=1, prices=prices)
        with_calibration = list(cases.cases(rankings, "a", calibration))
        assert {case.family for case in with_calibration} - {case.family for case in of_a} == expected
    assert {case.family for case in of_a if case.reads_densely} == {
        f"{kind}, {cases.DENSELY}" for kind in ("log-normal", "static")
    }
    found = {case[:2]: case.gate for case in of_a}
    assert found["static, other task", "30% of heads"].open_heads == tuple(sorted(heads[-3:])), "ranked on b"
    assert found["static, by mass", "30% of heads"].open_heads == tuple(heads[:3])


def test_presses_read_all_of_a_context_and_then_what_they_kept(study: Any) -> None:
    presses = study("presses")
    one = study("documents").Asked(tuple(range(100)), (((1, 2), 1), ((1, 2, 3), 2)), (7, 8, 9, 10), (), 1)
    counts = presses.counts_of(one, [100, 40, 10])
    assert counts["context"] == PhaseCounts(scored_keys=3 * 5050, causal_keys=3 * 5050)
    lengths = [2, 3, 4]
    scored = sum(kept + own + 1 for kept in (100, 40, 10) for length in lengths for own in range(length))
    causal = sum(100 + own + 1 for _ in range(3) for length in lengths for own in range(length))
    assert counts["appended"] == PhaseCounts(scored_keys=scored, causal_keys=causal)


@pytest.fixture
def kvpress(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of presses, and options that name a stand-in for the environment of kvpress."""
    presses = study("presses")
    one = study("documents").Asked((1, 2), (((3, 4), 1),), (5, 6), (), 1)
    monkeypatch.setattr(presses, "document", lambda *_: (None, one))
    monkeypatch.setattr(presses, "dense_predictions", lambda *_: None)
    row = _row(study("measuring"), "code", "SnapKV", [1], [0.5])
    printed = presses.Pressed("m", 64, "code", 0, presses.digest(one), [row])
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho a progress bar\necho '{json.dumps(printed, default=vars)}'\n")
    python.chmod(0o755)
    return presses, {"real_model": tmp_path, "families": [], "kvpress_python": python}


def test_rows_of_presses_come_from_their_own_environment(kvpress: Any, tmp_path: Path) -> None:
    presses, options = kvpress
    context = importlib.import_module("context").Context(tmp_path, options)
    found = presses.measure(context, "m", 64, "code", 0)
    assert (found.rows[0].family, found.rows[0].hits, found.rows[0].text) == ("SnapKV", [1], Agreement(4, 3, 0.0))


def test_rows_of_other_tokens_are_refused(kvpress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presses, options = kvpress
    other = presses.document()[1].__class__((1, 2), (((3, 9), 1),), (5, 6), (), 1)
    monkeypatch.setattr(presses, "document", lambda *_: (None, other))
    with pytest.raises(ValueError, match="reads other tokens"):
        presses.measure(importlib.import_module("context").Context(tmp_path, options), "m", 64, "code", 0)


def test_without_kvpress_its_kept_rows_are_shown_and_no_more_are_asked_for(kvpress: Any, tmp_path: Path) -> None:
    presses, options = kvpress
    kind = importlib.import_module("context").Context
    every = presses.jobs(kind(tmp_path, options))
    assert len(every) == 24
    context = kind(tmp_path, options | {"kvpress_python": None})
    assert presses.jobs(context) == []
    presses.PRESSED.store(context).add(presses.Pressed(*every[5], "", []))
    assert presses.jobs(context) == [every[5]]
    assert presses.jobs(kind(tmp_path, options | {"families": ["guarded"]})) == []
    assert presses.jobs(kind(tmp_path, options | {"families": ["SnapKV"]})) == every


def test_presses_have_nothing_that_opens(study: Any) -> None:
    package, presses, measuring = importlib.import_module("studies.quality"), study("presses"), study("measuring")
    place = measuring.PLACES[0]
    dense, row = (_row(measuring, "a", family, [1, 0], [1.0, 2.0]) for family in ("dense", "SnapKV"))
    read, kept = PhaseCounts(scored_keys=10, causal_keys=10), PhaseCounts(scored_keys=5, causal_keys=10)
    row.context, row.appended = read, kept
    for one in (dense, row):
        one.model, one.length, one.window = place
    table = package._table(place, study("summary").summaries([dense, row]))
    assert "| SnapKV |  |  | 100% / 50% |" in table
    assert "nan" not in table
    assert set(presses.PRESSES) < set(package.STYLES)


def test_a_context_that_is_read_densely_is_beside_the_gate(study: Any) -> None:
    """Open gates after it change nothing, closed ones do."""
    measuring, model = study("measuring"), demo.load()[0].float()
    rng = random.Random(0)
    tokens = tuple(rng.choices(range(100, 1000), k=700))
    one = study("documents").Asked(tokens[:600], ((tokens[600:610], 6),), tokens[610:], (), 1)
    cache = DynamicCache()
    measuring.predicted(model, one.context, cache)
    answers, text = (Predictions.of(logits) for logits, _ in measuring.appended(model, one, cache))
    dense = measuring.Dense([answers], text)

    def kl(gate: Any, *, densely: bool) -> float:
        policy = Policy(sink_size=4, window_size=64, min_bulk=0, gate=gate)
        how, more = (measuring.put_through_after, ()) if densely else (measuring.put_through, (None,))
        found = how(model, one, dense, policy, *more)
        assert found["context"].causal_keys == 30 * 600 * 601 // 2
        assert (found["context"].realised_density == 1) == densely
        assert found["appended"].asked_pairs
        return found["text"].kl

    assert kl(OpenGate(), densely=True) < 1e-6
    assert kl(ClosedGate(), densely=True) > 1e-3
    assert kl(ClosedGate(), densely=False) > 1e-3


def test_the_page_is_made_without_presses_and_says_so(study: Any, tmp_path: Path) -> None:
    package, measuring, presses = importlib.import_module("studies.quality"), study("measuring"), study("presses")
    options = {"real_model": tmp_path, "families": [], "kvpress_python": None}
    context = importlib.import_module("context").Context(tmp_path, options)
    grid = [[0.5, 0.25, 0.0] * 2] * 5
    for place in measuring.PLACES:
        asked = dict.fromkeys(measuring.TASKS[place.model], grid)
        measuring.RANKED.store(context).add(measuring.Ranked(*place, grid, asked))
    text, counts = Agreement(4, 3, 0.1), PhaseCounts(1, 4, 30, 100)
    for job in measuring.SCORED.jobs(context):
        row = measuring.Row(*job, [1, 0], [1.0, 2.0], text, text, counts, counts)
        measuring.SCORED.store(context).add(row)
    of_before = measuring.Row(*job[:5], "risk of before", "0.5", [1, 0], [1.0, 2.0], text, text, counts, counts)
    measuring.SCORED.store(context).add(of_before)
    found = package.page(context)
    assert "risk of before" not in found.markdown
    assert "Methods that shrink the cache" not in found.markdown
    assert "*Presses not measured yet:* SmolLM2-135M-Instruct, 8,192 tokens" in found.markdown
    assert "*Not measured yet:*" not in found.markdown
    chosen = context._replace(options=options | {"families": ["guarded"]})
    assert package.page(chosen).markdown == found.markdown, "all that was measured is shown"
    for model, length, task, index in presses.jobs(context._replace(options=options | {"kvpress_python": tmp_path})):
        window = next(place.window for place in measuring.WHOLE if place[:2] == (model, length))
        job = model, length, window, task, index
        names = [(name, f"50% {'of heads' if name == 'DuoAttention' else 'kept'}") for name in presses.PRESSES]
        rows = [measuring.Row(*job, *name, [1, 0], [1.0, 2.0], text, text, counts, counts) for name in names]
        presses.PRESSED.store(context).add(presses.Pressed(model, length, task, index, "", rows))
    assert "- **Methods that shrink the cache** read the document densely" in package.page(context).markdown
