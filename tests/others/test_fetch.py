"""What is read out of a source distribution, and what is said where it is not the right one."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fetch


def archive(folder, files):
    path = folder / "transformers-9.9.9.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"transformers-9.9.9/{name}")
            entry.size = len(text)
            packed.addfile(entry, io.BytesIO(text))
    return path


ABOUT = b"Metadata-Version: 2.4\nName: transformers\nVersion: 9.9.9\n\nText.\n"


def test_the_tests_are_kept_in_the_cache_and_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = archive(tmp_path, {"PKG-INFO": ABOUT, fetch.WANTED: b"assert True\n"})
    downloads = []
    monkeypatch.setattr(fetch, "_download", lambda version, folder: downloads.append(version) or made)
    for _ in range(2):
        found = fetch.common_tests("9.9.9")
        assert found.read_text() == "assert True\n"
        assert found.is_relative_to(tmp_path / "cache")
    assert downloads == ["9.9.9"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"PKG-INFO": ABOUT.replace(b"9.9.9", b"9.9.8"), fetch.WANTED: b""}, "another version"),
        ({"PKG-INFO": ABOUT}, "test_modeling_common.py"),
    ],
)
def test_an_archive_that_is_not_the_right_one_is_refused(files, said, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = archive(tmp_path, files)
    monkeypatch.setattr(fetch, "_download", lambda version, folder: made)
    with pytest.raises(fetch.CannotFetchError, match=said):
        fetch.common_tests("9.9.9")
    assert not (tmp_path / "cache").exists()


def test_where_there_is_no_index_the_error_says_what_to_do(tmp_path, monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(fetch.CannotFetchError, match=r"python tests/others/fetch\.py"):
        fetch._download("9.9.9", tmp_path)
