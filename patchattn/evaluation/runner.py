"""Measure a model on tasks of several lengths: as it came, and under each policy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from patchattn.calibration.calibration import Calibration
from patchattn.errors import PatchStateError, PolicyError, UnsupportedModelError
from patchattn.evaluation.answers import written
from patchattn.evaluation.documents import DocumentError, check_longest
from patchattn.evaluation.loss import loss_by_position
from patchattn.evaluation.material import Material
from patchattn.evaluation.policies import DENSE
from patchattn.evaluation.results import Cell, Evaluation, PhaseCounts, never_asked
from patchattn.evaluation.rows import Store
from patchattn.evaluation.tasks import TEXT_LOSS, chosen_tasks, make_sample
from patchattn.hf.architecture import name_of
from patchattn.hf.patching import is_patched, patch
from patchattn.hf.weights import kept_buffers
from patchattn.policy import PHASES, Policy
from patchattn.version import VERSION

Progress = Callable[[str, int, int], None]
"""Called after each sample with what is being done, the tokens that are behind, and all tokens."""


def evaluate(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy],
    *,
    text: str,
    lengths: Sequence[int],
    tasks: Sequence[str] = ("all",),
    samples: int = 20,
    seed: int = 0,
    calibration: Calibration | str | None = None,
    backend: str = "auto",
    name: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on long-range tasks, first as it came, then under each policy.

    Everyone is asked the same questions. Answers are written greedily, so that gates decide in prefill and in decode.

    Args:
        model: A causal language model of transformers, not patched.
        tokenizer: Its tokenizer.
        policies: Policies by the names they have in the table; `dense` is measured without being named.
        text: Real text: haystack of some tasks, and what text loss is measured on.
        lengths: Tokens in prompt and answer together, one or more lengths.
        tasks: Names of tasks or groups, see `patchattn.evaluation.tasks`.
        samples: Prompts of each task, and documents of text loss as far as the text goes.
        seed: Everything random follows from it.
        calibration: For policies that need one.
        backend: Backend of the patched runs, as in `patchattn.patch`.
        name: Name of the model in the table; None takes the one of its configuration.
        checkpoint: File to which each cell is added as a line of JSON; what is in it already is not measured again.
        progress: Told about progress.

    Returns:
        The results. The model is as it was before.

    Raises:
        DocumentError: The text is empty, a length is more than the model reads, a task is unknown, or no task fits.
            If only some do not fit, they are left out and `Evaluation.notes` says why.
        UnsupportedModelError: The model has no head to write with.
        PolicyError: No policy, or one named `dense`; or as `patchattn.patch` raises it.
        PatchStateError: The model is patched.
        ReportError: The checkpoint is not the file of an evaluation.
        PatchAttnError: As `patchattn.patch` raises it.

    Example:
        >>> from patchattn import Policy, demo
        >>> model, tokenizer = demo.load()
        >>> found = evaluate(
        ...     model, tokenizer, {"default": Policy(window_size=64, min_bulk=0)},
        ...     text=demo.sample_text(), lengths=[256], tasks=["fact"], samples=1,
        ... )
        >>> [cell.policy for cell in found.cells]
        ['dense', 'default']
    """
    _check(model, policies, lengths, samples)
    material = Material(text, tokenizer)
    if isinstance(calibration, str):
        calibration = Calibration.from_pretrained(calibration)
    chosen = chosen_tasks(tasks)
    plan, notes = _plan(material, chosen, lengths, samples, seed)
    patched = partial(patch, model, calibration=calibration, backend=backend)
    resolved: dict[str, Policy | None] = {DENSE: None}
    used = backend
    for policy_name, policy in policies.items():
        with patched(policy) as handle:  # What can't be patched is refused before anything is measured.
            resolved[policy_name], used = handle.policy, handle.backend
    measured_on = None if calibration is None else _sha(calibration.manifest.model_dump_json())
    about = [VERSION, _about_model(model), _sha(text), samples, seed, used, measured_on]
    store = None if checkpoint is None else Store(checkpoint, Cell)
    known = {} if store is None else {cell.key: cell for cell in store.rows()}
    total, behind = len(resolved) * sum(part.tokens for part in plan), 0
    cells = []
    for policy_name, policy in resolved.items():
        plain = None if policy is None else policy.model_dump(mode="json")
        with contextlib.nullcontext() if policy is None else patched(policy) as handle:
            for part in plan:
                key = _sha(json.dumps([*about, plain, part.task, part.length]))
                tell = partial(progress or (lambda *_: None), f"{policy_name}: {part.task}, {part.length:,} tokens")
                tell(behind, total)
                cell = known.get(key)
                if cell is None:
                    answers = []
                    if handle is not None:
                        handle.reset_report()
                    for answer in _answers(model, tokenizer, material, part, seed):
                        answers.append(answer)
                        tell(behind + len(answers) * part.length, total)
                    kind = "losses" if part.task == TEXT_LOSS else "scores"
                    counts = (
                        {} if handle is None else {phase: PhaseCounts.of(handle.report(), phase) for phase in PHASES}
                    )
                    cell = Cell(policy_name, part.task, part.length, **{kind: tuple(answers)}, counts=counts, key=key)
                    if store is not None:
                        store.add(cell)
                cells.append(dataclasses.replace(cell, policy=policy_name))
                behind += part.tokens
                tell(behind, total)
    found = Evaluation(
        model=name or Path(name_of(model)).name,
        tasks=chosen,
        lengths=tuple(lengths),
        policies=resolved,
        backend=used,
        samples=samples,
        seed=seed,
        cells=tuple(cells),
        notes=tuple(notes),
    )
    return dataclasses.replace(found, notes=(*found.notes, *never_asked(found)))


