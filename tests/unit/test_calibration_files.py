"""Tests of `patchattn.calibration.files` and of saving and reading: strict, atomic, small."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig

from patchattn.calibration import Calibration, Fingerprint, Manifest, encoding, files, key_moments
from patchattn.errors import (
    CalibrationError,
    CalibrationFormatError,
    CalibrationMismatchError,
    CalibrationNotFoundError,
)
from patchattn.gates.thresholds import KLTarget
from patchattn.hf.fingerprint import fingerprint_of
from patchattn.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_up import made_up_calibration, made_up_manifest, made_up_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"layers": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 2}


def encoded(**fields) -> bytes:
    manifest = made_up_manifest(**fields)
    return encoding.encode(manifest, made_up_tensors(manifest))


def with_header(data: bytes, change) -> bytes:
    """Change the header of a file, as an attacker or a bug would."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header = change(header) or header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def with_manifest(data: bytes, change) -> bytes:
    def edit(header):
        fields = json.loads(header["__metadata__"]["manifest"])
        change(fields)
        header["__metadata__"]["manifest"] = json.dumps(fields)

    return with_header(data, edit)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    calibration = made_up_calibration()
    calibration.save_pretrained(tmp_path / "a" / "b")
    again = Calibration.from_pretrained(tmp_path / "a" / "b")
    assert again.manifest == calibration.manifest
    assert again.policy == calibration.policy
    assert set(again.tensors) == set(calibration.tensors)
    for name, tensor in calibration.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {"calibration.safetensors", "policy.json", "README.md", "plots"}


def test_the_same_calibration_gives_the_same_bytes() -> None:
    assert encoded() == encoded()


def test_safetensors_itself_can_read_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    made_up_calibration().save_pretrained(tmp_path, card=False)
    with safe_open(tmp_path / files.FILE, framework="pt") as file:
        assert Manifest.model_validate_json(file.metadata()["manifest"]) == made_up_manifest()


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_golden_files_of_every_schema_are_read(schema: int) -> None:
    calibration = Calibration.from_pretrained(GOLDEN / f"calibration-{schema}")
    fields = {**SMALL, "estimates": ("guarded", "saturating")}
    # What schema 1 says of keys, for a few lengths after the rotary embedding, is not used any more.
    prices = 4 if schema > 2 else 0
    assert calibration.manifest == made_up_manifest(**fields, key_moments=schema > 1, prices=prices)
    assert ("key_factor" in calibration.tensors) == (schema > 1)
    assert calibration.tensors["margins"].tolist() == [i / 2 for i in range(-4, 8)]
    assert ("probe" in calibration.tensors) == (schema > 2)
    missed = {1: 25.278900146484375, 2: 28.79925537109375, 3: 29.154930114746094}[min(schema, 3)]
    assert calibration.tensors["missed_mass"].double().sum() == pytest.approx(missed)
    assert calibration.policy == made_up_calibration(**fields).policy
    if prices:
        assert calibration.tensors["price"].double().sum() == pytest.approx(1.6687974212582048)
        assert calibration.tensors["value"].double().sum() == pytest.approx(3.3375948425164097)
        assert calibration.findings.expected_kl(KLTarget(nats=0.02)) == pytest.approx(0.0033059369963660376)
        margins, _ = calibration.findings.offsets(KLTarget(nats=0.02))
        # Margins of the grid, as schema 3 has them, or multiplied by the scales of schema 4.
        scales = calibration.tensors["probe_scale"]
        assert scales.eq(1).all() == (schema == 3)
        rungs = calibration.findings.priced().rungs(KLTarget(nats=0.02))
        grid = torch.cat([torch.tensor([-torch.inf]), calibration.tensors["margins"], torch.tensor([torch.inf])])
        assert torch.equal(margins, grid[rungs] * scales + calibration.tensors["probe_offset"])


