"""Tests of the commands that measure, show and describe calibrations."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import patchattn
from patchattn import demo
from patchattn.calibration import Calibration, pictures
from patchattn.cli.app import app
from patchattn.gates.thresholds import KLTarget, OpenFractionTarget, RiskTarget
from patchattn.hf.fingerprint import fingerprint_of
from patchattn.measuring import collect

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and one test that looks at the pictures is enough."""
    monkeypatch.setattr(pictures, "draw", lambda _: {"risk.png": b"picture"})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for at in range(4):
        (folder / f"{at}.txt").write_text(demo.sample_text()[5000 * at : 5000 * at + 2000])
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_calibrate_measures_the_shipped_model(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--lengths", 256, "--window", 64, "--alpha", 0.25, "--corpus", "source", "--note", "Only four.")
    result = run("calibrate", "--texts", texts, "--out", out, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["manifest"]["model"] == "patchattn-demo"
    assert found["manifest"]["corpus"]["name"] == "source"
    assert sum(found["manifest"]["documents"]) >= 4
    calibration = Calibration.from_pretrained(out)
    assert calibration.policy.window_size == 64
    assert calibration.policy.gate.threshold == RiskTarget(alpha=0.25)
    assert not list(out.glob(".*"))
    assert "\n\nOnly four.\n\n```python\n" in (out / "README.md").read_text(encoding="utf-8")
    model, _ = demo.load()
    calibration.check_fingerprint(fingerprint_of(model))


@pytest.mark.usefixtures("no_pictures")
def test_calibrate_takes_a_policy_and_a_pattern(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    gate = {"kind": "moment", "threshold": OpenFractionTarget(fraction=0.3).model_dump()}
    path.write_text(json.dumps({"window_size": 100, "gate": gate}))
    options = ("--policy", path, "--lengths", 200, "--documents", 2, "--no-key-moments", "--sink", 4, "--min-bulk", 7)
    result = run("calibrate", demo.model_folder(), "--texts", f"{texts}/[01].txt", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "Promise for each head: alpha 0.005 needs 199 documents" in result.stdout
    assert "open at budget 30%" in result.stdout
    calibration = Calibration.from_pretrained(tmp_path / "out")
    policy = calibration.policy
    assert (policy.sink_size, policy.window_size, policy.min_bulk) == (4, 100, 7)
    assert calibration.manifest.rotary is None
    assert calibration.manifest.model == "model"
    assert calibration.manifest.n_documents == 2


@pytest.mark.usefixtures("no_pictures")
def test_calibrate_for_a_kl_measures_prices(texts: Path, tmp_path: Path) -> None:
    options = ("--lengths", 128, "--window", 32, "--sink", 4, "--documents", 3, "--kl", 0.05, "--no-key-moments")
    result = run("calibrate", "--texts", texts, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "KL asked" in result.stdout
    assert "readings of documents" in result.stderr
    calibration = Calibration.from_pretrained(tmp_path / "out")
    assert calibration.policy.gate.threshold == KLTarget(nats=0.05)
    assert calibration.manifest.prices is not None
    assert calibration.expected_kl(calibration.policy) <= 0.05


@pytest.mark.parametrize(
    ("options", "prices"),
    [((), False), (("--prices",), True), (("--kl", 0.01), True), (("--policy", "kl.json"), True)],
)
def test_a_policy_that_asks_for_a_kl_brings_prices(options, prices, texts: Path, tmp_path: Path, monkeypatch) -> None:
    class Asked(Exception):
        """What was asked for is known; nothing is measured."""

    def ask(*_: object, **fields: object) -> None:
        raise Asked(fields["prices"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect, "calibrate", ask)
    Path("kl.json").write_text('{"gate": {"kind": "moment", "threshold": {"kind": "kl", "nats": 0.01}}}')
    result = run("calibrate", "--texts", texts, "--out", "out", *options)
    assert isinstance(result.exception, Asked)
    assert result.exception.args == (prices,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--texts", "nothing*.txt"), "No text file fits 'nothing*.txt'"),
        (("--texts", "{texts}", "--lengths", "64"), "no keys beyond sink 16 and window 2048"),
        (("--texts", "{texts}", "--lengths", "256", "--window", "64", "--documents", "99"), "99 were asked for"),
        (("--texts", "{texts}", "--lengths", "4097", "--window", "64"), "reads at most 4,096 tokens"),
        (("--texts", "{texts}", "--window", "0"), "window_size"),
        (("--texts", "{texts}", "--window", "64", "--moments", "calibration", "--no-key-moments"), "key_moments is"),
        (("--texts", "{texts}", "--policy", "oracle.json", "--moments", "prompt"), "goes with a moment gate"),
        (("--texts", "{texts}", "--alpha", "2"), "alpha"),
        (("--texts", "{texts}", "--alpha", "0.1", "--kl", "0.01"), "--alpha and --kl each say"),
        (("--texts", "{texts}", "--policy", "oracle.json", "--kl", "0.01"), "--policy and --kl each say"),
        (("--texts", "{texts}", "--policy", "oracle.json", "--alpha", "0.1"), "--policy and --alpha each say"),
        (("--texts", "{texts}", "--kl", "0"), "nats"),
        (("--texts", "{texts}", "--window", "64", "--prices", "--moments", "calibration"), "go with moments="),
        (("--texts", "{texts}", "--lengths", "256", "--window", "64", "--prices", "--documents", "2"), "need 3 doc"),
        (("--texts", "{texts}", "--policy", "nothing.json"), "Can't read nothing.json"),
        (("--texts", "picture.png"), "not UTF-8"),
        (("./nothing", "--texts", "{texts}"), "Can't load './nothing'"),
    ],
)
def test_mistakes_are_explained(arguments, message, texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "oracle.json").write_text('{"gate": {"kind": "oracle"}}')
    filled = [argument.replace("{texts}", str(texts)) for argument in arguments]
    result = run("calibrate", *filled, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_inspect_shows_tables_and_writes_plots(tmp_path: Path) -> None:
    made_up_calibration().save_pretrained(tmp_path / "in", card=False)
    result = run("inspect", tmp_path / "in", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    for words in ("org/made-up", "100 documents", "each head", "mean of heads", "needs 199 documents", "layer"):
        assert words in result.stdout
    made = {path.name for path in (tmp_path / "plots" / "plots").iterdir()}
    assert made == {"risk.png", "heads.png", "estimate.png"}
    result = run("inspect", tmp_path / "in", "--json")
    risks = {(row["scope"], row["alpha"]): row for row in json.loads(result.stdout)["risks"]}
    assert risks["head", 0.005]["open_fraction"] is None
    assert 0 < risks["head", 0.1]["open_fraction"] <= 1
    assert json.loads(result.stdout)["prices"] is None


def test_inspect_shows_what_a_kl_costs(tmp_path: Path) -> None:
    calibration = made_up_calibration(prices=True)
    calibration.save_pretrained(tmp_path / "in", card=False)
    shown = run("inspect", tmp_path / "in", "--plots", tmp_path / "plots").stdout
    found = json.loads(run("inspect", tmp_path / "in", "--json").stdout)["prices"]
    assert (tmp_path / "plots" / "plots" / "prices.png").stat().st_size > 10_000
    assert "8 of 8 heads carry 100% of the price of closing them all." in shown
    cells = {row.split()[0]: row for row in shown.split("KL asked")[1].splitlines() if row.strip()}
    for row in found["targets"]:
        promised = row["promised_open_fraction"]
        none = f"needs {row['documents_needed']} held out" if row["lacks_documents"] else "none tried"
        words = none if promised is None else f"{promised:.1%}"
        for cell in (f"{row['open_fraction']:.1%}", f"{row['expected']:.2g}", f"{row['predicted']:.2g}", words):
            assert cell in cells[f"{row['nats']:g}"]
    assert len(found["tried"]) == 6
    for row in found["tried"]:
        assert f"{row['measured']:.2g}" in cells[f"{row['predicted']:.2g}"]
    assert [(head["layer"], head["query_head"]) for head in found["dearest"]] == calibration.heads_by_price()


@pytest.mark.usefixtures("no_pictures")
def test_card_is_printed_or_written(tmp_path: Path) -> None:
    made_up_calibration().save_pretrained(tmp_path, card=False)
    assert "library_name: patchattn" in run("card", tmp_path).stdout
    assert not (tmp_path / "README.md").exists()
    assert run("card", tmp_path, "--write").exit_code == 0
    assert "| 0.02 | head |" in (tmp_path / "README.md").read_text()
    found = json.loads(run("card", tmp_path, "--json").stdout)
    assert found["written"] is False
    assert "library_name: patchattn" in found["card"]
    assert "What a KL costs" not in found["card"]
    assert "prices" not in found["card"]


def test_the_card_says_what_a_kl_costs_and_what_is_promised(tmp_path: Path) -> None:
    calibration = made_up_calibration(prices=True)
    calibration.save_pretrained(tmp_path, card=False)
    text = run("card", tmp_path).stdout
    section = text.split("## What a KL costs")[1].split("##")[0]
    for row in calibration.findings.kl_table():
        assert f"| {row.nats:g} | {row.open_fraction:.1%} | {row.expected:.2g} | {row.predicted:.2g} |" in section
    assert "needs 49 held out" in section
    assert "Nothing is promised for one document" in section
    (predicted, measured), *_ = calibration.findings.priced().measured()
    assert f"| {predicted:.2g} | {measured:.2g} |" in section
    layer, head = calibration.heads_by_price()[0]
    assert f"closing them all: layer {layer} head {head} (" in section
    assert "fitted to 8 documents, prices from 6 others, the KL of the patched model on 9 yet others" in text


def test_the_shipped_calibration_is_of_the_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    block = re.search(r"```python\n(.*?)```", (ROOT / "calibrations/README.md").read_text(), flags=re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    assert patchattn.is_patched(names["model"])
    found = json.loads(run("inspect", "calibrations/patchattn-demo", "--json").stdout)
    (row,) = [row for row in found["risks"] if (row["scope"], row["alpha"]) == ("head", 0.05)]
    assert row["missed_mass"] <= 0.05
    assert 0.3 < row["open_fraction"] < 0.7
    card = (ROOT / "calibrations/patchattn-demo/README.md").read_text()
    assert f"| 0.05 | head | {row['open_fraction']:.1%} | {row['missed_mass']:.2%} |" in card


@pytest.mark.parametrize("command", ["calibrate", "inspect", "push", "pull", "card"])
def test_help_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"patchattn {command}" in result.stdout.split("Examples")[1]
