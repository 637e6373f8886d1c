"""Tests of `patchattn.report`: what is counted, drawn, saved and refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import patchattn
from patchattn.errors import CalibrationMismatchError, MissingPackageError, ReportError
from patchattn.policy import Policy
from patchattn.report import DraftCounts, GateReport, HeadShape, LayerCounts
from patchattn.report.timeline import Stretches, Timeline, texts_of
from patchattn.testing import tiny_model

SHAPE = HeadShape(dim=32, value_dim=16, group_size=2, bytes_per_number=2, dtype="bfloat16")
NOTHING = LayerCounts((0, 0), 0, 0, 0, 0, 0)
CALIBRATION = Path(patchattn.__file__).parents[1] / "calibrations" / "patchattn-demo"
# Two layers of two heads; six tokens read in prefill, two in decode; the second sequence never opens.
PREFILL = [[[0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1]], [[0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]]
DECODE = [[[[1], [0]], [[0], [0]]], [[[0], [0]], [[1], [1]]]]


def calls(layer: int) -> list[tuple[str, torch.Tensor]]:
    def both_rows(opened: list[list[int]]) -> torch.Tensor:
        one = torch.tensor(opened, dtype=torch.bool)
        return torch.stack([one, torch.zeros_like(one)])

    return [("prefill", both_rows(PREFILL[layer])), *(("decode", both_rows(step[layer])) for step in DECODE)]


REPORT = GateReport(
    policy=Policy(sink_size=1, window_size=1, min_bulk=0, layers=(0, 3)),
    backend="blockwise",
    layers={
        0: {"prefill": LayerCounts((3, 1), 8, 2, 60, 100, 1), "decode": LayerCounts((1, 0), 4, 0, 30, 40, 2)},
        3: {"prefill": LayerCounts((0, 1), 8, 2, 40, 100, 1), "decode": LayerCounts((1, 1), 4, 0, 40, 40, 2)},
    },
    dense_calls={0: {"short": 2}, 1: {"layer": 5}, 3: {"short": 1}},
    timeline={0: calls(0), 3: calls(1)},
    shapes={0: SHAPE, 1: SHAPE, 3: SHAPE},
)
TEXTS = ["a", " b", "\n", " c", "d", " e", " f", " g"]
EMPTY = GateReport(Policy(), "blockwise", {0: {"prefill": NOTHING, "decode": NOTHING}}, {0: {}}, {0: []})


def data_of(page: str) -> dict:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_dictionary_has_every_count_by_phase_layer_and_head(tmp_path: Path) -> None:
    found = json.loads(REPORT.save_json(tmp_path / "report.json").read_text())
    assert found == REPORT.to_dict()
    prefill, decode = found["phases"]["prefill"], found["phases"]["decode"]
    assert prefill["open_fraction"] == 5 / 32
    assert decode["realised_density"] == 70 / 80
    assert prefill["below_break_even_queries"] == 4
    assert prefill["layers"]["3"] == {
        "open_pairs": [0, 1],
        "asked_queries": 8,
        "below_break_even_queries": 2,
        "scored_keys": 40,
        "causal_keys": 100,
        "realised_density": 0.4,
        "gated_calls": 1,
    }
    assert decode["heads"] == {"0": [0.25, 0.0], "3": [0.25, 0.25]}
    assert REPORT.dense_calls_by_reason() == {"short": 3, "layer": 5}
    assert REPORT.to_dict()["dense_calls"]["1"] == {"layer": 5}


def test_savings_follow_from_the_keys() -> None:
    decode = REPORT.savings("decode")
    assert (decode.dense_flops, decode.flops) == (2 * 48 * 80, 2 * 48 * 70)
    # Two bytes each; the two heads of a group share what is read.
    assert (decode.dense_bytes, decode.bytes_saved) == (2 * 48 * 80 // 2, 2 * 48 * 10 // 2)
    assert REPORT.savings("prefill").bytes == 60 * 48 * 2 // 256 + 40 * 48 * 2 // 256
    assert REPORT.savings().flops_saved == 2 * 48 * (280 - 170)
    assert vars(decode) == REPORT.to_dict()["phases"]["decode"]["estimated_attention"]


def test_savings_without_known_sizes_are_refused() -> None:
    unknown = dataclasses.replace(REPORT, shapes={})
    assert unknown.to_dict()["phases"]["decode"]["estimated_attention"] is None
    with pytest.raises(ReportError, match="sizes of the heads of layer 0"):
        unknown.savings()
    assert unknown.savings(shape=SHAPE) == REPORT.savings()


def test_timeline_joins_calls_and_keeps_the_heads_asked_for() -> None:
    timeline = REPORT.timeline_of()
    assert timeline.heads == ((0, 0), (0, 1), (3, 0), (3, 1))
    assert timeline.phases == ("prefill",) * 6 + ("decode",) * 2
    assert timeline.open[0].tolist() == [False, False, True, True, False, True, True, False]
    assert timeline.open_heads(2) == [(0, 0), (3, 1)]
    assert timeline.open_heads(7) == [(3, 0), (3, 1)]
    assert not REPORT.timeline_of(row=1).open.any()
    two = REPORT.timeline_of([(3, 1), (0, 0)])
    assert torch.equal(two.open, timeline.open[[3, 0]])


def test_stretches_begin_where_heads_part() -> None:
    opened = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1, 1, 1, 1, 0]]).bool()
    begin, stretches = Timeline(((0, 0), (0, 1)), ("prefill",) * 10, opened).stretches(2)
    assert begin == 3, "after tokens that nobody and that everybody opened"
    assert stretches.tolist() == [[1, 0, 0.5], [0, 1, 1]], "the last token fills no stretch"
    with pytest.raises(ReportError, match="Of 10 tokens no 2 follow"):
        Timeline(((0, 0),), ("prefill",) * 10, opened[:1]).stretches(2)


def test_a_head_that_opens_more_and_more_does_not_swing() -> None:
    grows, swings = torch.linspace(0, 1, 200), torch.arange(200) % 2
    found = Stretches(0, torch.stack([grows, swings, torch.ones(200)])).swing
    assert found[0] < 0.02 < 0.25 < grows.std()
    assert found[1] == pytest.approx(0.5, abs=0.02)
    assert found[2] == 0


@pytest.mark.parametrize(
    ("report", "options", "message"),
    [
        (EMPTY, {}, "No timeline was recorded"),
        (REPORT, {"row": 2}, "Row 2 is not in every recorded call: the smallest batch has 2 rows"),
        (REPORT, {"row": -1}, "Row -1"),
        (REPORT, {"heads": [(0, 0), (1, 0)]}, r"no heads \[\(1, 0\)\]"),
        (REPORT, {"heads": []}, "No heads were chosen"),
        (dataclasses.replace(REPORT, timeline={0: calls(0), 3: calls(1)[:2]}), {}, "Layer 0 recorded 3 gated calls"),
    ],
)
def test_timelines_that_can_not_be_are_refused(report: GateReport, options: dict, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        report.timeline_of(**options)


def test_pictures_are_saved(tmp_path: Path) -> None:
    heads = REPORT.plot(tmp_path / "heads.png", phase="decode")
    timeline = REPORT.plot_timeline(tmp_path / "timeline.svg", heads=[(0, 0), (3, 1)])
    assert heads.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in timeline.read_text()


def test_a_run_of_dense_calls_only_still_draws(tmp_path: Path) -> None:
    dense = dataclasses.replace(EMPTY, dense_calls={0: {"short": 3}})
    dense.plot(tmp_path / "heads.png")
    found = data_of(dense.to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found["dense"] == [["short", 3]]
    assert found["timeline"] is None


WAYS = {
    "plot": lambda report, path, **options: report.plot(path.with_suffix(".png"), **options),
    "plot_timeline": lambda report, path, **options: report.plot_timeline(path.with_suffix(".png"), **options),
    "to_html": lambda report, path, **options: report.to_html(path.with_suffix(".html"), **options),
    "save_json": lambda report, path, **options: report.save_json(path.with_suffix(".json"), **options),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_missing_folder_and_folder_are_refused(way, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="does not exist"):
        way(REPORT, tmp_path / "missing" / "file")
    for suffix in (".png", ".html", ".json"):
        (tmp_path / f"taken{suffix}").mkdir()
    with pytest.raises(ReportError, match="is a folder"):
        way(REPORT, tmp_path / "taken")


@pytest.mark.parametrize("name", ["plot", "to_html"])
def test_reports_with_nothing_in_them_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="did not run"):
        WAYS[name](EMPTY, tmp_path / "file")
    ran = {0: {"prefill": dataclasses.replace(NOTHING, gated_calls=1), "decode": NOTHING}}
    with pytest.raises(ReportError, match="Nothing was counted"):
        WAYS[name](dataclasses.replace(EMPTY, layers=ran), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"Can't save a picture as 'heads\.txt'"):
        REPORT.plot(tmp_path / "heads.txt")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_pictures_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("plot", "plot_timeline"):
        with pytest.raises(MissingPackageError, match=r"patchattn\[plot\]"):
            WAYS[name](REPORT, tmp_path / "file")
    REPORT.to_html(tmp_path / "report.html", tokens=TEXTS)


def test_page_holds_the_numbers_and_the_decisions(tmp_path: Path) -> None:
    path = REPORT.to_html(tmp_path / "report.html", tokens=[*TEXTS, " never read"], title="A & B")
    page = path.read_text(encoding="utf-8")
    found = data_of(page)
    assert "<title>A &amp; B</title>" in page
    assert found["layers"] == [[0, 2], [3, 2]]
    assert found["views"]["both"]["open"] == [[4, 1], [1, 2]]
    assert found["views"]["prefill"]["below"] == [2, 2]
    assert found["views"]["decode"]["savings"] == vars(REPORT.savings("decode"))
    assert found["policy"] == REPORT.policy.model_dump(mode="json")
    timeline = found["timeline"]
    assert timeline["phases"] == [["prefill", 6], ["decode", 2]]
    assert timeline["texts"] == TEXTS
    bits = base64.b64decode(timeline["bits"])
    opened = REPORT.timeline_of()
    assert [[byte >> head & 1 for head in range(4)] for byte in bits] == opened.open.T.int().tolist()


def test_bits_of_more_heads_than_a_byte_holds(tmp_path: Path) -> None:
    wide = torch.randint(0, 2, (1, 11, 5), generator=torch.Generator().manual_seed(0)).bool()
    counts = LayerCounts((1,) * 11, 5, 0, 10, 20, 1)
    layers = {0: {"prefill": counts, "decode": dataclasses.replace(counts, gated_calls=0)}}
    report = GateReport(Policy(), "reference", layers, {}, {0: [("prefill", wide)]})
    found = data_of(report.to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    bits = base64.b64decode(found["timeline"]["bits"])
    assert found["views"]["both"]["savings"] is None
    for token in range(5):
        row = bits[2 * token : 2 * token + 2]
        assert [row[head // 8] >> head % 8 & 1 for head in range(11)] == wide[0, :, token].int().tolist()


HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "<img src=x onerror=alert(2)>",
    "&lt;",
    "\u2028",
    "@@DATA@@",
    "x",
]


def test_page_escapes_what_it_shows(tmp_path: Path) -> None:
    page = REPORT.to_html(tmp_path / "r.html", tokens=HOSTILE, title="<script>alert(3)</script>").read_text("utf-8")
    assert "alert(1)</script>" not in page
    assert "<img" not in page
    assert "<script>alert" not in page
    assert page.count("<script") == 2
    assert data_of(page)["timeline"]["texts"] == HOSTILE


def test_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = REPORT.to_html(tmp_path / "report.html", tokens=TEXTS).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"(?:src|href)=|@import|url\(|fetch\(|XMLHttpRequest", page)


@pytest.mark.parametrize(
    ("tokens", "tokenizer", "message"),
    [
        (TEXTS[:5], None, "The timeline has 8 tokens and the text 5"),
        ([*TEXTS, "i", "j"], None, "The timeline has 8 tokens and the text 10"),
        ([], None, "and the text 0"),
        ("a b c d e", None, "sequence of texts, one per token, got str"),
        (list(range(8)), None, "sequence of texts"),
        (TEXTS, object(), "flat sequence of token ids"),
        (torch.zeros(2, 8, dtype=torch.long), object(), "flat sequence of token ids"),
    ],
)
def test_text_that_does_not_fit_is_refused(tokens, tokenizer, message: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=message):
        REPORT.to_html(tmp_path / "report.html", tokens=tokens, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_text_without_a_timeline_is_refused(tmp_path: Path) -> None:
    without = dataclasses.replace(REPORT, timeline={0: [], 3: []})
    with pytest.raises(ReportError, match="No timeline was recorded"):
        without.to_html(tmp_path / "report.html", tokens=TEXTS)


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character takes several."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_texts_of_tokens_join_to_the_text() -> None:
    text = "naïve 日本 €"
    texts = texts_of(Bytes(), list(text.encode()))
    assert "".join(texts) == text
    assert len(texts) == len(text.encode())
    assert texts[2:4] == ["", "ï"]
    broken = texts_of(Bytes(), [97, 0xE6, 0x97])
    assert broken == ["a", "", "\ufffd"]


def test_calibration_of_another_window_or_model_or_kind_is_refused(tmp_path: Path) -> None:
    calibration = patchattn.Calibration.from_pretrained(CALIBRATION)
    path = tmp_path / "report.html"
    with pytest.raises(CalibrationMismatchError, match="sink 16 and window 256"):
        REPORT.to_html(path, calibration=calibration)
    fitting = REPORT.policy.model_copy(update={"sink_size": 16, "window_size": 256})
    with pytest.raises(CalibrationMismatchError, match="6 query heads"):
        dataclasses.replace(REPORT, policy=fitting).to_html(path, calibration=calibration)
    with pytest.raises(ReportError, match=r"Expected a patchattn\.Calibration, got str"):
        REPORT.to_html(path, calibration="calibrations/patchattn-demo")
    assert not list(tmp_path.iterdir())


def test_risk_curve_falls_and_ends_open(tmp_path: Path) -> None:
    counts = LayerCounts((1,) * 6, 5, 0, 10, 20, 1)
    policy = Policy(sink_size=16, window_size=256, min_bulk=0)
    report = GateReport(policy, "flex", {2: {"prefill": counts, "decode": counts}}, {}, {})
    calibration = patchattn.Calibration.from_pretrained(CALIBRATION)
    risk = data_of(report.to_html(tmp_path / "r.html", calibration=calibration).read_text(encoding="utf-8"))["risk"]
    opened = [point[1] for point in risk["targets"]]
    missed = [point[2] for point in risk["targets"]]
    assert len(opened) > 5
    assert opened == sorted(opened, reverse=True)
    assert missed == sorted(missed)
    alpha, share, mass = risk["targets"][-1]
    margins = calibration.thresholds(patchattn.RiskTarget(alpha=alpha))
    expected = calibration.expected(margins)
    assert share == pytest.approx(float(expected.open_fraction[2].mean()))
    assert mass == pytest.approx(float(expected.missed_mass[2].mean()))


def test_a_patched_model_reports_what_it_did(tmp_path: Path) -> None:
    model = tiny_model("llama")
    policy = Policy(sink_size=2, window_size=16, min_bulk=0)
    prompt = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    with patchattn.patch(model, policy, record="timeline") as handle:
        with pytest.raises(ReportError, match="did not run"):
            handle.report().to_html(tmp_path / "early.html")
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    report = handle.report()
    timeline = report.timeline_of()
    assert timeline.phases.count("prefill") == prompt.shape[1]
    for phase in ("prefill", "decode"):
        of_phase = timeline.open[:, [name == phase for name in timeline.phases]]
        for layer, by_phase in report.layers.items():
            rows = [index for index, head in enumerate(timeline.heads) if head[0] == layer]
            assert of_phase[rows].sum(1).tolist() == list(by_phase[phase].open_pairs)
    config = model.config
    shape = report.shapes[0]
    assert shape.dim == shape.value_dim == config.head_dim
    assert shape.group_size == config.num_attention_heads // config.num_key_value_heads
    assert shape.bytes_per_number == model.dtype.itemsize
    scored = sum(counts.scored_keys for by_phase in report.layers.values() for counts in by_phase.values())
    assert report.savings().flops == 4 * config.head_dim * scored > 0
    texts = [f"<{token}>" for token in written[0].tolist()]
    page = report.to_html(tmp_path / "report.html", tokens=texts).read_text(encoding="utf-8")
    assert data_of(page)["timeline"]["texts"] == texts[:-1]


def test_density_above_one_is_explained(tmp_path: Path) -> None:
    assert REPORT.notes() == []
    tiles = dataclasses.replace(REPORT.layers[0]["decode"], scored_keys=500)
    crowded = dataclasses.replace(REPORT, layers={**REPORT.layers, 0: {**REPORT.layers[0], "decode": tiles}})
    (note,) = crowded.notes()
    assert note.startswith("Density above 100% in decode: keys are scored in whole tiles")
    assert note in str(crowded)
    assert data_of(crowded.to_html(tmp_path / "report.html").read_text("utf-8"))["notes"] == [note]


def test_report_names_the_heads_the_backend_computed() -> None:
    assert str(REPORT).startswith("patchattn report (backend blockwise; heads of 32, 2 to a KV head, bfloat16)")
    assert str(dataclasses.replace(REPORT, shapes={})).startswith("patchattn report (backend blockwise)")


def test_decisions_stay_where_they_are_until_a_report_asks_and_take_bounded_room(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("patchattn.hf.state._TIMELINE_ROOM", 200 + 3 * 16)
    model = tiny_model("llama")
    prompt = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    with patchattn.patch(model, Policy(sink_size=2, window_size=16, min_bulk=0), record="timeline") as handle:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        report = handle.report()
        timeline = report.timeline_of()
        assert timeline.phases == ("prefill",) * 200 + ("decode",) * 3
        assert any("ends early" in note for note in report.notes())
        page = report.to_html(tmp_path / "report.html", tokens=list("x" * 207)).read_text("utf-8")
        assert len(data_of(page)["timeline"]["texts"]) == 203
        handle.reset_report()
        model(prompt)
        assert len(handle.report().timeline_of().phases) == 200
        assert not any("ends early" in note for note in handle.report().notes())
        state = model.model.layers[0].self_attn._modules["patchattn_layer"]
        decisions = torch.ones(1, 6, 4, device="meta", dtype=torch.bool)
        state.keep("prefill", decisions)
    # A device that gives nothing back to the host.
    assert state.timeline[-1][1].device.type == "meta"


def test_record_none_is_said_in_plain_words(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prompt = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    with patchattn.patch(model, Policy(sink_size=2, window_size=16, min_bulk=0), record=None) as handle:
        model(prompt)
    with pytest.raises(ReportError, match='record="summary"'):
        handle.report().plot(tmp_path / "heads.png")


def test_template_is_part_of_the_package() -> None:
    folder = Path(patchattn.__file__).parent / "report" / "template"
    assert {path.name for path in folder.iterdir()} == {"page.html", "script.js", "style.css"}


def test_drafts_are_told_in_words_and_numbers() -> None:
    empty = dataclasses.replace(REPORT, drafts=DraftCounts())
    assert "  drafts: none yet" in str(empty).splitlines()
    assert empty.to_dict()["drafts"]["acceptance"] is None
    assert REPORT.to_dict()["drafts"] is None
    assert "drafts" not in str(REPORT)
    counts = DraftCounts(dense_seconds=0.25)
    counts.without_draft.update(short=2, measuring=1)
    counts.add(3, 3, 1.5, 0.5)
    counts.add(3, 1, 1.5, 0.5)
    told = str(dataclasses.replace(REPORT, drafts=counts)).splitlines()
    assert told[1] == (
        "  drafts: 2 rounds, 4 of 6 drafted tokens kept (66.7%), 3.00 tokens a round, 3.0 s of drafting and 1.0 s of "
        "verifying"
    )
    assert told[2] == "  dense steps without a draft: 2 (short), 1 (measuring), 0.2 s"
    found = dataclasses.replace(REPORT, drafts=counts).to_dict()["drafts"]
    assert found == json.loads(json.dumps(found))
    assert found["tokens_per_round"] == 3
    assert found["accepted"] == 4
