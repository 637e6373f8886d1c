"""Tests of `patchattn serve`; the server itself is tested in tests/integration/test_server.py."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from click.testing import Result
from packaging.version import Version
from typer.testing import CliRunner

import patchattn
from patchattn.cli.app import app
from patchattn.gates import StaticGate
from patchattn.hf.serving import ModelServer
from patchattn.policy import Policy

IS_INSTALLED = importlib.util.find_spec("openai") is not None and importlib.util.find_spec("fastapi") is not None
needs_packages = pytest.mark.skipif(not IS_INSTALLED, reason="needs the extra serve")
needs_engine = pytest.mark.skipif(
    not IS_INSTALLED or Version(transformers.__version__) < Version("5.24"),
    reason="needs the extra serve and the engine of transformers 5.24",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelServer, "run", lambda *_: pytest.fail("the server was started"))


@needs_packages
@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./no-such-folder",), "Can't load './no-such-folder'"),
        (("demo", "--policy", "no-such-file.json"), "Can't read no-such-file.json"),
        (("demo", "--policy", "layers.json"), "The policy names layers [99]"),
        (("demo", "--policy", "heads.json"), "StaticGate names"),
        (("demo", "--policy", "field.json"), "window: Extra inputs are not permitted"),
        (("demo", "--calibration", "./no-such-folder"), "no-such-folder"),
        (("demo", "--device", "abacus"), "Unknown device 'abacus'"),
        (("demo", "--host", "no.such.host.invalid"), "Can't listen on no.such.host.invalid:8000"),
        (("demo", "--port", "taken"), "Address already in use"),
        pytest.param(("demo", "--num-blocks", 10**9), "no memory for a cache", marks=needs_engine),
    ],
)
def test_mistakes_are_told_before_the_server_starts(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("layers.json").write_text(Policy(layers=(99,)).model_dump_json())
    Path("heads.json").write_text(Policy(gate=StaticGate(open_heads=((0, 99),))).model_dump_json())
    Path("field.json").write_text('{"window": 128}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [taken.getsockname()[1] if each == "taken" else each for each in arguments]
        result = run(*given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("never_run")
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("fastapi", "openai") else found(name)
    )
    result = run("demo")
    assert result.exit_code == 2
    assert "needs fastapi, openai" in result.stderr
    assert 'pip install "patchattn[serve]"' in result.stderr


@needs_packages
@pytest.mark.usefixtures("never_run")
@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.24"), reason="the engine can be used")
def test_an_engine_without_hooks_is_refused_by_version() -> None:
    result = run("demo", "--port", 0)
    assert result.exit_code == 2
    assert f"Continuous batching of transformers {transformers.__version__}" in result.stderr


@needs_engine
def test_the_start_says_how_to_ask_and_the_end_what_gates_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_to_end(server: ModelServer, listening: socket.socket) -> None:
        assert server.engine is None
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ModelServer, "run", asked_to_end)
    path = tmp_path / "policy.json"
    path.write_text(Policy(window_size=77).model_dump_json())
    result = run("demo", "--policy", path, "--port", 0, "--num-blocks", 3)
    assert result.exit_code == 0, result.output
    for words in ("demo, cpu, bfloat16, backend blockwise", "window 77", "Cache: 768 tokens", "no chat template"):
        assert words in result.stdout
    assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/completions ", result.stdout)
    assert "patchattn report (backend blockwise" in result.stdout


@needs_engine
@pytest.mark.slow
def test_a_process_serves_until_it_is_interrupted() -> None:
    command = [sys.executable, "-m", "patchattn.cli", "serve", "demo", "--port", "0", "--num-blocks", "8"]
    place = Path(patchattn.__file__).parents[1]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.findall(r"http://[\d.:]+/v1", line)))
        body = json.dumps({"model": "demo", "prompt": "import", "max_tokens": 4}).encode()
        asked = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as response:
            assert json.loads(response.read())["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "patchattn report" in said


def test_help_has_examples() -> None:
    assert "patchattn serve demo --port 8001" in run("--help").stdout
