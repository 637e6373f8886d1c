"""Tests of `patchattn demo --model`: models of one's own, with and without what a demo needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from patchattn import demo
from patchattn.cli.app import app
from patchattn.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quick_demo")
CHAT = "<u>{{ messages[0]['content'] }}</u><a>"
SMALL = ("--length", "512", "--questions", "2", "--window", "32")
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", ("tokenizer.json", "tokenizer_config.json")


def run(*arguments: str | Path, columns: int = 200) -> Result:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env=environment)


def saved(folder: Path, *, template: str | None = None, **fields: int) -> Path:
    """Save a tiny model with random weights and the shipped tokenizer."""
    tiny_model("llama", **{"vocab_size": 1024, "max_position_embeddings": 1024, **fields}).save_pretrained(folder)
    _, tokenizer = demo.load()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def part_of_shipped(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(demo.model_folder() / name, folder)
    return folder


def test_a_chat_model_is_asked_in_its_template_about_prose(tmp_path: Path) -> None:
    out = tmp_path / "heads.png"
    result = run("--model", saved(tmp_path / "chat", template=CHAT), *SMALL, "--out", out, columns=100)
    assert result.exit_code == 0, result.output
    assert "in the model's chat template" in result.stdout
    assert "pydoc_data.topics" in result.stdout
    assert "answers only 0 of 2: these questions do not measure this model" in " ".join(result.stdout.split())
    lines = result.stdout.splitlines()
    table = lines[next(at for at, line in enumerate(lines) if line.startswith(" measured")) :][:13]
    assert max(len(line.rstrip()) for line in table) < 80
    for row in ("agreement with dense, text / answers", "KL to dense (nats), text / answers"):
        assert any(line.strip().startswith(row) for line in table)
    assert any(line.startswith(" texts equal to dense") and line.rstrip().endswith("/2") for line in table)
    times = [line for line in table if "time to first token" in line or "tokens per second" in line]
    assert len(times) == 2
    assert all(line.rstrip().endswith("x)") for line in times)
    assert out.is_file()
    assert "decisions over text, questions and right answers" in result.stdout


def test_a_base_model_is_asked_in_plain_words_and_json_says_so(tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("A line about nothing in particular, and one more.\n" * 200)
    options = ("--text", text, "--out", tmp_path / "heads.png", "--json")
    result = run("--model", saved(tmp_path / "base"), *SMALL, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "without chat template" in found["asked"]
    assert found["text"] == str(text)
    assert found["questions_measure_the_model"] is False
    assert 0 <= found["agreement"]["answers"]["top1"] <= 1
    assert found["agreement"]["text"]["kl"] > 0
    assert found["dense"]["first_token_seconds"] > 0


def test_a_broken_template_is_said_to_be_broken(tmp_path: Path) -> None:
    folder = saved(tmp_path / "chat", template="{{ raise_exception('only two may talk') }}")
    result = run("--model", folder, *SMALL, "--out", tmp_path / "heads.png")
    assert result.exit_code == 0, result.output
    assert "that is broken (only two may talk)" in result.stdout


def test_a_short_context_is_the_default_length(tmp_path: Path) -> None:
    folder = saved(tmp_path / "short", template=CHAT, max_position_embeddings=400)
    options = ("--model", folder, "--questions", "2", "--window", "32", "--out", tmp_path / "heads.png")
    assert "400 tokens, 2 questions" in run(*options).stdout
    refused = run(*options, "--length", "512")
    assert refused.exit_code == 2
    assert "at most 400 tokens" in refused.stderr


def bad_json(folder: Path) -> Path:
    (part_of_shipped(folder, CONFIG, WEIGHTS) / TOKENIZER[0]).write_text("{}")
    return folder


def bad_weights(folder: Path) -> Path:
    (part_of_shipped(folder, CONFIG, *TOKENIZER) / WEIGHTS).write_bytes(b"abc" * 100)
    return folder


def too_few_weights(folder: Path) -> Path:
    part_of_shipped(folder, CONFIG, *TOKENIZER)
    weights = load_file(demo.model_folder() / WEIGHTS)
    del weights["model.layers.0.mlp.gate_proj.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def unknown_kind(folder: Path) -> Path:
    (part_of_shipped(folder, WEIGHTS, *TOKENIZER) / CONFIG).write_text('{"model_type": "zorglub"}')
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (part_of_shipped, "no config.json, so there is no model in it"),
        (lambda folder: part_of_shipped(folder, *TOKENIZER), "no config.json, so there is no model in it"),
        (lambda folder: part_of_shipped(folder, CONFIG, WEIGHTS), "has no tokenizer that can be read"),
        (lambda folder: part_of_shipped(folder, CONFIG, *TOKENIZER), "no file named model.safetensors"),
        (bad_json, "has no tokenizer that can be read"),
        (bad_weights, "Can't load"),
        (too_few_weights, "1 of its weights are missing, model.layers.0.mlp.gate_proj.weight among them"),
        (unknown_kind, "zorglub"),
        (lambda folder: saved(folder, vocab_size=128), "the model knows 128 tokens"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_with_a_reason(make, message, tmp_path: Path) -> None:
    result = run("--model", make(tmp_path / "model"), *SMALL, "--out", tmp_path / "heads.png")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert not (tmp_path / "heads.png").exists()
