"""Measure a calibration: stream documents through the model with the exact masses beside the estimates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.calibration import files
from patchattn.calibration.calibration import Calibration
from patchattn.calibration.manifest import Corpus, Fingerprint, Manifest
from patchattn.errors import CalibrationError, UnsupportedModelError
from patchattn.gates.gate import Measured, with_margins
from patchattn.hf.architecture import commit_of, context_of, name_of
from patchattn.hf.context import check_context
from patchattn.hf.fingerprint import fingerprint_of
from patchattn.hf.hooks import STATE
from patchattn.hf.patching import patch
from patchattn.hf.support import Supported, attention_modules, check_support
from patchattn.hf.weights import input_device
from patchattn.measuring.checkpoint import keep, resume
from patchattn.measuring.documents import cut_documents, digest_of, share_out
from patchattn.measuring.find_rotary import FoundRotary, find_rotary
from patchattn.measuring.statistics import ESTIMATES, MARGINS, Document, Settings, Totals
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.policy import MomentGate, OpenGate, Policy

Progress = Callable[[int, int], None]
"""Called with the number of finished documents and of all documents."""

_LONGEST_DEFAULT = 4096


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    policy: Policy | None = None,
    *,
    lengths: Sequence[int] | None = None,
    documents: int | None = None,
    seed: int = 0,
    corpus: str = "unnamed",
    model_name: str | None = None,
    key_moments: bool = True,
    oracle_threshold: float = 0.6,
    checkpoint: str | Path | None = None,
    progress: Progress | bool = False,
) -> Calibration:
    """Measure what a model's heads miss when they are closed, on documents cut from texts.

    Each document is read in one forward pass with dense attention; memory is linear in its length. Under an
    initialised `torch.distributed`, the processes share the documents, add up their sums and all return the same
    calibration; every process must hold the whole model.

    Args:
        model: A Hugging Face causal language model that `check_support` accepts, in evaluation mode.
        tokenizer: Its tokenizer.
        texts: Texts. Each is cut into documents, one after another, of the next of `lengths`; what is left over
            counts as a document only if the text is shorter than that. The promises of `RiskTarget` are for documents
            that are drawn like these.
        policy: Sink, window, layers and source of the moments to measure, and the policy that the calibration brings
            along; None means `Policy()`. With `MomentGate(moments="calibration")` every fifth document gives moments
            of its keys only, and targets hold for those moments.
        lengths: Lengths in tokens, used in turn; None means the model's context, at most 4,096.
        documents: Measure this many, drawn with `seed`; None measures all.
        seed: Order of the documents.
        corpus: What the text is, for the card.
        model_name: Name of the model, for the card; None takes the name or folder it was loaded from.
        key_moments: Take moments of the keys for `MomentGate(moments="calibration")`.
        oracle_threshold: Local share below which a pair counts as one that should open, for recall and precision.
        checkpoint: File to which the sums are written after each document; a run that finds it there goes on from
            it. Removed at the end. Each of several processes adds its rank to the name.
        progress: True shows a bar with the time left on standard error; a function is called after each document.

    Returns:
        The calibration.

    Raises:
        UnsupportedModelError: The model can't be patched.
        CalibrationError: No document has bulk keys, there are fewer than `documents`, documents are longer than the
            model's context, the model is in training mode or cut by tensor parallelism, or the checkpoint is of
            another run.
        PatchStateError: The model is patched already.
    """
    policy = Policy() if policy is None else policy
    source: Literal["prompt", "calibration"] = policy.gate.moments if isinstance(policy.gate, MomentGate) else "prompt"
    if source == "calibration" and not key_moments:
        raise CalibrationError(
            'The policy\'s gate has moments="calibration", but key_moments is False.', fix="leave key_moments True"
        )
    settings, fingerprint = settings_of(model, policy, lengths, oracle_threshold, key_moments=key_moments)
    lengths = tuple(lengths or (_default_length(model),))
    cut = cut_documents(tokenizer, texts, lengths, documents=documents, seed=seed, local=_local(policy))
    apart, measured = share_out(len(cut), source)
    found = _rotary(model, settings, max(map(len, cut)), source)
    digest = digest_of(cut)
    rank, world = _ranks()
    kept = None if checkpoint is None else Path(f"{checkpoint}.{rank}" if world > 1 else checkpoint)
    key = hashlib.sha256(
        json.dumps([asdict(settings), fingerprint.model_dump(), source, digest, _local(policy), rank, world]).encode()
    ).hexdigest()
    totals = Totals(settings, rotations=None if found is None else dict(found.rotations))
    done = 0 if kept is None else resume(totals, kept, key)
    with _told(progress=progress) as tell, Collecting(model, policy, settings) as collecting:

        def read(index: int, document: Document, count: int) -> None:
            collecting.start(document)
            read_document(model, cut[index])
            if kept is not None:
                keep(totals, kept, key, count)
            tell(min(count * world, len(cut)), len(cut))

        here = apart[rank::world]
        for count, index in enumerate(here, start=1):
            if count > done:
                read(index, totals.add_keys_of_document(), count)
        if apart and found is not None:
            tensors, _ = _key_tensors(_added_up(totals.sums), found)
            order = found.rotary.order(settings.head_dim)
            layers = enumerate(settings.layers)
            totals.moments = {layer: files.unpack_moments(tensors, at, order) for at, layer in layers}
        for at in range(rank, len(measured), world):
            count = len(here) + at // world + 1
            if count > done:
                read(measured[at], totals.add_document(at), count)
    totals.sums = _added_up(totals.sums)
    if kept is not None:
        kept.unlink(missing_ok=True)
    even, odd = (int(count) for count in totals.sums["documents"])
    manifest = Manifest(
        model=model_name or _name(model),
        commit=commit_of(model),
        fingerprint=fingerprint,
        sink_size=policy.sink_size,
        window_size=policy.window_size,
        layers=settings.layers,
        estimates=ESTIMATES,
        oracle_threshold=oracle_threshold,
        lengths=lengths,
        moments=source,
        documents=(even, odd),
        corpus=Corpus(name=corpus, sha256=digest, tokens=sum(map(len, cut))),
        rotary=None if found is None else found.rotary,
        moment_documents=0 if found is None else len(apart or measured),
        versions=_versions(),
    )
    return _assemble(manifest, policy, totals, found)


def _rotary(model: Any, settings: Settings, longest: int, source: str) -> FoundRotary | None:
    """Find out how keys are turned, for their moments; None where none are taken.

    Raises:
        CalibrationError: Moments are needed but can't be taken.
    """
    if not settings.key_moments:
        return None
    with Collecting(model, Policy(sink_size=0, window_size=1), settings) as collecting:
        found = find_rotary(collecting, longest)
    if found is None:
        unknown = f"The keys of {type(model).__name__} are not turned in a way that is known"
        if source == "calibration":
            raise CalibrationError(f"{unknown}, so there are no moments of other text.", fix='use moments="prompt"')
        warnings.warn(f"{unknown}; the calibration will have no key moments.", stacklevel=3)
    return found


def settings_of(
    model: Any, policy: Policy, lengths: Sequence[int] | None, oracle_threshold: float, *, key_moments: bool
) -> tuple[Settings, Fingerprint]:
    """Check that a model can be measured, and say what will be; see `calibrate`.

    Raises:
        UnsupportedModelError: The model can't be patched.
        CalibrationError: It is in training mode, or the documents are too short for the policy.
    """
    support = check_support(model)
    if not isinstance(support, Supported):
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be measured: {' '.join(support.reasons)}",
            fix="patchattn.check_support(model) lists the reasons",
        )
    if model.training:
        raise CalibrationError("The model is in training mode.", fix="call model.eval() first")
    if getattr(model, "_device_mesh", None) is not None:
        raise CalibrationError(
            "The model is cut by tensor parallelism, so that no process holds all of its heads.",
            fix="load it whole in each process, for instance with device_map",
        )
    if not 0 < oracle_threshold < 1:
        raise CalibrationError(f"oracle_threshold must lie in (0, 1), got {oracle_threshold}.", fix="for instance 0.6")
    if lengths and min(lengths) < 1:
        raise CalibrationError(f"Expected lengths of at least 1 token, got {list(lengths)}.", fix="for instance 4096")
    longest = max(lengths or (_default_length(model),))
    if longest <= sum(_local(policy)):
        raise CalibrationError(
            f"Documents of {longest} tokens have no keys beyond sink {policy.sink_size} and window "
            f"{policy.window_size}.",
            fix="measure longer documents, or choose a smaller window",
        )
    check_context(model, [longest], CalibrationError)
    fingerprint = fingerprint_of(model)
    margin = math.log(oracle_threshold) - math.log1p(-oracle_threshold)
    layers = support.layers if policy.layers is None else policy.layers
    of = fingerprint
    return Settings(tuple(layers), of.query_heads, of.kv_heads, of.head_dim, key_moments, margin), fingerprint


class Collecting:
    """Patch a model so that its layers add to totals; undone on exit.

    Args:
        model: The model.
        policy: Sink and window.
        settings: What is measured.
        measured: Thresholds per head by layer, to measure on gated activations; None measures on dense ones.
    """

    def __init__(
        self, model: Any, policy: Policy, settings: Settings, *, measured: dict[int, Measured] | None = None
    ) -> None:
        self.model, self.settings, self.measured = model, settings, measured or {}
        self.policy = policy.model_copy(
            update={
                "gate": OpenGate(),
                "min_bulk": 0,
                "layers": settings.layers,
                "phases": frozenset({"prefill", "decode"}),
            }
        )

    def __enter__(self) -> Collecting:
        """Patch the model."""
        self.handle = patch(self.model, self.policy, backend="reference", record=None)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the model back."""
        self.handle.unpatch()

    def start(self, document: Document) -> None:
        """Let the calls that follow add to a document."""
        for layer, module in attention_modules(self.model).items():
            if layer in self.settings.layers:
                module._modules[STATE].attend = _attend_into(document, layer, self.measured.get(layer))


