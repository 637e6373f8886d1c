"""The study of which heads swing: what it keeps of a document, and what its rows add up to."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

LAYERS, PER_LAYER, STRETCHES = 4, 3, 80
HEADS = LAYERS * PER_LAYER
GROWING, SWINGING, ANSWERING = (1, 3), (4, 6), (8, 11)
FILE = 100 + 32 * 50


@pytest.fixture
def swing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes" / "evaluate"))
    return importlib.import_module("studies.swing")


@pytest.fixture
def measuring(swing: Any) -> Any:
    return importlib.import_module("studies.swing.measuring")


def context_of(work: Path) -> Any:
    return importlib.import_module("context").Context(work, {"real_model": None})


def test_a_document_is_read_and_asked(measuring: Any, tmp_path: Path) -> None:
    row = measuring.measure(context_of(tmp_path), "shipped", 2048, 256, "fact", "0")
    stretches = np.array(row.stretches)
    assert row.begin == 16 + 256 + 127, "from the first full chunk of far keys on"
    assert stretches.shape == (30, (2048 - 320 - row.begin) // 32)
    assert np.array(row.questions).shape == (30, len(row.asked)) == (30, 40)
    for fractions in (row.context, row.following, row.questions, row.stretches):
        assert 0 <= np.min(fractions) < np.max(fractions) <= 1
    # The first 127 tokens with far keys open all heads.
    asked = 2048 - 320 - 16 - 256
    expected = (127 + 32 * stretches.sum(1)) / asked
    assert np.abs(expected - row.context).max() < 32 / asked


def test_the_keys_that_are_read_most(measuring: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 400, 8, generator=generator) for heads in (4, 2, 2))
    key[:, 0, 40:46] += 9
    query[:, :2] += 1
    value[:, 0, 40:46] /= 10
    inputs = AttentionInputs(query, key, value, Regions.plain(4, 16, 400, 1, 400, torch.device("cpu")), scale=1.0)
    share, values = measuring.top_keys(inputs)
    assert share[:2].min() > 0.9 > share[2:].max()
    assert values[:2].max() < 0.2 < 0.5 < values[2:].min()
    weights = torch.zeros(384)
    for at in range(400 - measuring.QUERIES, 400):
        weights[4 : at - 15] += (query[0, 3, at] @ key[0, 1, 4 : at - 15].T).softmax(-1) / measuring.QUERIES
    assert share[3] == pytest.approx(float(weights.topk(measuring.TOP).values.sum()))


def test_files_are_found_where_they_begin(measuring: Any) -> None:
    texts = ["x\n", "#", " file: a", ".py\n", "y # file: no\n# fi", "le: b.py\n"]
    assert measuring.files_of(texts) == {1: "a.py", 4: "b.py"}


def rows_of(measuring: Any, jobs: Any) -> list[Any]:
    """Two documents of each task, in which heads grow, swing and answer; the others are open for a tenth."""
    stretches = np.full((HEADS, STRETCHES), 0.1)
    stretches[GROWING, :] = np.linspace(0, 1, STRETCHES)
    stretches[SWINGING, 1::2] = 1.0
    stretches[:, 50:66] /= 2
    questions = np.full((HEADS, 5), 0.1)
    questions[ANSWERING, :] = [1.0, 1.0, 1.0, 1.0, 0.9]
    following = np.full(HEADS, 0.2)
    parts = {"context": stretches.mean(1).tolist(), "begin": 100, "stretches": stretches.tolist()}
    parts |= {
        "questions": questions.tolist(),
        "asked": [10, 10, 10, 10, 60],
        "following": following.tolist(),
        "followed": 100,
    }
    files = {"code": {40: "a.py", FILE: "b.py"}}
    return [measuring.Decided(*job, **parts, files=files.get(job[3], {})) for job in jobs]


@pytest.fixture
def measured(swing: Any, measuring: Any, tmp_path: Path) -> Any:
    context = context_of(tmp_path)
    swing.DECIDED.store(context).add(*rows_of(measuring, measuring.jobs(context)))
    top = measuring.TopKeys, measuring.top_jobs(context)
    swing.TOP_KEYS.store(context).add(*(top[0](*job, [0.75] * HEADS, [0.25] * HEADS) for job in top[1]))
    exact = np.random.default_rng(0).random((LAYERS, PER_LAYER)).tolist()
    exact[0][0] = 1.0
    asked = dict.fromkeys(("needles", "code", "chat"), exact)
    swing.RANKED.store(context).add(*(swing.Ranked(*place, exact, asked) for place in swing.SHOWN))
    return context


def test_heads_are_told_apart_by_what_opens_them(swing: Any, measured: Any) -> None:
    drawing = importlib.import_module("studies.swing.drawing")
    rows = [row for row in swing.DECIDED.rows(measured) if row.length == swing.SHOWN[0].length]
    heads = swing.of_heads(rows)
    assert {kind: sorted(pair) for kind, pair in drawing.kinds(heads, "code", PER_LAYER).items()} == {
        "once the text is long": [*GROWING],
        "in some passages": [*SWINGING],
        "to answer": [*ANSWERING],
    }
    assert heads["asked"][8] == pytest.approx((4 * 10 * 1 + 60 * 0.9) / 100), "every token counts alike"
    assert heads["swing"][4] == pytest.approx(0.45, abs=0.05)
    assert heads["swing"][1] < 0.2
    exact = swing.RANKED.done(measured)[swing.SHOWN[0]]
    gate, mass = swing.beside_exact(rows, exact)["code"]
    assert gate[8] == pytest.approx((94 + 20) / 200), "questions and text, by tokens"
    assert mass.tolist() == np.ravel(exact.context).tolist()
    stretches = np.mean(np.array(rows[0].stretches)[[4, 6]], axis=0)
    for found in swing.at_files([row for row in rows if row.task == "code"], [4, 6]):
        assert found == pytest.approx((stretches[34:50].mean(), stretches[50:66].mean()))
    assert swing.of_top_keys(swing.TOP_KEYS.rows(measured), mass > 0.99) == {"count": 1, "share": 0.75, "values": 0.25}


def test_the_page_counts_heads(swing: Any, measured: Any) -> None:
    page = swing.page(measured)
    assert f"of the {HEADS} heads" in page.markdown
    assert "2 heads that open for under 20% of the last quarter of Python" in page.markdown
    assert "(2 files)" in page.markdown
    (table,) = page.tables.values()
    assert len(table) == 2 * HEADS
    assert [table[8][name] for name in ("length", "layer", "head")] == [8192, 2, 2]
    assert {len(row) for row in table} == {5 + 6 * 4}
