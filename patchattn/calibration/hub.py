"""Calibrations on the Hub: the only place of the library with a network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from patchattn.calibration import files
from patchattn.calibration.places import fix_for
from patchattn.errors import (
    CalibrationError,
    CalibrationFormatError,
    CalibrationHubError,
    CalibrationNotFoundError,
)


def download(
    repo: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """Get a calibration's files into the cache, all of one commit; see `Calibration.from_pretrained`.

    Returns:
        The folder in the cache that holds them.
    """
    from huggingface_hub import hf_hub_download

    get = partial(
        hf_hub_download,
        repo,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        local_files_only=local_files_only,
        library_name="patchattn",
    )
    with _explained(repo, revision, offline=local_files_only):
        tensors = Path(get(files.FILE, revision=revision))
        commit = tensors.parent.name
        # The branch may have moved on since.
        policy = Path(get(files.POLICY_FILE, revision=commit))
    for path in (tensors, policy):
        _check_digest(path)
    if revision is None:
        warnings.warn(
            f"{repo} was taken at commit {commit}. Pass revision={commit!r} to keep getting this one.", stacklevel=3
        )
    return tensors.parent


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool | None,
    message: str,
    create_pr: bool,
    token: str | bool | None,
) -> str:
    """Put the files of a folder into a repository in one commit; see `Calibration.push_to_hub`.

    Returns:
        The commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="patchattn")
    with _explained(repo, None, offline=False, may_be_folder=False):
        api.create_repo(repo, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr).oid


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, *, offline: bool, may_be_folder: bool = True) -> Iterator[None]:
    """Turn what the Hub's client raises into errors of the library."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = repo if revision is None else f"{repo} at revision {revision!r}"
    try:
        yield
    except CalibrationError:
        raise
    except HFValidationError as error:
        raise CalibrationNotFoundError(
            f"{repo!r} is neither a folder nor the name of a repository: {error}",
            fix=fix_for(repo, "give the folder of a calibration, or a Hub id such as namespace/name"),
        ) from error
    except GatedRepoError as error:
        raise CalibrationNotFoundError(
            f"{repo} asks its users to accept conditions first.", fix="accept them on its page, then give your token"
        ) from error
    except RevisionNotFoundError as error:
        raise CalibrationNotFoundError(
            f"{repo} has no revision {revision!r}.", fix="give a branch, a tag or a full commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise CalibrationNotFoundError(
            f"There is no folder {repo} here, and no repository {repo} on the Hub, or it is private and the token may "
            "not see it.",
            fix=fix_for(
                repo, "check the name; for a private repository, pass token=... or log in with `hf auth login`"
            ),
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        from huggingface_hub import constants

        if offline or constants.HF_HUB_OFFLINE:
            raise CalibrationNotFoundError(
                f"There is no folder {repo} here, and {where} is not in the cache; the network is switched off.",
                fix=fix_for(repo, "get it once with the network on, or unset HF_HUB_OFFLINE and local_files_only"),
            ) from error
        raise _unreachable(repo, where, error.__cause__ or error, may_be_folder=may_be_folder) from error
    except EntryNotFoundError as error:
        raise CalibrationNotFoundError(
            f"{where} has no {files.FILE} or no {files.POLICY_FILE}, so it is not a calibration.",
            fix="check the name and the revision",
        ) from error
    except Exception as error:
        # The client lets errors of whichever HTTP library it uses through.
        raise _unreachable(repo, where, error, may_be_folder=may_be_folder) from error


def _unreachable(repo: str, where: str, error: BaseException, *, may_be_folder: bool) -> CalibrationHubError:
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if not may_be_folder:
        return CalibrationHubError(f"The Hub failed for {where}: {said}", fix="try again later")
    return CalibrationHubError(
        f"There is no folder {repo} here, and the Hub failed for {where}: {said}",
        fix=fix_for(repo, "try again later; what is in the cache can be used with local_files_only=True"),
    )


def _check_digest(path: Path) -> None:
    """Compare a cached file with the digest it is filed under: git's for small files, sha256 for large ones."""
    blob = path.resolve()
    data = files.read(path)
    digests = {40: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), 64: hashlib.sha256(data).hexdigest()}
    if digests.get(len(blob.name), blob.name) != blob.name:
        raise CalibrationFormatError(
            f"{path.name} is not the file that its digest {blob.name} promises.",
            fix=f"delete {blob} and get it again; if that does not help, the repository was changed behind its commit",
        )