def test_size_for_a_model_of_8b_parameters() -> None:
    from patchattn.measuring.statistics import ESTIMATES, MARGINS

    shape = {"layers": 32, "query_heads": 32, "kv_heads": 8, "head_dim": 128, "estimates": ESTIMATES}

    def size(*, key_moments: bool) -> int:
        manifest = made_up_manifest(**shape, key_moments=key_moments)
        return len(encoding.encode(manifest, made_up_tensors(manifest, margins=MARGINS)))

    assert size(key_moments=False) <= 2e6
    assert size(key_moments=True) <= 25e6


@given(dim=st.integers(1, 12), rank=st.integers(0, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_a_stored_covariance_is_positive_semi_definite_and_close(dim, rank, scale, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = scale * torch.randn(3, dim, rank, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT
    deviation, factor, error = key_moments.pack_covariance(covariance)
    back = key_moments.unpack_covariance(deviation, factor).double()
    assert torch.linalg.eigvalsh(back).min() >= -1e-6 * back.abs().max()
    assert error <= 2e-3
    assert (back - covariance).norm() <= 2e-3 * covariance.norm()


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "not positive semi-definite"),
        ([[1.0, 0.5], [0.2, 1.0]], "not symmetric"),
        ([[1.0, float("nan")], [0.0, 1.0]], "NaN or Inf"),
        ([[-1.0, 0.0], [0.0, 1.0]], "not positive semi-definite"),
    ],
)
def test_matrices_that_are_no_covariances_are_refused(covariance, words) -> None:
    with pytest.raises(CalibrationFormatError, match=words):
        key_moments.pack_covariance(torch.tensor(covariance))


def change_tensor(name, change):
    def damage() -> bytes:
        manifest = made_up_manifest(prices=4)
        tensors = made_up_tensors(manifest)
        tensors[name] = change(tensors[name].clone())
        from safetensors.torch import save

        kept = {key: value.contiguous() for key, value in tensors.items() if value is not None}
        return save(kept, metadata={"manifest": manifest.model_dump_json()})

    return damage


def put(value, *at):
    def change(tensor):
        tensor.view(-1)[at[0] if at else 0] = value
        return tensor

    return change


DAMAGED = {
    "nan": (change_tensor("bias", put(float("nan"))), "bias has NaN or Inf"),
    "inf": (change_tensor("key_mean", put(float("inf"))), "key_mean has NaN or Inf"),
    "dtype": (change_tensor("bias", lambda t: t.half()), "bias should be F32"),
    "double": (change_tensor("bias", lambda t: t.double()), "bias has dtype 'F64'"),
    "shape": (change_tensor("bias", lambda t: t[:, :1]), "bias should be F32"),
    "missing": (change_tensor("bias", lambda t: None), "tensors missing: \\['bias'\\]"),
    "range": (change_tensor("open_fraction", put(1.5, -1)), "open_fraction leaves"),
    "order": (change_tensor("margins", lambda t: t.flip(0)), "margins do not ascend"),
    "a price that rises": (change_tensor("price", lambda t: t.flip(-1)), "price does not fall"),
    "a price that is negative": (change_tensor("price", put(-1.0, -1)), "price does not fall"),
    "a price of nothing": (change_tensor("price", lambda t: t + 0.1), "price does not fall to zero"),
    "priced shares": (change_tensor("priced_open_fraction", put(1.5, -1)), "priced_open_fraction leaves"),
    "priced shares that fall": (change_tensor("priced_open_fraction", lambda t: t.flip(-1)), "does not rise"),
    "measured shares": (change_tensor("kl_open_fraction", put(-0.5)), "kl_open_fraction leaves"),
    "a value that rises": (change_tensor("value", lambda t: t.flip(-1)), "value does not fall"),
    "a value that is negative": (change_tensor("value", put(-1.0, -1)), "value does not fall"),
    "a value of nothing": (change_tensor("value", lambda t: t + 0.1), "value does not fall to zero"),
    "tried fractions that rise": (change_tensor("tried", lambda t: t.flip(0)), "what was tried does not fall"),
    "a tried fraction below nothing": (change_tensor("tried", put(-0.1, -1)), "tried leaves"),
    "a tried fraction above all": (change_tensor("tried", put(1.5)), "tried leaves"),
    "tried fractions in a table": (change_tensor("tried", lambda t: t[None]), "tried should be F32"),
    "a negative KL": (change_tensor("kl", put(-0.1)), "a KL is negative"),
    "prices without their estimate": (
        lambda: with_manifest(encoded(prices=4), lambda m: m["prices"].update(estimate="guarded")),
        "an estimate that was measured",
    ),
    "prices with other moments": (
        lambda: with_manifest(encoded(prices=4), lambda m: m.update(moments="calibration")),
        "prices go with the moments of the prompt",
    ),
    "values of a model that is not gated": (
        lambda: with_manifest(encoded(prices=4), lambda m: m["prices"].update(gated=1.0)),
        "prices.gated",
    ),
    "prices of nothing": (lambda: with_manifest(encoded(prices=4), lambda m: m["prices"].update(priced=0)), "priced"),
    "rising": (change_tensor("missed_mass", lambda t: t.flip(-1)), "missed_mass does not fall"),
    "falling": (change_tensor("open_fraction", lambda t: t.flip(-1)), "open_fraction does not rise"),
    "factor": (change_tensor("key_factor", put(3.0)), "not the factor of a correlation matrix"),
    "negative": (change_tensor("spread", put(-1.0)), "spread is negative"),
    "empty": (lambda: b"", "it has 0 bytes"),
    "pickle": (lambda: pickle.dumps({"margins": [1.0] * 100}), "not a safetensors file"),
    "oversized header": (lambda: struct.pack("<Q", 2**40) + b"{}", "header is oversized"),
    "header cut off": (lambda: encoded()[:100], "it is cut off"),
    "body cut off": (lambda: encoded()[:-7], "it is cut off within"),
    "bytes after": (lambda: encoded() + b"more", "4 bytes after the last tensor"),
    "no manifest": (lambda: with_header(encoded(), lambda h: h.pop("__metadata__") and None), "no manifest"),
    "not json": (lambda: struct.pack("<Q", 4) + b"{{{{", "header is not JSON"),
    "list": (lambda: struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "extra key of schema 1": (
        lambda: with_manifest(encoded(key_moments=False), lambda m: m.update(schema_version=1, author="x")),
        "author: Extra inputs",
    ),
    "rotary too large": (
        lambda: with_manifest(encoded(), lambda m: m["rotary"].update(size=10)),
        "does not fit keys of dimension 8",
    ),
    "no moments to go with": (
        lambda: with_manifest(encoded(key_moments=False), lambda m: m.update(moments="calibration")),
        "there are no key moments",
    ),
    "frequencies": (change_tensor("key_frequencies", put(float("nan"))), "key_frequencies has NaN or Inf"),
    "extra key": (lambda: with_manifest(encoded(), lambda m: m.update(author="x")), "author: Extra inputs"),
    "text for number": (lambda: with_manifest(encoded(), lambda m: m.update(sink_size="4")), "sink_size"),
    "layer too high": (lambda: with_manifest(encoded(), lambda m: m.update(layers=[0, 9])), "layer 9 does not exist"),
    "overlap": (
        lambda: with_header(encoded(), lambda h: h["spread"].update(data_offsets=[0, 64])),
        "do not fit its shape|offsets",
    ),
    "a scale of nothing": (change_tensor("probe_scale", put(0.0)), "probe_scale is not positive"),
    "huge shape": (lambda: with_header(encoded(), lambda h: h["bias"].update(shape=[2**31] * 8)), "do not fit"),
}


for name, (dtype, _) in encoding.expected_tensors(made_up_manifest(prices=4), 12, 6).items():
    if name.startswith(("probe", "price", "value", "tried", "kl")):
        DAMAGED |= {
            f"{name} is missing": (change_tensor(name, lambda t: None), f"tensors missing: .*'{name}'"),
            f"{name} has NaN": (change_tensor(name, put(float("nan"))), f"{name} has NaN or Inf"),
            f"{name} is too short": (change_tensor(name, lambda t: t[..., 1:]), " should be "),
            f"{name} has another dtype": (
                change_tensor(name, lambda t: t.float() if t.dtype == torch.float16 else t.half()),
                f"{name} should be {dtype}",
            ),
        }


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_with_what_is_wrong(case: str) -> None:
    make, words = DAMAGED[case]
    with pytest.raises(CalibrationFormatError, match=words):
        encoding.decode(make())


def test_unknown_schema_says_what_to_do() -> None:
    with pytest.raises(CalibrationFormatError, match="schema version 5") as caught:
        encoding.decode(with_manifest(encoded(), lambda m: m.update(schema_version=5)))
    assert caught.value.fix == "upgrade patchattn"


BYTES = encoded(**SMALL, prices=2)
(HEADER,) = struct.unpack("<Q", BYTES[:8])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_format_error(data: bytes) -> None:
    with pytest.raises(CalibrationFormatError):
        encoding.decode(data)


@given(st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_changed_bytes_are_read_or_refused_but_nothing_else(edits, data) -> None:
    changed = bytearray(BYTES)
    for at, value in edits:
        # Half of the edits hit the header, where they do most.
        changed[at if data.draw(st.booleans()) else at % (8 + HEADER)] = value
    keep = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    try:
        encoding.decode(bytes(changed[:keep]))
    except CalibrationError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(["bias", "margins", "__metadata__", "new"]), value=JSON)
def test_any_header_is_a_format_error(key, value) -> None:
    with pytest.raises(CalibrationFormatError):
        encoding.decode(with_header(BYTES, lambda h: h | {key: value}))


@given(key=st.sampled_from([*Manifest.model_fields, "new"]), value=JSON)
def test_any_manifest_is_read_or_refused(key, value) -> None:
    try:
        encoding.decode(with_manifest(BYTES, lambda m: m.update({key: value})))
    except CalibrationError:
        pass


def test_deeply_nested_headers_are_refused() -> None:
    text = b"[" * 100_000
    with pytest.raises(CalibrationFormatError):
        encoding.decode(struct.pack("<Q", len(text)) + text)


def test_missing_folder_files_and_bad_policy(tmp_path: Path) -> None:
    made_up_calibration().save_pretrained(tmp_path, card=False)
    (tmp_path / "policy.json").write_text('{"window": 3}')
    with pytest.raises(CalibrationFormatError, match="not a valid policy"):
        Calibration.from_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text(Policy(window_size=64).model_dump_json())
    with pytest.raises(CalibrationMismatchError, match="window 32; the policy has sink 16 and window 64"):
        Calibration.from_pretrained(tmp_path)
    (tmp_path / "policy.json").unlink()
    with pytest.raises(CalibrationNotFoundError, match=r"no policy\.json"):
        Calibration.from_pretrained(tmp_path)
    (tmp_path / files.FILE).unlink()
    (tmp_path / files.FILE).mkdir()
    with pytest.raises(CalibrationFormatError, match="not a file"):
        Calibration.from_pretrained(tmp_path)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    made_up_calibration().save_pretrained(tmp_path / "real", card=False)
    made_up_calibration().save_pretrained(tmp_path / "linked", card=False)
    (tmp_path / "linked" / files.FILE).unlink()
    (tmp_path / "linked" / files.FILE).symlink_to("../real/calibration.safetensors")
    with pytest.raises(CalibrationFormatError, match="leads out of the folder"):
        Calibration.from_pretrained(tmp_path / "linked")
    (tmp_path / "linked" / files.FILE).unlink()
    (tmp_path / "linked" / files.FILE).symlink_to(files.FILE)
    with pytest.raises(CalibrationError):
        Calibration.from_pretrained(tmp_path / "linked")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_calibration(seed=1).save_pretrained(tmp_path, card=False)
    before = (tmp_path / files.FILE).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalibrationError, match="No space left on device"):
        made_up_calibration(seed=2).save_pretrained(tmp_path, card=False)
    assert (tmp_path / files.FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.FILE, "policy.json"]


@pytest.fixture
def files_of_4_kb():
    """Let the operating system refuse to write more than 4 kB into a file."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_breaks_off_half_way_leaves_the_old_file(tmp_path: Path, files_of_4_kb) -> None:
    made_up_calibration(seed=1).save_pretrained(tmp_path, card=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    later = made_up_calibration(seed=2)
    assert len(before[files.FILE]) > 4096
    files_of_4_kb()
    with pytest.raises(CalibrationError, match=r"Can't write into .*: File too large"):
        later.save_pretrained(tmp_path, card=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(CalibrationError, match="Can't write into"):
        made_up_calibration().save_pretrained(tmp_path / "taken")


def test_writers_of_one_folder_take_turns(tmp_path: Path) -> None:
    writers = [made_up_calibration(seed=seed, corpus=made_up_manifest().corpus) for seed in range(4)]
    failures = []

    def save(calibration: Calibration) -> None:
        try:
            for _ in range(5):
                calibration.save_pretrained(tmp_path, card=False)
                Calibration.from_pretrained(tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = Calibration.from_pretrained(tmp_path)
    assert any(torch.equal(found.tensors["bias"], writer.tensors["bias"]) for writer in writers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.FILE, "policy.json"]


def test_two_processes_that_write_one_folder_leave_a_calibration_of_one_of_them(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from made_up import made_up_calibration
calibration = made_up_calibration(seed=int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    calibration.save_pretrained({str(tmp_path)!r}, card=False)
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", code, seed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    # What is read in between is always whole.
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / files.POLICY_FILE).exists():
            Calibration.from_pretrained(tmp_path)
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    found = Calibration.from_pretrained(tmp_path).tensors["bias"]
    assert any(torch.equal(found, made_up_calibration(seed=seed).tensors["bias"]) for seed in (1, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.FILE, files.POLICY_FILE]


def test_the_manifest_is_strict() -> None:
    for wrong in ({"documents": (0, 0)}, {"estimates": ("guarded", "guarded")}, {"layers": (1, 0)}):
        with pytest.raises(ValidationError):
            made_up_manifest(**wrong)


def test_a_number_of_the_rotary_embedding_is_the_same_however_it_is_written() -> None:
    measured = made_up_manifest().fingerprint

    def of(rope: str) -> Fingerprint:
        return measured.model_copy(update={"rope": rope})

    first = of('{"rope_theta": 100000.0, "rope_type": "default"}')
    assert not first.differences(of('{"rope_theta": 100000, "rope_type": "default"}'))
    (difference,) = first.differences(of('{"rope_theta": 10000, "rope_type": "default"}'))
    assert difference.startswith("rope: ")
    assert of("not JSON").differences(first)
    assert of("[" * 4096).differences(first)


def test_the_calibration_of_the_real_model_fits_the_configuration_on_the_hub() -> None:
    """As HuggingFaceTB/SmolLM2-135M-Instruct has it; the file that was measured writes some numbers differently."""
    fields = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    fields |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    config = LlamaConfig(**fields, rope_theta=100000, rope_scaling=None, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    calibration = Calibration.from_pretrained(Path(__file__).parents[2] / "calibrations" / "smollm2-135m-instruct")
    calibration.check_fingerprint(fingerprint_of(model))
    assert "4 bits" in calibration.manifest.note
    assert calibration.manifest.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.rope_parameters["rope_theta"] = 10000
    with pytest.raises(CalibrationMismatchError, match="rope"):
        calibration.check_fingerprint(fingerprint_of(model))