@dataclass(frozen=True)
class _Part:
    """One task at one length, with so many samples."""

    task: str
    length: int
    samples: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


def _check(model: Any, policies: Mapping[str, Policy], lengths: Sequence[int], samples: int) -> None:
    """Refuse what can't be measured."""
    if not policies or DENSE in policies:
        raise PolicyError(
            f"Expected policies by name, none of them {DENSE!r}; got {list(policies)}.",
            fix='Pass at least one, as in {"default": Policy()}; dense is measured anyway.',
        )
    if is_patched(model):
        raise PatchStateError("The model is patched already.", fix="Call patchattn.unpatch(model) first.")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no head to write with.", fix="Load the model with AutoModelForCausalLM."
        )
    if samples < 1 or not lengths or min(lengths) < 1:
        raise DocumentError(
            f"Expected samples and lengths of at least 1; got {samples} samples and lengths {list(lengths)}.",
            fix="Give positive numbers.",
        )
    check_longest(model, *lengths)


def _plan(
    material: Material, tasks: Sequence[str], lengths: Sequence[int], samples: int, seed: int
) -> tuple[list[_Part], list[str]]:
    """Find out which tasks fit which lengths; those that do not are left out, and the notes say why."""
    plan, notes, problem = [], [], DocumentError("No tasks were named.", fix="Name at least one.")
    for length, task in itertools.product(lengths, tasks):
        try:
            if task == TEXT_LOSS:
                count = len(material.stretches(length, samples))
            else:
                count = samples
                make_sample(task, material, length=length, seed=f"{seed}/0")
        except DocumentError as error:
            problem = error
            notes.append(f"Left out at {length:,} tokens: {error.message}")
            continue
        plan.append(_Part(task, length, count))
        if count < samples:
            notes.append(f"Text loss at {length:,} tokens: over {count} documents, as the text has no more.")
    if not plan:
        raise problem
    if material.n_tokens < max(lengths):
        notes.append(f"The text has {material.n_tokens:,} tokens; in longer prompts it is repeated.")
    return plan, notes


def _answers(model: Any, tokenizer: Any, material: Material, part: _Part, seed: int) -> Iterator[Any]:
    """Yield what each sample gives: a score, or the losses of a stretch of text by position."""
    if part.task == TEXT_LOSS:
        for tokens in material.stretches(part.length, part.samples):
            yield tuple(loss_by_position(model, tokens))
    else:
        for at in range(part.samples):
            sample = make_sample(part.task, material, length=part.length, seed=f"{seed}/{at}")
            yield written(model, tokenizer, sample)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _about_model(model: Any) -> str:
    """Tell models apart: by their configuration, and by the first numbers of each of their tensors."""
    numbers = [(name, str(tensor.dtype), _first_numbers(tensor)) for name, tensor in model.named_parameters()]
    numbers += [("buffer", str(buffer.dtype), _first_numbers(buffer)) for buffer in kept_buffers(model)]
    return _sha(json.dumps([model.config.to_json_string(), numbers]))


def _first_numbers(tensor: Any) -> Any:
    if tensor.is_meta:
        return None
    # Quantised weights of torchao say that they are one tensor of floats, and can't be sliced as one. Shards can.
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor"):
        return [_first_numbers(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    return tensor.detach().flatten()[:4].tolist()
