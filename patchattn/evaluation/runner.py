"""Measure a model on tasks of several lengths: as it came, and under each policy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from patchattn.calibration.calibration import Calibration
from patchattn.errors import PatchStateError, PolicyError, UnsupportedModelError
from patchattn.evaluation.agreement import Agreement, Predictions
from patchattn.evaluation.answers import answered
from patchattn.evaluation.cells import Cell, PhaseCounts
from patchattn.evaluation.documents import DocumentError, check_longest
from patchattn.evaluation.drafted import is_level
from patchattn.evaluation.loss import by_position, losses_and_logits
from patchattn.evaluation.material import Material
from patchattn.evaluation.policies import DENSE, Drafts, gated_by, patched_by, resolved_by
from patchattn.evaluation.results import Evaluation, never_asked
from patchattn.evaluation.rows import Store
from patchattn.evaluation.sample import Sample
from patchattn.evaluation.tasks import TEXT_LOSS, chosen_tasks, make_sample
from patchattn.hf.architecture import name_of
from patchattn.hf.patching import is_patched
from patchattn.hf.weights import kept_buffers
from patchattn.policy import PHASES, Policy
from patchattn.version import VERSION

Progress = Callable[[str, int, int], None]
"""Called after each sample with what is being done, the tokens that are behind, and all tokens."""

_PLACES = 256
# Of the checkpoint; another one does not find cells that lack what was added since.
_FORMAT = 3


def evaluate(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy | Drafts],
    *,
    text: str,
    lengths: Sequence[int],
    tasks: Sequence[str] = ("all",),
    samples: int = 20,
    seed: int | Sequence[int] = 0,
    code: str | None = None,
    calibration: Calibration | str | None = None,
    backend: str = "auto",
    name: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on long-range tasks, first as it came, then under each policy.

    Everyone is asked the same questions. Answers are written greedily, so that gates decide in prefill and in decode.
    Then the right answer is read in their place, token by token, and what is predicted for each token is compared with
    what dense attention predicts. So is what is predicted at 256 places of each document of text loss, which lie beyond
    sink and window.

    Args:
        model: A causal language model of transformers, not patched.
        tokenizer: Its tokenizer.
        policies: Policies by the names they have in the table; `dense` is measured without being named. Under `Drafts`
            the model drafts in its own `generate`, and texts are compared with those of dense attention.
        text: Real text: haystack of some tasks, and what text loss is measured on.
        lengths: Tokens in prompt and answer together, one or more lengths.
        tasks: Names of tasks or groups, see `patchattn.evaluation.tasks`.
        samples: Prompts of each task and seed, and documents of text loss as far as the text goes.
        seed: Everything random follows from it. Several give as many samples each, which are put together.
        code: Source code, haystack of the task `code`; None takes `text`.
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
    seeds = (seed,) if isinstance(seed, int) else tuple(dict.fromkeys(seed))
    _check(model, policies, lengths, samples, seeds)
    material = Material(text, tokenizer, code=code)
    if isinstance(calibration, str):
        calibration = Calibration.from_pretrained(calibration)
    chosen = chosen_tasks(tasks)
    plan, notes = _plan(material, chosen, lengths, samples, seeds)
    patched = partial(patched_by, model, calibration=calibration, backend=backend)
    resolved: dict[str, Policy | Drafts | None] = {DENSE: None}
    used = backend
    for policy_name, policy in policies.items():
        with patched(policy) as handle:  # What can't be patched is refused before anything is measured.
            resolved[policy_name], used = resolved_by(policy, handle.policy), handle.backend
    measured_on = None if calibration is None else _sha(calibration.manifest.model_dump_json())
    about = [_FORMAT, VERSION, _about_model(model), _sha(text), samples, used, measured_on, code and _sha(code)]
    local = [it.sink_size + it.window_size for it in map(gated_by, policies.values())]
    store = None if checkpoint is None else Store(checkpoint, Cell)
    known = {} if store is None else {cell.key: cell for cell in store.rows()}
    total, behind = len(resolved) * sum(part.tokens for part in plan), 0
    cells = []
    for part in plan:
        places = _places(part.length, local)
        keys = {
            policy_name: _sha(json.dumps([*about, part.task, part.length, part.seed, *part.about(policy, places)]))
            for policy_name, policy in resolved.items()
        }
        # Policies one after the other for each part, so that dense predictions of one part only are kept at a time.
        dense = _Dense([], [])
        for policy_name, policy in resolved.items():
            what = f"{policy_name}: {part.task}, {part.length:,} tokens"
            cell = known.get(keys[policy_name])
            # Known scores of dense come without its predictions, which policies that are not known need.
            again = policy is None and cell is not None and not known.keys() >= {*keys.values()}
            tell = partial(_tell, progress, f"{what}, again" if again else what, behind, part.length, total)
            tell(0)
            if cell is None or again:
                with contextlib.nullcontext() if policy is None else patched(policy) as handle:
                    answers = part.answers(model, tokenizer, material, places, drafts=isinstance(policy, Drafts))
                    found, agreements, written = _judged(answers, dense, policy, tell)
                    texts = part.compared(model, material, written, dense.texts, policy)
                    report = None if handle is None else handle.report()
                counts = {phase: PhaseCounts.of(report, phase) for phase in PHASES} if report else {}
                if report is not None and report.drafts is not None:
                    texts |= {"drafted": report.drafts.drafted, "kept": report.drafts.accepted}
                cell = cell or Cell(
                    policy_name,
                    part.task,
                    part.length,
                    part.seed,
                    **{"losses" if part.task == TEXT_LOSS else "scores": found},
                    agreements=agreements,
                    counts=counts,
                    **texts,
                    key=keys[policy_name],
                )
                if store is not None and not again:
                    store.add(cell)
            cells.append(dataclasses.replace(cell, policy=policy_name))
            behind += part.tokens
            tell(part.samples)
    evaluation = Evaluation(
        model=name or Path(name_of(model)).name,
        tasks=chosen,
        lengths=tuple(lengths),
        policies=resolved,
        backend=used,
        samples=samples,
        seeds=seeds,
        cells=tuple(cells),
    )
    return dataclasses.replace(evaluation, notes=(*notes, *never_asked(evaluation)))


@dataclass(frozen=True)
class _Part:
    """One task at one length, with so many samples of one seed; text loss has no seed."""

    task: str
    length: int
    samples: int
    seed: int | None

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def about(self, policy: Policy | Drafts | None, places: Sequence[int]) -> list[Any]:
        """Tell policies apart, and for a text where they are compared with dense."""
        if policy is None:
            return [None]
        return [policy.model_dump(mode="json"), places[0] if self.task == TEXT_LOSS else None]

    def answers(
        self, model: Any, tokenizer: Any, material: Material, places: Sequence[int], *, drafts: bool
    ) -> Iterator[tuple[Any, Tensor, list[int]]]:
        """Yield what each sample gives: a score, or the losses of a stretch of text; predictions; and a text."""
        if self.task == TEXT_LOSS:
            for tokens in material.stretches(self.length, self.samples):
                losses, logits, _ = losses_and_logits(model, tokens, places)
                yield tuple(by_position(losses)), logits, []
        else:
            for at in range(self.samples):
                yield answered(model, tokenizer, self.sample(material, at), drafts=drafts)

    def sample(self, material: Material, at: int) -> Sample:
        """Make one of the prompts."""
        return make_sample(self.task, material, length=self.length, seed=f"{self.seed}/{at}")

    def compared(
        self,
        model: Any,
        material: Material,
        texts: Sequence[list[int]],
        dense: Sequence[list[int]],
        policy: Policy | Drafts | None,
    ) -> dict[str, Any]:
        """Compare texts with those of dense attention; the model is dense, or drafts, so that it is in these calls."""
        if policy is None or self.task == TEXT_LOSS:
            return {}
        same = tuple(map(operator.eq, texts, dense))
        if not isinstance(policy, Drafts):
            return {"same": same}
        others = (at for at, is_same in enumerate(same) if not is_same)
        level = sum(is_level(model, self.sample(material, at).prompt, None, dense[at], texts[at]) for at in others)
        return {"same": same, "level": level}


def _places(length: int, local: Sequence[int]) -> list[int]:
    """Choose positions of a document that lie beyond sink and window of every policy that has keys beyond them."""
    first = max((keys for keys in local if keys < length - 1), default=0)
    count = min(_PLACES, length - 1 - first)
    return [first + at * (length - 1 - first) // count for at in range(count)]


def _check(
    model: Any, policies: Mapping[str, Policy | Drafts], lengths: Sequence[int], samples: int, seeds: Sequence[int]
) -> None:
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
    if samples < 1 or not lengths or min(lengths) < 1 or not seeds:
        raise DocumentError(
            "Expected samples and lengths of at least 1, and a seed; "
            f"got {samples} samples, lengths {list(lengths)} and seeds {list(seeds)}.",
            fix="Give positive numbers, and one seed or more.",
        )
    check_longest(model, *lengths)


def _plan(
    material: Material, tasks: Sequence[str], lengths: Sequence[int], samples: int, seeds: Sequence[int]
) -> tuple[list[_Part], list[str]]:
    """Find out which tasks fit which lengths; those that do not are left out, and the notes say why."""
    plan, notes, problem = [], [], DocumentError("No tasks were named.", fix="Name at least one.")
    for length, task in itertools.product(lengths, tasks):
        try:
            if task == TEXT_LOSS:
                parts = [_Part(task, length, len(material.stretches(length, samples)), None)]
            else:
                parts = [_Part(task, length, samples, seed) for seed in seeds]
                make_sample(task, material, length=length, seed=f"{seeds[0]}/0")
        except DocumentError as error:
            problem = error
            notes.append(f"Left out at {length:,} tokens: {error.message}")
            continue
        plan += parts
        if (count := parts[0].samples) < samples:
            notes.append(f"Text loss at {length:,} tokens: over {count} documents, as the text has no more.")
    if not plan:
        raise problem
    if "chat" in tasks and getattr(material.tokenizer, "chat_template", None) is None:
        notes.append('The tokenizer has no chat template, so chats are written with "User:" and "Assistant:".')
    if material.n_tokens < max(lengths):
        notes.append(f"The text has {material.n_tokens:,} tokens; in longer prompts it is repeated.")
    return plan, notes


def _tell(progress: Progress | None, what: str, behind: int, length: int, total: int, samples: int) -> None:
    """Tell how many tokens are behind when so many samples of a part are."""
    if progress is not None:
        progress(what, behind + samples * length, total)


@dataclass(frozen=True)
class _Dense:
    """What dense attention predicts for each sample of a part, and writes."""

    predicted: list[Predictions]
    texts: list[list[int]]


def _judged(
    answers: Iterator[tuple[Any, Tensor, list[int]]],
    dense: _Dense,
    policy: Policy | Drafts | None,
    tell: Callable[[int], None],
) -> tuple[tuple[Any, ...], tuple[Agreement, ...], list[list[int]]]:
    """Measure the samples of a part: what dense predicts is added to `dense`, what others do is compared with it."""
    found, agreements, texts = [], [], []
    for answer, logits, written in answers:
        if policy is None:
            dense.predicted.append(Predictions.of(logits))
            dense.texts.append(written)
        else:
            agreements.append(dense.predicted[len(found)].agreement(logits))
        found.append(answer)
        texts.append(written)
        tell(len(found))
    return tuple(found), tuple(agreements), texts


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
