"""The study of quality on a real model: its documents, and what its rows add up to."""

from __future__ import annotations

import copy
import importlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from patchattn import ClosedGate, MomentGate, OpenGate, Policy, demo
from patchattn.errors import ReportError
from patchattn.evaluation.agreement import Agreement, Predictions
from patchattn.evaluation.cells import PhaseCounts
from patchattn.evaluation.documents import tokenize_text
from patchattn.evaluation.rows import csv_text
from patchattn.testing.models import tiny_model

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
    lines = {one.family: one.columns() for one in (dense, gate)}
    assert (lines["dense"]["text_loss"], lines["gate"]["text_loss"]) == (pytest.approx(1.5), "")
    assert (lines["dense"]["points_value"], lines["gate"]["points_value"]) == ("", pytest.approx(-37.5))
    assert (lines["gate"]["agreement"], lines["gate"]["worst_task"]) == (pytest.approx(0.75), "b")


def test_gates_come_in_the_same_order_for_every_task(study: Any) -> None:
    cases = study("cases")
    heads = [(layer, head) for layer in range(2) for head in range(5)]
    rankings = cases.Rankings(heads, heads[::-1], {"a": heads, "b": heads[::-1]})
    of_a, of_b = (list(cases.cases(rankings, task, None)) for task in ("a", "b"))
    assert [case[:2] for case in of_a] == [case[:2] for case in of_b]
    assert len({case[:2] for case in of_a}) == len(of_a)
    in_decode = {cases.WHOLE_GROUPS, cases.HEADS_ALONE}
    for prices, expected in (
        (False, {"risk, each head", "budget"}),
        (True, {"price of the output", "static, by price", *in_decode}),
    ):
        calibration = made_up_calibration(layers=2, query_heads=5, kv_heads=1, prices=prices)
        with_calibration = list(cases.cases(rankings, "a", calibration))
        assert {case.family for case in with_calibration} - {case.family for case in of_a} == expected
        assert {case.family for case in with_calibration if case.in_decode} == expected & in_decode
        assert {case.family for case in with_calibration if case.whole_groups} == expected & {cases.WHOLE_GROUPS}
        before = list(cases.cases(None, "a", calibration))
        assert [case[:2] for case in before] == [case[:2] for case in with_calibration]
        ranked = {case.family for case in before if case.gate is None}
        assert ranked == {case.family for case in before if "static" in case.family} - {"static, by price"}
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
    return presses, {"real_model": tmp_path, "families": [], "again": False, "kvpress_python": python}


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
    row = _row(importlib.import_module("studies.quality.measuring"), "code", "SnapKV", [1], [0.5])
    presses.PRESSED.store(context).add(presses.Pressed(*every[5], "", [row]))
    assert presses.rows(context) == [row]
    assert presses.jobs(kind(tmp_path, options | {"families": ["guarded"]})) == []
    assert presses.jobs(kind(tmp_path, options | {"families": ["SnapKV"]})) == every


def _lines(study: Any, rows: list[Any]) -> list[Any]:
    table, found = study("table"), study("summary").summaries(rows)
    text = csv_text([one.columns() for one in found], **table.FORMATS)
    return [table.Line.of(columns) for columns in table.rows_of(text.splitlines())]


def test_presses_have_nothing_that_opens(study: Any) -> None:
    package, cases, measuring = importlib.import_module("studies.quality"), study("cases"), study("measuring")
    place = study("places").PLACES[0]
    read, kept = PhaseCounts(scored_keys=10, causal_keys=10), PhaseCounts(scored_keys=5, causal_keys=10)
    rows = []
    for task in study("places").TASKS[place.model]:
        dense, row = (_row(measuring, task, family, [1, 0], [1.0, 2.0]) for family in ("dense", "SnapKV"))
        row.context, row.appended = read, kept
        rows += [dense, row]
    for one in rows:
        one.model, one.length, one.window = place
    table = package._table(place, _lines(study, rows))
    assert "| dense |  |  |  | 0.50 |" in table
    assert "| SnapKV |  |  | 100% / 50% | 0.50 |" in table
    assert "nan" not in table
    assert set(cases.PRESSES) < set(package.STYLES)


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


