"""Calibrations on the Hub, with the real client against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download
from typer.testing import CliRunner

import patchattn
from patchattn.calibration import Calibration, encoding, files, pictures
from patchattn.cli.app import app
from patchattn.errors import (
    CalibrationError,
    CalibrationFormatError,
    CalibrationHubError,
    CalibrationNotFoundError,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

import hub_server
from hub_server import TOKEN, FakeHub
from made_up import made_up_calibration

REPO = "me/made-up-patchattn"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    server = FakeHub()
    server.serve_client(monkeypatch, tmp_path / "cache")
    # Drawing takes most of the time of a push, and what is drawn is tested elsewhere.
    monkeypatch.setattr(pictures, "draw", lambda _: {"risk.png": b"picture"})
    yield server
    server.close()


def push(calibration=None, **fields) -> str:
    calibration = made_up_calibration() if calibration is None else calibration
    return calibration.push_to_hub(REPO, **fields)


def pull(revision: str | None = "main", **fields) -> Calibration:
    return Calibration.from_pretrained(REPO, revision=revision, **fields)


def same(one: Calibration, other: Calibration) -> bool:
    tensors = all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    return tensors and one.manifest == other.manifest and one.policy == other.policy


def test_push_and_pull_by_branch_tag_and_commit(hub: FakeHub) -> None:
    first, second = made_up_calibration(seed=1), made_up_calibration(seed=2)
    commit = push(first)
    hub.repos[REPO].names["v1"] = commit
    later = push(second, commit_message="Second")
    assert hub.repos[REPO].messages == ["Calibration of org/made-up on 100 documents", "Second"]
    assert same(pull("main"), second)
    assert same(pull("v1"), first)
    assert same(pull(commit), first)
    assert same(pull(later), second)
    names = set(hub.repos[REPO].commits[commit])
    assert names == {files.FILE, files.POLICY_FILE, "README.md", "plots/risk.png"}
    card = hub.repos[REPO].commits[commit]["README.md"].decode()
    assert f'calibration="{REPO}"' in card
    assert "base_model: org/made-up" in card


def test_without_a_revision_a_warning_names_the_commit(hub: FakeHub) -> None:
    commit = push()
    with pytest.warns(UserWarning, match=f"revision='{commit}'"):
        pull(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pull(commit)


def test_both_files_come_from_one_commit_when_the_branch_moves(hub: FakeHub) -> None:
    push(made_up_calibration(seed=1))
    asked = len(hub.requests)
    pull("main")
    wanted = [line for line in hub.requests[asked:] if files.POLICY_FILE in line]
    commit = hub.repos[REPO].names["main"]
    assert wanted
    assert all(commit in line for line in wanted)


def test_private_repositories_need_a_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(private=True)
    assert hub.repos[REPO].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CalibrationNotFoundError, match="private") as caught:
        pull(token=False)
    assert "token=" in caught.value.fix
    assert pull(token=TOKEN).manifest.model == "org/made-up"


def test_what_is_missing_is_named(hub: FakeHub) -> None:
    commit = push()
    with pytest.raises(CalibrationNotFoundError, match="no folder me/nothing here, and no repository me/nothing"):
        Calibration.from_pretrained("me/nothing", revision="main")
    with pytest.raises(CalibrationNotFoundError, match="no revision 'v9'"):
        pull("v9")
    without = hub.repos[REPO].commits[commit]
    del without[files.POLICY_FILE]
    with pytest.raises(CalibrationNotFoundError, match=r"no policy\.json"):
        pull(commit)
    del without[files.FILE]
    with pytest.raises(CalibrationNotFoundError, match=r"no calibration\.safetensors"):
        pull(commit)
    asked = len(hub.requests)
    with pytest.raises(CalibrationNotFoundError, match="neither a folder nor the name of a repository"):
        Calibration.from_pretrained("up and/away")
    for path in ("up/and/../away", "../up/and/away", "./away", "/away", "~/away", Path("up/away")):
        with pytest.raises(CalibrationNotFoundError, match="There is no folder"):
            Calibration.from_pretrained(path)
    assert len(hub.requests) == asked


def test_nothing_outside_the_two_files_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    commit = push()
    hub.repos[REPO].commits[commit] |= {"../../outside": b"x", "evil.py": b"raise SystemExit", "model.pkl": b"x"}
    assert same(pull(commit), made_up_calibration())
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert cached == {files.FILE, files.POLICY_FILE}
    assert not list(tmp_path.rglob("outside"))


def test_offline_the_cache_is_enough(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationNotFoundError, match="not in the cache"):
        pull("main", local_files_only=True)
    commit = push()
    pull("main")
    hub.fail_with = 500
    assert same(pull("main", local_files_only=True), made_up_calibration())
    assert same(pull(commit), made_up_calibration())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(pull("main"), made_up_calibration())
    with pytest.raises(CalibrationNotFoundError, match="switched off"):
        pull("v9")


def test_server_errors_and_broken_downloads_are_typed_and_leave_nothing_behind(hub: FakeHub, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    push()
    for status in (500, 503):
        hub.fail_with = status
        with pytest.raises(CalibrationHubError):
            pull()
        with pytest.raises(CalibrationHubError):
            push()
    hub.fail_with = None
    hub.cut_off = True
    with pytest.raises(CalibrationHubError):
        pull()
    hub.cut_off = False
    assert same(pull(), made_up_calibration())


def test_a_slow_server_is_waited_for(hub: FakeHub) -> None:
    push()
    hub.delay, hub.trickle = 0.2, 0.05
    assert same(pull(), made_up_calibration())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a fifth of a second for an answer, and not at all between tries."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.2)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("slow", ["delay", "stall", "trickle"])
def test_a_server_slower_than_the_timeout_is_a_hub_error_and_the_next_try_works(hub: FakeHub, slow: str) -> None:
    push()
    setattr(hub, slow, 0.6)
    with pytest.raises(CalibrationHubError) as caught:
        pull()
    assert "local_files_only=True" in caught.value.fix
    setattr(hub, slow, 0.0)
    assert same(pull(), made_up_calibration())


@pytest.mark.usefixtures("impatient")
def test_what_is_in_the_cache_is_used_when_the_server_stalls(hub: FakeHub) -> None:
    commit = push()
    pull(commit)
    hub.stall = 0.6
    assert same(pull(commit), made_up_calibration())


def test_a_hub_that_hangs_up_is_typed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    push()
    hub.hang_up = True
    with pytest.raises(CalibrationHubError):
        pull()


def test_a_changed_file_under_a_pinned_commit_is_noticed_or_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    first = made_up_calibration(seed=1)
    commit = push(first)
    pull(commit)
    # Changed on the server: what is pinned and in the cache stays what it was.
    other = encoding.encode(made_up_calibration(seed=2).manifest, made_up_calibration(seed=2).tensors)
    kept = hub.repos[REPO].commits[commit]
    kept[files.FILE] = other
    assert same(pull(commit), first)
    # Changed in the cache: the file is not what its digest says.
    blob = next(path.resolve() for path in (tmp_path / "cache").rglob(files.FILE))
    blob.chmod(0o644)
    blob.write_bytes(other)
    with pytest.raises(CalibrationFormatError, match="not the file that its digest"):
        pull(commit)


def test_a_file_changed_on_the_server_before_it_was_fetched_is_noticed_by_its_digest(hub: FakeHub, monkeypatch) -> None:
    commit = push()
    other = encoding.encode(made_up_calibration(seed=2).manifest, made_up_calibration(seed=2).tensors)
    digest = hub_server._git_digest
    right = digest(hub.repos[REPO].commits[commit][files.FILE])
    hub.repos[REPO].commits[commit][files.FILE] = other
    # The server still promises what was committed.
    monkeypatch.setattr(hub_server, "_git_digest", lambda data: right if data == other else digest(data))
    with pytest.raises(CalibrationFormatError, match="not the file that its digest"):
        pull(commit)


def test_a_repository_with_something_else_in_it_is_refused(hub: FakeHub) -> None:
    push()
    hub.repos[REPO].commit({files.FILE: b"\x80\x04pickle" * 20})
    with pytest.raises(CalibrationFormatError):
        pull()


def test_pull_requests_leave_the_branch_alone(hub: FakeHub) -> None:
    commit = push(made_up_calibration(seed=1))
    push(made_up_calibration(seed=2), create_pr=True)
    assert hub.repos[REPO].names["main"] == commit
    assert same(pull("main"), made_up_calibration(seed=1))


def test_pushing_without_the_right_is_refused(hub: FakeHub) -> None:
    with pytest.raises(CalibrationError):
        push(token="hf_wrong")
    assert REPO not in hub.repos


def test_patch_takes_a_repository(hub: FakeHub) -> None:
    from patchattn.testing import tiny_model

    sys.path[:0] = [str(Path(__file__).parents[1] / "unit")]
    from test_measuring import POLICY, Letters, texts

    model = tiny_model("llama")
    patchattn.calibrate(model, Letters(), texts(), POLICY, lengths=(300,)).push_to_hub(REPO)
    with pytest.warns(UserWarning, match="was taken at commit"), patchattn.patch(model, calibration=REPO) as handle:
        assert handle.policy.gate == POLICY.gate


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_commands_push_pull_inspect_and_card(hub: FakeHub, tmp_path: Path) -> None:
    made_up_calibration().save_pretrained(tmp_path / "here", card=False)
    result = run("push", tmp_path / "here", REPO, "--message", "Try")
    assert result.exit_code == 0, result.output
    commit = result.stdout.strip()
    assert hub.repos[REPO].names["main"] == commit
    assert hub.repos[REPO].messages == ["Try"]
    found = json.loads(run("push", tmp_path / "here", REPO, "--json").stdout)
    assert found == {"repo": REPO, "commit": hub.repos[REPO].names["main"]}
    result = run("pull", REPO, tmp_path / "there", "--revision", commit)
    assert result.exit_code == 0, result.output
    assert f"Calibration of org/made-up on 100 documents, in {tmp_path / 'there'}" in result.stdout
    result = run("pull", REPO, tmp_path / "again", "--revision", commit, "--json")
    assert json.loads(result.stdout)["calibration"] == str(tmp_path / "again")
    assert same(Calibration.from_pretrained(tmp_path / "there"), made_up_calibration())
    result = run("inspect", REPO, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["manifest"]["model"] == "org/made-up"
    assert hub.repos[REPO].names["main"] in result.stderr
    assert "# patchattn calibration of org/made-up" in run("card", REPO).stdout
    asked = len(hub.requests)
    for arguments, words in {
        ("inspect", "me/nothing"): "no repository me/nothing",
        ("pull", REPO, tmp_path / "x", "--revision", "v9"): "has no revision 'v9'",
        ("push", tmp_path / "typo", REPO): f"There is no folder {tmp_path / 'typo'}",
        ("push", "no/folder", REPO): "There is no folder no/folder",
        ("card", "no/folder", "--write"): "There is no folder no/folder",
        ("inspect", "./typo"): "There is no folder typo",
        ("inspect", tmp_path / "here", "--revision", "v1"): "is a folder, which has no revision 'v1'",
    }.items():
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert words in result.stderr
        assert "Fix: " in result.stderr
    # Folders are never looked for on the Hub.
    assert {line for line in hub.requests[asked:] if "folder" in line or "typo" in line} == set()


def test_environment_variables_of_the_hub_are_respected(hub: FakeHub, tmp_path: Path) -> None:
    commit = push()
    code = (
        f"import patchattn; print(patchattn.Calibration.from_pretrained({REPO!r}, revision={commit!r}).manifest.model)"
    )

    def run_with(**more: str) -> subprocess.CompletedProcess[str]:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | home | more
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)

    found = run_with()
    assert found.stdout.strip() == "org/made-up", found.stderr
    assert list((tmp_path / "home").rglob(files.FILE))
    hub.fail_with = 500
    assert run_with(HF_HUB_OFFLINE="1").stdout.strip() == "org/made-up"