def _attend_into(document: Document, layer: int, measured: Measured | None) -> Callable[..., Any]:
    def attend(inputs: Any, bulk_log_mass: Tensor, threshold: float) -> Any:
        dense = document.attend(layer, inputs)
        if measured is None or measured.margins is None:
            return dense
        mass, _ = bulk_log_mass_from_prompt(
            inputs.query, inputs.key, inputs.regions, scale=inputs.scale, softcap=inputs.softcap
        )
        return blockwise_attend(inputs, with_margins(mass, measured.margins), 0.0)

    return attend


@torch.no_grad()
def read_document(model: Any, ids: Tensor) -> None:
    """Read a document, [tokens] ids, without making logits: those of every position can take more than all else."""
    reader = getattr(model, "base_model", model)
    reader(input_ids=ids[None].to(input_device(model)), use_cache=False)


def _assemble(manifest: Manifest, policy: Policy, totals: Totals, rotary: FoundRotary | None) -> Calibration:
    sums = totals.sums
    halves = sums["documents"]
    every, known = halves.sum(), sums["errors"][0]
    bias = sums["errors"][1] / known.clamp(min=1)
    variance = sums["errors"][2] / known.clamp(min=1) - bias.square()
    pairs = sums["open_pairs"]
    found = {
        "margins": MARGINS.clone(),
        "missed_mass": _half_upwards((sums["missed_mass"] / halves.clamp(min=1).view(2, 1, 1, 1, 1)).clamp(0, 1)),
        "open_fraction": (sums["open_fraction"] / every).clamp(0, 1).half(),
        "recall": _share(sums["hits"], sums["oracle_pairs"][None, ..., None].expand_as(pairs)).half(),
        "precision": _share(sums["hits"], pairs).half(),
        "bias": bias.float(),
        "spread": variance.clamp(min=0).sqrt().float(),
        "known_fraction": (known / sums["asked"][:, None].clamp(min=1)).float(),
        "oracle_open_fraction": (sums["oracle_open_fraction"] / every).float(),
    }
    if rotary is not None:
        tensors, error = _key_tensors(sums, rotary)
        found |= tensors
        # Two digits: the last ones depend on the order of the sums.
        error = min(float(f"{error:.1e}"), 1.0)
        manifest = manifest.model_copy(update={"covariance_error": error})
    return Calibration(manifest, policy, found)