def test_decode_predicts_what_prefill_does_and_opens_whole_groups(study: Any) -> None:
    measuring = study("measuring")
    model = tiny_model("llama").double().eval()
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    tokens = torch.randint(0, model.config.vocab_size, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    one = study("documents").Asked(tuple(tokens[:300]), ((tuple(tokens[300:310]), 6),), tuple(tokens[310:]), (), 1)
    cache = DynamicCache()
    measuring.predicted(model, one.context, cache)
    pairs = zip(measuring.appended(model, one, cache), measuring.in_decode(model, one, cache), strict=True)
    for (logits, tokens), (others, same) in pairs:
        torch.testing.assert_close(logits, others)
        assert tokens.tolist() == same.tolist()
    assert cache.get_seq_length() == 300
    dense = measuring.Dense([Predictions(torch.zeros(4, model.config.vocab_size))], Predictions(torch.zeros(89, 1)))
    dense = dense._replace(text=Predictions(torch.zeros(89, model.config.vocab_size)))
    found = {}
    for decoding, whole in ((False, True), (True, True), (True, False)):
        gate = MomentGate(threshold=0.1)
        policy = Policy(sink_size=4, window_size=16, min_bulk=0, gate=gate, whole_groups=whole)
        row = measuring.put_through(model, one, dense, policy, None, decoding=decoding)
        found[decoding, whole] = row["appended"]
    opened = {case: counts.open_fraction for case, counts in found.items()}
    assert 0 < opened[True, False] < opened[True, True] < 1
    # Queries that are read at once open by themselves.
    assert opened[False, True] == pytest.approx(opened[True, False], abs=0.01)
    whole, alone = found[True, True], found[True, False]
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    lengths = [*range(301, 310), *range(301, 390)]
    causal = heads * layers * sum(lengths)
    near = 20 / (sum(lengths) / len(lengths))
    for counts in found.values():
        assert abs(counts.causal_keys / causal - 1) < 0.03, "the last token of each is read, or not"
    # Of whole groups as much is read as is open, and heads alone have their keys read for all of the group.
    assert whole.realised_density == pytest.approx(near + (1 - near) * whole.open_fraction, abs=0.01)
    assert alone.realised_density > near + (1 - near) * alone.open_fraction + 0.02


def test_budgets_by_price_are_judged_in_decode_with_whole_groups_and_without(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, cases, lines = study("measuring"), study("cases"), study("lines")
    some = _row(measuring, "code", "gate", [1], [0.5])
    fields = {name: getattr(some, name) for name in ("hits", "losses", "answers", "text", "context", "appended")}
    found = {}

    def put_through(*given: Any, decoding: bool) -> dict[str, Any]:
        found[family] = given[3].whole_groups, decoding, given[3].gate.threshold.fraction, given[4]
        return fields

    for name, stand_in in (("document", (None, None)), ("dense_predictions", None)):
        monkeypatch.setattr(measuring, name, lambda *_, stand_in=stand_in: stand_in)
    monkeypatch.setattr(measuring, "put_through", put_through)
    options = {"real_model": tmp_path, "families": [], "again": False, "kvpress_python": None}
    context = importlib.import_module("context").Context(tmp_path, options)
    for family in (cases.WHOLE_GROUPS, cases.HEADS_ALONE, "price of the output"):
        row = measuring.measure(context, "SmolLM2-135M", 4096, 256, "code", 1, family, "22%")
        assert (row.family, row.document, row.hits) == (family, 1, [1])
    known = lines.calibration(256)
    assert found == {
        cases.WHOLE_GROUPS: (True, True, 0.22, known),
        cases.HEADS_ALONE: (False, True, 0.22, known),
        "price of the output": (False, False, 0.22, known),
    }


@pytest.fixture
def every_line(study: Any, tmp_path: Path) -> Any:
    """Return a context whose folder of rows has all gates, and no presses."""
    lines, places, measuring = study("lines"), study("places"), study("measuring")
    options = {"real_model": tmp_path, "families": [], "again": False, "kvpress_python": None}
    context = importlib.import_module("context").Context(tmp_path / "work", options)
    assert lines.places_to_rank(context) == places.PLACES
    store, rng = measuring.SCORED.store(context), random.Random(0)
    for job in lines.jobs_of_gates(context):
        hits, losses = rng.choices((0, 1), k=40), [rng.uniform(1, 3) for _ in range(8)]
        none, some = PhaseCounts(), PhaseCounts(rng.randrange(4), 4, rng.randrange(100), 100)
        close, counts = (
            (Agreement(), none) if job[5] == "dense" else (Agreement(7, rng.randrange(8), rng.random()), some)
        )
        store.add(measuring.Row(*job, hits, losses, close, close, counts, counts))
    return context


def test_the_page_is_made_without_presses_and_says_so(study: Any, every_line: Any, tmp_path: Path) -> None:
    package, measuring, presses = importlib.import_module("studies.quality"), study("measuring"), study("presses")
    context, options = every_line, every_line.options
    row = measuring.SCORED.rows(context)[-1]
    measuring.SCORED.store(context).add(replace(row, family="risk of before", setting="0.5"))
    found = package.page(context)
    assert "risk of before" not in found.markdown
    assert "Methods that shrink the cache" not in found.markdown
    assert "*Presses not measured yet:* SmolLM2-135M-Instruct, 8,192 tokens" in found.markdown
    assert "*Not measured yet:*" not in found.markdown
    chosen = context._replace(options=options | {"families": ["guarded"]})
    assert package.page(chosen).markdown == found.markdown, "all that was measured is shown"
    for model, length, task, index in presses.jobs(context._replace(options=options | {"kvpress_python": tmp_path})):
        window = next(place.window for place in study("places").WHOLE if place[:2] == (model, length))
        job = model, length, window, task, index
        rows = [
            replace(row, **dict(zip(measuring.KEY, (*job, *name), strict=True))) for name in study("cases").presses()
        ]
        presses.PRESSED.store(context).add(presses.Pressed(model, length, task, index, "", rows))
    assert "- **Methods that shrink the cache** read the document densely" in package.page(context).markdown


def _write(run: Any, page: Any, folder: Path) -> list[str]:
    run.write(page, "quality", folder, folder)
    return (folder / "quality.csv").read_text(encoding="utf-8").splitlines(keepends=True)


def test_a_page_of_the_table_alone_is_the_same(study: Any, every_line: Any, tmp_path: Path) -> None:
    """Nothing is measured that the table has, and without its rows page and table come out as they were."""
    package, run = importlib.import_module("studies.quality"), importlib.import_module("run")
    lines = study("lines")
    kept = every_line._replace(work=tmp_path / "nothing", tables=[tmp_path / "no table", tmp_path / "table"])
    found = package.page(every_line)
    text = _write(run, found, tmp_path / "table")
    assert found.note == f"0 of {len(text) - 1} lines are those of the table before."
    assert (lines.missing(kept), lines.places_to_rank(kept)) == ([], [])
    again = package.page(kept)
    assert again.note == f"{len(text) - 1} of {len(text) - 1} lines are those of the table before."
    assert again.markdown == found.markdown
    assert _write(run, again, tmp_path / "second") == text


def test_what_is_neither_measured_nor_in_the_table_is_measured_with_what_it_needs(
    study: Any, every_line: Any, tmp_path: Path
) -> None:
    package, run = importlib.import_module("studies.quality"), importlib.import_module("run")
    lines, measuring, table = study("lines"), study("measuring"), study("table")
    kept = every_line._replace(work=tmp_path / "nothing", tables=[tmp_path])
    text = _write(run, package.page(every_line), tmp_path)
    place, other = study("places").PLACES[2], study("places").PLACES[0]
    gone = (place, "static, by price", "30% of heads")
    deleted = [line for line in text if ",".join(map(str, place)) not in line or 'by price",30%' not in line]
    assert len(deleted) == len(text) - 1
    (tmp_path / "quality.csv").write_text("".join(deleted), encoding="utf-8")
    assert lines.missing(kept) == [(place, *table.DENSE), gone]
    assert lines.places_to_rank(kept) == [], "its heads are those of the calibration"
    said = "*Not measured yet:* SmolLM2-135M-Instruct, 4,096 tokens, window 256: static, by price 30% of heads."
    assert said in package.page(kept).markdown
    jobs = lines.jobs_of_gates(kept)
    assert [job[5] for job in jobs] == ["dense"] * 6 + ["static, by price"] * 6
    rows = measuring.SCORED.done(every_line)
    measuring.SCORED.store(kept).add(*(rows[job] for job in jobs[:-1]))
    assert "*Not measured yet:*" in package.page(kept).markdown, "one document is missing"
    measuring.SCORED.store(kept).add(rows[jobs[-1]])
    found = package.page(kept)
    assert found.note == f"{len(text) - 3} of {len(text) - 1} lines are those of the table before."
    assert _write(run, found, tmp_path / "again") == text

    def options(**more: Any) -> Any:
        return kept._replace(options=kept.options | more)

    guarded = {(*one.place, one.family) for one in table_lines(table, tmp_path) if one.family == "guarded"}
    chosen = lines.missing(options(families=["guarded"], again=True))
    assert {(*key[0], key[1]) for key in chosen if key[1] != "dense"} == guarded
    assert {key[0] for key in chosen if key[1] == "dense"} == {key[0] for key in chosen}
    (tmp_path / "quality.csv").write_text(
        "".join(line for line in text if ",all closed," not in line), encoding="utf-8"
    )
    assert {key[1] for key in lines.missing(options())} == {"dense", "all closed"}
    ranked = options(families=["static, answering"], again=True)
    assert other in lines.places_to_rank(ranked)
    pressed = lines.missing(options(families=["SnapKV"], kvpress_python=tmp_path))
    assert {key[0] for key in pressed if key[1] == "dense"} == set(study("places").WHOLE), "presses are beside it"


def table_lines(table: Any, folder: Path) -> list[Any]:
    with (folder / "quality.csv").open(newline="", encoding="utf-8") as file:
        return [table.Line.of(columns) for columns in table.rows_of(file)]


def test_a_table_of_other_columns_is_refused(study: Any, every_line: Any, tmp_path: Path) -> None:
    (tmp_path / "quality.csv").write_text("model,length\nm,8\n", encoding="utf-8")
    with pytest.raises(ReportError, match="Expected a table with the columns model, length"):
        study("lines").missing(every_line._replace(tables=[tmp_path]))
