"""Measure a calibration: stream documents through the model with the exact masses beside the estimates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchattn.calibration.calibration import Calibration
from patchattn.calibration.key_moments import unpack_moments
from patchattn.calibration.manifest import Corpus, Fingerprint, Manifest, PriceSource
from patchattn.calibration.prices import TRIED
from patchattn.errors import CalibrationError, UnsupportedModelError
from patchattn.gates import MomentGate
from patchattn.hf.architecture import commit_of, context_of, hidden_size, name_of
from patchattn.hf.context import check_context
from patchattn.hf.fingerprint import fingerprint_of
from patchattn.hf.support import Supported, check_support
from patchattn.measuring.documents import cut_documents, digest_of, share_out
from patchattn.measuring.find_rotary import FoundRotary, find_rotary
from patchattn.measuring.pricing import GATED, Split, check_prices, price_documents, with_measured_kl
from patchattn.measuring.probe import Probe
from patchattn.measuring.reading import Collecting, read_document
from patchattn.measuring.statistics import ESTIMATES, Document, Settings, Totals
from patchattn.measuring.steps import Progress, Steps, ranks
from patchattn.measuring.tensors import curve_tensors, key_tensors
from patchattn.policy import Policy
from patchattn.version import VERSION

_LONGEST_DEFAULT = 4096


# Where nothing is to be differentiated, sums could not be added to.
@torch.inference_mode(mode=False)
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
    note: str = "",
    key_moments: bool = True,
    prices: bool = False,
    held_out: int = 16,
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
        note: What a reader of the card should know besides: one paragraph.
        key_moments: Take moments of the keys for `MomentGate(moments="calibration")`.
        prices: Measure what closing a pair does to the model's output, for `KLTarget`, budgets and rankings by price:
            one backward pass for each of up to 28 more readings of the documents, and documents on which the KL of the
            patched model is measured. Not with moments of the calibration.
        held_out: With prices, the KL is measured on at most so many documents: 9 allow a promise of 0.01 nats, 49 of
            0.002. Each is read seven times.
        oracle_threshold: Local share below which a pair counts as one that should open, for recall and precision.
        checkpoint: File to which the sums are written after each document; a run that finds it there goes on from
            it. Removed at the end. Each of several processes adds its rank to the name.
        progress: True shows a bar with the time left on standard error; a function is called after each document.

    Returns:
        The calibration.

    Raises:
        UnsupportedModelError: The model can't be patched.
        CalibrationError: No document has bulk keys, there are fewer than `documents`, documents are longer than the
            model's context, the model is in training mode or cut by tensor parallelism, or the checkpoint is of another
            run. With prices: there are fewer than 3 documents, or the model has no logits or no finite gradients.
            Without: the policy has a `KLTarget`.
        PatchStateError: The model is patched already.
    """
    policy = Policy() if policy is None else policy
    of_gate = policy.gate if isinstance(policy.gate, MomentGate) else MomentGate()
    moments, estimate = of_gate.moments, of_gate.estimate
    if moments == "calibration" and not key_moments:
        raise CalibrationError(
            'The policy\'s gate has moments="calibration", but key_moments is False.', fix="leave key_moments True"
        )
    settings, fingerprint = settings_of(model, policy, lengths, oracle_threshold, key_moments=key_moments)
    check_prices(model, of_gate, held_out, prices=prices)
    lengths = tuple(lengths or (_default_length(model),))
    cut = cut_documents(tokenizer, texts, lengths, documents=documents, seed=seed, local=_local(policy))
    apart, measured = share_out(len(cut), moments)
    found = _rotary(model, settings, max(map(len, cut)), moments) if key_moments else None
    digest = digest_of(cut)
    rank, world = ranks()
    kept = None if checkpoint is None else Path(f"{checkpoint}.{rank}" if world > 1 else checkpoint)
    key = hashlib.sha256(
        json.dumps(
            [
                asdict(settings),
                fingerprint.model_dump(),
                moments,
                (estimate, held_out) if prices else None,
                digest,
                _local(policy),
                rank,
                world,
            ]
        ).encode()
    ).hexdigest()
    totals = Totals(settings, rotations=None if found is None else dict(found.rotations))
    probe = Probe(totals, hidden_size(model), estimate) if prices else None
    split = Split.of(list(range(len(measured))), held_out) if prices else Split([], [], [])
    n_tried = (len(split.held_out), len(TRIED))
    totals.sums |= {name: torch.zeros(n_tried, dtype=torch.float64) for name in (("kl", "kl_open") if prices else ())}
    tensors: dict[str, Tensor] = {}
    with _told(progress=progress) as tell:
        steps = Steps(totals, kept, key, len(cut) + split.count, tell)
        with Collecting(model, policy, settings) as collecting:

            def read(document: Document, index: int) -> None:
                collecting.start(document)
                read_document(model, cut[index])

            steps.each(apart, lambda index: read(totals.add_keys_of_document(), index))
            if apart and found is not None:
                of_keys, _ = key_tensors(steps.added_up(), found.rotations)
                order = found.rotary.order(settings.head_dim)
                layers = enumerate(settings.layers)
                totals.moments = {layer: unpack_moments(of_keys, at, order) for at, layer in layers}
            steps.each(range(len(measured)), lambda at: read(totals.add_document(at), measured[at]))
        texts_measured = [cut[index] for index in measured]
        if probe is not None:
            tensors = price_documents(model, policy, settings.layers, probe, split, steps, texts_measured)
        sums, error = steps.added_up(), 0.0
        tensors |= curve_tensors(sums)
        if found is not None:
            of_keys, error = key_tensors(sums, found.rotations)
            tensors |= of_keys
        even, odd = (int(count) for count in sums["documents"])
        source = (
            PriceSource(
                estimate=estimate,
                hidden=hidden_size(model),
                fitted=len(split.fitted),
                priced=len(split.priced),
                gated=GATED,
                held_out=0,
            )
            if prices
            else None
        )
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
            moments=moments,
            documents=(even, odd),
            corpus=Corpus(name=corpus, sha256=digest, tokens=sum(map(len, cut))),
            rotary=None if found is None else found.rotary,
            moment_documents=0 if found is None else len(apart or measured),
            covariance_error=error,
            prices=source,
            versions=_versions(),
            note=note,
        )
        if source is None:
            calibration = Calibration(manifest, policy, tensors)
        else:
            calibration = with_measured_kl(model, manifest, policy, tensors, totals, split, steps, texts_measured)
    if kept is not None:
        kept.unlink(missing_ok=True)
    return calibration


def _rotary(model: Any, settings: Settings, longest: int, source: str) -> FoundRotary | None:
    """Find out how keys are turned, for their moments; None where that is not known.

    Raises:
        CalibrationError: Moments are needed but can't be taken.
    """
    found = find_rotary(model, settings.layers, longest)
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

    return {"patchattn": VERSION, **{name: version(name) for name in ("torch", "transformers")}}
