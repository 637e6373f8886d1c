"""The calibration object: what was measured about one model, and the thresholds that follow from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from patchattn.calibration import files, hub
from patchattn.calibration.card import write_card
from patchattn.calibration.encoding import check, decode, encode
from patchattn.calibration.findings import Expected, Findings
from patchattn.calibration.key_moments import unpack_moments
from patchattn.calibration.manifest import Fingerprint, Manifest
from patchattn.calibration.places import fix_for, looks_like_path, no_folder
from patchattn.calibration.price_table import with_prices
from patchattn.calibration.risk import Curves
from patchattn.errors import (
    CalibrationError,
    CalibrationFormatError,
    CalibrationMismatchError,
    CalibrationNotFoundError,
)
from patchattn.gates import MomentGate
from patchattn.gates.measured import MeasuredHeads
from patchattn.gates.thresholds import KLTarget, OpenFractionTarget, RiskTarget, Target
from patchattn.moments.gaussian import Estimate
from patchattn.moments.text import RotaryMoments
from patchattn.policy import Policy
from patchattn.writing import made


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured about one model; from `patchattn.calibrate` or `Calibration.from_pretrained`.

    Args:
        manifest: Which model, which text, measured how.
        policy: The policy that `patch(model, calibration=...)` uses when it is given none.
        tensors: The measured tensors, as `patchattn.calibration.encoding.expected_tensors` names them; not to be
            changed in place.

    Raises:
        CalibrationFormatError: Tensors that do not fit the manifest, or numbers that can't be.
        CalibrationMismatchError: A policy for another sink or window than was measured, or a target for other moments.
    """

    manifest: Manifest
    policy: Policy
    tensors: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        check(self.manifest, self.tensors)
        self.check_policy(self.policy)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Calibration:
        """Read a calibration from a folder, or from a repository on the Hub.

        What exists as a folder, can't be a Hub id (`./a`, `a/b/c`) or is a `Path` is a folder. `HF_HUB_OFFLINE`,
        `HF_ENDPOINT` and `HF_HOME` are respected.

        Args:
            repo_or_folder: Folder made by `save_pretrained`, or a Hub id `namespace/name`.
            revision: Branch, tag or commit on the Hub; not for folders. Without one, a warning names the commit that
                was taken.
            token: Token for private repositories; None uses the one that is logged in.
            cache_dir: Where downloads are kept; None means the Hub's own cache.
            local_files_only: Use the cache only.

        Raises:
            CalibrationNotFoundError: No such folder, repository, revision or file, or no right to see it.
            CalibrationHubError: The Hub can't be reached or fails.
            CalibrationFormatError: A damaged file, or not a calibration.
            CalibrationError: A revision of a folder.
        """
        folder = Path(repo_or_folder)
        if folder.is_dir():
            if revision is not None:
                raise CalibrationError(
                    f"{folder} is a folder, which has no revision {revision!r}.",
                    fix="leave the revision out; for a repository of that name, work in another directory",
                )
        elif looks_like_path(repo_or_folder):
            raise CalibrationNotFoundError(
                no_folder(folder), fix=fix_for(folder, "give a folder made by Calibration.save_pretrained")
            )
        else:
            folder = hub.download(
                str(repo_or_folder),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        manifest, tensors = decode(files.read(folder / files.FILE))
        try:
            policy = Policy.model_validate_json(files.read(folder / files.POLICY_FILE))
        except ValidationError as error:
            raise CalibrationFormatError(
                f"{files.POLICY_FILE} is not a valid policy: {error.errors()[0]['msg']} "
                f"({'.'.join(map(str, error.errors()[0]['loc']))}).",
                fix="correct the file; docs/reference/policy.md lists the fields",
            ) from None
        return cls(manifest, policy, tensors)

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: bool = True) -> Path:
        """Write the calibration into a folder, with its model card.

        Each file is complete or not there, and what was there before stays until then. Two processes that write one
        folder take turns.

        Args:
            folder: Made if it does not exist.
            card: Write `README.md`, and the plots where matplotlib is installed.

        Raises:
            CalibrationError: The folder can't be written.
        """
        self._save(Path(folder), card=card)
        return Path(folder)

    def _save(self, folder: Path, *, card: bool, repo: str | None = None) -> None:
        from huggingface_hub.utils import WeakFileLock

        data = encode(self.manifest, self.tensors)
        with files.writing(folder), made(folder), WeakFileLock(files.lock_of(folder)):
            files.write(folder / files.FILE, data)
            files.write(folder / files.POLICY_FILE, (self.policy.model_dump_json(indent=2) + "\n").encode())
            if card:
                write_card(self.findings, folder, repo=repo)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> str:
        """Publish the calibration with its card; the repository is made if it does not exist.

        Args:
            repo: Hub id `namespace/name`.
            private: Whether a new repository is private; None leaves it to the namespace.
            commit_message: None says what was measured.
            create_pr: Open a pull request in place of a commit on the main branch.
            token: Token with the right to write; None uses the one that is logged in.

        Returns:
            The commit, to pin it: `Calibration.from_pretrained(repo, revision=commit)`.

        Raises:
            CalibrationNotFoundError: No such namespace, or no right to write.
            CalibrationHubError: The Hub can't be reached or fails.
        """
        message = commit_message or f"Calibration of {self.manifest.model} on {self.manifest.n_documents} documents"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._save(folder, card=True, repo=repo)
            return hub.upload(folder, repo, private=private, message=message, create_pr=create_pr, token=token)

    @property
    def findings(self) -> Findings:
        """What tables, cards and pictures show."""
        return self._found(None)

    def _found(self, estimate: Estimate | None) -> Findings:
        own, source = self._estimate_of(self.policy), self.manifest.prices
        own = own or (self.manifest.estimates[0] if source is None else source.estimate)
        return Findings(self.manifest, self.tensors, estimate or own, _target_of(self.policy))

    def curves(self, estimate: Estimate | None = None) -> Curves:
        """Return the curves of one estimate; None means the policy's own, else the priced, else the first measured one.

        Raises:
            CalibrationError: The estimate was not measured.
        """
        return self._found(estimate).curves

    def thresholds(self, target: Target, *, estimate: Estimate | None = None) -> Tensor:
        """Choose the margin from which each head closes.

        Args:
            target: A risk, a KL or a budget. Thresholds that weigh KL go with the offsets of the probe.
            estimate: Which estimate the gate uses; see `curves`.

        Returns:
            [layers, query_heads] float32, nats, in the order of `manifest.layers`. -inf: the head is closed for every
            query. +inf: it is open for every query.

        Raises:
            CalibrationError: The target promises more than the documents can carry, or needs prices that are not there.
        """
        return self._found(estimate).thresholds(target)

    def expected(self, margins: Tensor, *, estimate: Estimate | None = None) -> Expected:
        """Say what thresholds gave on the documents that were measured; see `Findings.expected`."""
        return self._found(estimate).expected(margins)

    def heads_by_oracle(self) -> list[tuple[int, int]]:
        """Rank all measured (layer, query head), the one that the exact share opens most often first."""
        return self._ranked(self.tensors["oracle_open_fraction"])

    def heads_by_price(self) -> list[tuple[int, int]]:
        """Rank all measured (layer, query head), the one first whose closing costs most KL; needs prices."""
        return self._ranked(with_prices(self.findings).priced().value[..., 0])

    def _ranked(self, values: Tensor) -> list[tuple[int, int]]:
        order, heads = values.flatten().argsort(descending=True, stable=True).tolist(), values.shape[1]
        return [(self.manifest.layers[index // heads], index % heads) for index in order]

    def key_moments(self, layer: int) -> RotaryMoments:
        """Return the measured moments of a layer's keys, before the rotary embedding.

        Raises:
            CalibrationError: The calibration has none, or not of this layer.
        """
        rotary = self.manifest.rotary
        if rotary is None:
            raise CalibrationError("The calibration has no key moments.", fix="measure it again with key moments")
        dim = self.manifest.fingerprint.head_dim
        return unpack_moments(self.tensors, self._layer_index(layer), rotary.order(dim))

    def check_policy(self, policy: Policy) -> None:
        """Refuse a policy with another sink or window than was measured, or a target for other moments.

        Raises:
            CalibrationMismatchError: Names both.
        """
        measured, wanted = self.manifest, (policy.sink_size, policy.window_size)
        if (measured.sink_size, measured.window_size) != wanted:
            raise CalibrationMismatchError(
                f"The calibration measured sink {measured.sink_size} and window {measured.window_size}; the policy has "
                f"sink {wanted[0]} and window {wanted[1]}.",
                fix="use the sink and window that were measured, or measure again",
            )
        gate = policy.gate
        if isinstance(gate, MomentGate) and _target_of(policy) is not None and gate.moments != measured.moments:
            raise CalibrationMismatchError(
                f"The curves of this calibration were measured with moments={measured.moments!r}; the policy asks for "
                f"a target with moments={gate.moments!r}.",
                fix="use the moments that were measured, a threshold that is a number, or measure with this policy",
            )

    def check_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Refuse a model that differs from the measured one in any field of its fingerprint.

        Args:
            fingerprint: That of the model at hand, from `patchattn.hf.fingerprint.fingerprint_of`.

        Raises:
            CalibrationMismatchError: Names the fields, the measured value and the model's.
        """
        differences = self.manifest.fingerprint.differences(fingerprint)
        if differences:
            raise CalibrationMismatchError(
                f"The calibration is of {self.manifest.model}, which differs from this model "
                f"(measured, this model): {'; '.join(differences)}.",
                fix="use the calibration of this model, or measure one with patchattn.calibrate",
            )

    def risk_curve(self, policy: Policy, heads: Mapping[int, int]) -> dict[str, Any]:
        """Say what risks would cost under a policy, for the page of a report.

        Args:
            policy: The policy of the report; its sink and window must be those that were measured.
            heads: Number of query heads of each layer of the report.

        Returns:
            See `Findings.points_of`.

        Raises:
            CalibrationMismatchError: The calibration is of other layers or heads, or of another sink or window.
        """
        self.check_policy(policy)
        measured, counts = self.manifest, set(heads.values())
        if not heads.keys() <= set(measured.layers) or counts - {measured.fingerprint.query_heads}:
            raise CalibrationMismatchError(
                f"The calibration measured layers {list(measured.layers)} of {measured.fingerprint.query_heads} query "
                f"heads; the report has layers {list(heads)} of {sorted(counts)} heads.",
                fix="use the calibration of the model that was run",
            )
        return self._found(self._estimate_of(policy)).points_of([self._layer_index(layer) for layer in heads] or None)

    def measured_heads(self, policy: Policy) -> dict[int, MeasuredHeads]:
        """Prepare what a policy's gate needs, by layer; empty if it needs nothing. Its layers must have been measured.

        Raises:
            CalibrationError: The target, the estimate or a layer was not measured well enough.
            CalibrationMismatchError: Another sink or window, or a target for other moments.
        """
        self.check_policy(policy)
        gate = policy.gate
        if not isinstance(gate, MomentGate) or not gate.needs_calibration:
            return {}
        layers = self.manifest.layers if policy.layers is None else policy.layers
        indices = [self._layer_index(layer) for layer in layers]
        target = _target_of(policy)
        margins, probe = (None, None) if target is None else self._found(gate.estimate).offsets(target)
        return {
            layer: MeasuredHeads(
                None if margins is None else margins[index],
                self.key_moments(layer) if gate.moments == "calibration" else None,
                None if probe is None else probe[index],
            )
            for layer, index in zip(layers, indices, strict=True)
        }

    def expected_kl(self, policy: Policy) -> float | None:
        """Say which KL to dense a policy's prefill is expected to have, nats per token; None where prices don't say."""
        if (target := _target_of(policy)) is None or "prefill" not in policy.phases:
            return None
        layers = [self._layer_index(layer) for layer in policy.layers or self.manifest.layers]
        return self._found(self._estimate_of(policy)).expected_kl(target, layers)

    def _layer_index(self, layer: int) -> int:
        if layer not in self.manifest.layers:
            raise CalibrationError(
                f"Layer {layer} was not measured; the calibration has layers {list(self.manifest.layers)}.",
                fix="name only measured layers in Policy.layers",
            )
        return self.manifest.layers.index(layer)

    def _estimate_of(self, policy: Policy) -> Estimate | None:
        """Return the estimate of a policy's gate; None where it has none that was measured."""
        gate = policy.gate
        return gate.estimate if isinstance(gate, MomentGate) and gate.estimate in self.manifest.estimates else None


def _target_of(policy: Policy) -> Target | None:
    """Return the target that a policy's gate takes its thresholds from; None where it has none."""
    threshold = policy.gate.threshold if isinstance(policy.gate, MomentGate) else None
    return threshold if isinstance(threshold, RiskTarget | OpenFractionTarget | KLTarget) else None