def _key_tensors(sums: dict[str, Tensor], rotary: FoundRotary) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of the key moments, and the error of storing a covariance."""
    divisor = sums["key_count"].clamp(min=1)[:, None, None]
    mean = sums["key_total"] / divisor
    covariance = sums["key_outer"] / divisor[..., None] - mean[..., :, None] * mean[..., None, :]
    deviation, factor, error = files.pack_covariance((covariance + covariance.mT) / 2)
    frequencies = torch.stack([rotation.frequencies for rotation in rotary.rotations.values()])
    found = {"key_mean": mean.float(), "key_deviation": deviation, "key_factor": factor}
    return found | {"key_frequencies": frequencies.float()}, error


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Divide counts; a share of nothing is 1."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1).clamp(0, 1)


def _half_upwards(values: Tensor) -> Tensor:
    """Round values in [0, 1] to half precision, never down, so that no promise is broken by rounding."""
    rounded = values.half()
    # Positive half floats are ordered like their bits.
    upwards = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.double() < values, upwards, rounded)


@contextlib.contextmanager
def _told(*, progress: Progress | bool) -> Iterator[Progress]:
    if not isinstance(progress, bool):
        yield progress
        return
    from tqdm import tqdm

    with tqdm(desc="measuring documents", unit="document", disable=not progress) as bar:

        def tell(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield tell


def _ranks() -> tuple[int, int]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _added_up(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return sums over all processes."""
    if _ranks()[1] == 1:
        return sums
    on_gpu = torch.distributed.get_backend() == "nccl"
    found = {}
    for name, values in sums.items():
        shared = values.cuda() if on_gpu else values.clone()
        torch.distributed.all_reduce(shared)
        found[name] = shared.cpu()
    return found


def _local(policy: Policy) -> tuple[int, int]:
    return policy.sink_size, policy.window_size


def _default_length(model: Any) -> int:
    return min(context_of(model) or _LONGEST_DEFAULT, _LONGEST_DEFAULT)


def _name(model: Any) -> str:
    name = name_of(model)
    # A folder's full path says something about the machine, not about the model.
    return Path(name).name if Path(name).is_dir() else name


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("patchattn", "torch", "transformers")}
