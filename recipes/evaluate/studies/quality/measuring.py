"""How one gate is put through one document, beside dense attention on the same tokens."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from context import SINK, Context, Measurement, load
from safetensors.torch import load_file, save_file
from studies.quality.cases import Rankings
from studies.quality.documents import APPENDED, Asked, Writer, writers
from studies.quality.lines import calibration, jobs_of_gates, listed, places_to_rank
from studies.quality.places import DRAWN_BY, TASKS, Place
from torch import Tensor
from transformers import DynamicCache

from patchattn import OracleGate, Policy, patch
from patchattn.calibration import Calibration
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.evaluation.agreement import Agreement, Predictions
from patchattn.evaluation.cells import PhaseCounts
from patchattn.evaluation.loss import losses_of
from patchattn.hf.architecture import with_cache
from patchattn.hf.loading import load_pretrained
from patchattn.hf.observe import observing
from patchattn.report import GateReport
from patchattn.writing import made

RANKING_THRESHOLD = 0.8


@cache
def model_of(name: str, folder: Path | None) -> tuple[Any, dict[str, Writer]]:
    """Load a model, and writers of its documents by text."""
    if name == "shipped":
        model, tokenizer = load()
    else:
        model, tokenizer = load_pretrained(folder, dtype="bfloat16", local_files_only=True)
    return model, writers(tokenizer, DRAWN_BY[name])


def document(context: Context, name: str, length: int, task: str, index: int | str) -> tuple[Any, Asked]:
    """Return a model, and one document for it."""
    model, writers = model_of(name, context.options["real_model"])
    text, make = DRAWN_BY[name][task]
    return model, make(writers[text], length - APPENDED, random.Random(f"quality/{name}/{task}/{length}/{index}"))


@torch.no_grad()
def predicted(
    model: Any, tokens: Sequence[int], cache: DynamicCache, *, keep: int = 1, begin: int | None = None
) -> Tensor:
    """Read tokens after what the cache holds, and return the last logits, [keep, vocabulary].

    `begin` is the position of the first one, for a cache that has lost keys.
    """
    ids = torch.tensor([list(tokens)])
    true = {} if begin is None else {"position_ids": torch.arange(begin, begin + len(tokens))[None]}
    return model(input_ids=ids, use_cache=True, logits_to_keep=keep, **true, **with_cache(model, cache)).logits[0]


def appended(
    model: Any, one: Asked, cache: DynamicCache, *, begin: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Append each question, then the text, and take them away again; `begin` as in `predicted`.

    Yields:
        What is predicted, [tokens, vocabulary], and the true tokens, [tokens].
    """
    for ids, at in (*one.questions, (one.following, one.unpredicted)):
        logits = predicted(model, ids, cache, keep=len(ids) - at + 1, begin=begin)[:-1]
        cache.crop(-len(ids))
        yield logits, torch.tensor(ids[at:])


def in_decode(model: Any, one: Asked, cache: DynamicCache) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `appended` does, but read token by token, as what is generated is read."""
    for ids, at in (*one.questions, (one.following, one.unpredicted)):
        logits = torch.cat([predicted(model, [token], cache) for token in ids[:-1]])
        cache.crop(1 - len(ids))
        yield logits[at - 1 :], torch.tensor(ids[at:])


def of_groups(_: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
    """Observe a decode step: count keys as they are read, for all query heads of a KV group where one of them opens."""
    attended, near = attend(), inputs.regions.sink_size + inputs.regions.window_size
    _, kv_heads, keys, _ = inputs.key.shape
    read = int(attended.open.unflatten(1, (kv_heads, -1)).any(2).sum())
    return replace(attended, scored_keys=inputs.group_size * (kv_heads * near + read * (keys - near)))


class Dense(NamedTuple):
    """What dense attention predicts of each question and of the text."""

    answers: list[Predictions]
    text: Predictions


def dense_predictions(context: Context, name: str, length: int, task: str, index: int) -> Dense:
    """Return what dense attention predicts; it is kept on disk, for it is compared with every gate."""
    path = context.work / "quality.dense" / f"{name}-{length}-{task}-{index}.safetensors"
    if not path.exists():
        model, one = document(context, name, length, task, index)
        cache = DynamicCache()
        predicted(model, one.context, cache)
        found = {
            f"{at:04}": Predictions.of(logits).log_probs for at, (logits, _) in enumerate(appended(model, one, cache))
        }
        with made(path.parent):
            whole = path.with_suffix(f".{os.getpid()}")
            save_file(found, whole)
            whole.replace(path)
    kept = [Predictions(log_probs) for _, log_probs in sorted(load_file(path).items())]
    return Dense(kept[:-1], kept[-1])


@dataclass
class Row:
    """One gate on one document.

    `hits` are of the questions, 1 where every token of the answer was the most likely one. `losses` are those of the
    text, nats per token. `answers` and `text` say how close predictions are to dense attention. Counts of the gates are
    of the context and of what was appended. Of dense attention `family` is `dense`, and there are no counts.
    """

    model: str
    length: int
    window: int
    task: str
    document: int
    family: str
    setting: str
    hits: list[int]
    losses: list[float]
    answers: Agreement
    text: Agreement
    context: PhaseCounts
    appended: PhaseCounts


def counts(report: GateReport) -> PhaseCounts:
    """Add up all that the gates did."""
    return PhaseCounts.of(report, "prefill") + PhaseCounts.of(report, "decode")


def of_dense(one: Asked, dense: Dense) -> dict[str, Any]:
    """Return the fields of the row of dense attention, from what it predicted."""
    hits = [
        int((kept.log_probs.argmax(-1) == torch.tensor(ids[at:])).all())
        for kept, (ids, at) in zip(dense.answers, one.questions, strict=True)
    ]
    losses = losses_of(dense.text.log_probs, torch.tensor(one.following[one.unpredicted :])).tolist()
    nothing, none = Agreement(), PhaseCounts()
    return {"hits": hits, "losses": losses, "answers": nothing, "text": nothing, "context": none, "appended": none}


def put_through(
    model: Any, one: Asked, dense: Dense, policy: Policy, measured: Calibration | None, *, decoding: bool = False
) -> dict[str, Any]:
    """Read a context, then append questions and text; returns fields of a row.

    Where `decoding` they are read token by token, and keys are counted by KV groups.
    """
    cache = DynamicCache()
    with patch(model, policy, calibration=measured) as handle:
        predicted(model, one.context, cache)
        read = counts(handle.report())
        handle.reset_report()
        with observing(handle, of_groups) if decoding else nullcontext():
            found = beside(dense, (in_decode if decoding else appended)(model, one, cache))
        return found | {"context": read, "appended": counts(handle.report())}


def put_through_after(model: Any, one: Asked, dense: Dense, policy: Policy) -> dict[str, Any]:
    """Read a context densely, then append questions and text under a policy; returns fields of a row."""
    cache = DynamicCache()
    predicted(model, one.context, cache)
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    with patch(model, policy) as handle:
        fields = beside(dense, appended(model, one, cache))
        return fields | {"context": read_densely(heads, len(one.context)), "appended": counts(handle.report())}


def read_densely(heads: int, tokens: int) -> PhaseCounts:
    """Count the keys of a context that was read without a gate."""
    pairs = heads * tokens * (tokens + 1) // 2
    return PhaseCounts(scored_keys=pairs, causal_keys=pairs)


def beside(dense: Dense, found: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Compare what was found of questions and text, as `appended` yields it, with dense attention; fields of a row."""
    hits, answers = [], Agreement()
    *questions, (logits, tokens) = found
    for kept, (of_answer, right) in zip(dense.answers, questions, strict=True):
        hits.append(int((of_answer.argmax(-1) == right).all()))
        answers += kept.agreement(of_answer)
    return {
        "hits": hits,
        "losses": losses_of(logits, tokens).tolist(),
        "answers": answers,
        "text": dense.text.agreement(logits),
    }


@dataclass
class Ranked:
    """How often the oracle opens each head, [layers][heads]: in contexts, and in the questions of each task."""

    model: str
    length: int
    window: int
    context: list[list[float]]
    asked: dict[str, list[list[float]]]

    def rankings(self) -> Rankings:
        """Rank the heads."""

        def ranked(*grids: list[list[float]]) -> list[tuple[int, int]]:
            means = {
                (layer, head): sum(grid[layer][head] for grid in grids)
                for layer, heads in enumerate(grids[0])
                for head in range(len(heads))
            }
            return sorted(means, key=lambda head: (-means[head], head))

        by_task = {task: ranked(grid) for task, grid in self.asked.items()}
        return Rankings(ranked(self.context), ranked(*self.asked.values()), by_task)


def rank(context: Context, name: str, length: int, window: int) -> Ranked:
    """Have the oracle decide on one document of each task that is not asked about later."""
    read: list[GateReport] = []
    asked = {}
    policy = Policy(sink_size=SINK, window_size=window, min_bulk=0, gate=OracleGate(threshold=RANKING_THRESHOLD))
    for task in TASKS[name]:
        model, one = document(context, name, length, task, "ranking")
        with patch(model, policy) as handle:
            cache = DynamicCache()
            predicted(model, one.context, cache)
            read.append(handle.report())
            handle.reset_report()
            for _ in appended(model, one, cache):
                pass
            asked[task] = fractions(handle.report())
    grids = [fractions(report) for report in read]
    means = [[sum(values) / len(values) for values in zip(*heads, strict=True)] for heads in zip(*grids, strict=True)]
    return Ranked(name, length, window, means, asked)


def fractions(report: GateReport) -> list[list[float]]:
    """Return the open fraction of every head, [layers][heads]; heads that were not asked have none."""
    found = report.head_open_fractions("prefill")
    return [[0.0 if math.isnan(value) else value for value in found[layer]] for layer in sorted(found)]


RANKED = Measurement("quality.ranked", Ranked, ("model", "length", "window"), places_to_rank, rank)


def measure(
    context: Context, name: str, length: int, window: int, task: str, index: int, family: str, setting: str
) -> Row:
    """Measure one gate on one document."""
    model, one = document(context, name, length, task, index)
    dense = dense_predictions(context, name, length, task, index)
    row = name, length, window, task, index, family, setting
    if family == "dense":
        return Row(*row, **of_dense(one, dense))
    place = Place(name, length, window)
    ranked = RANKED.done(context).get(place)
    case = next(case for case in listed(place, ranked and ranked.rankings(), task) if case[:2] == (family, setting))
    policy = Policy(sink_size=SINK, window_size=window, min_bulk=0, gate=case.gate, whole_groups=case.whole_groups)
    if case.reads_densely:
        return Row(*row, **put_through_after(model, one, dense, policy))
    measured = None if name == "shipped" else calibration(window)
    return Row(*row, **put_through(model, one, dense, policy, measured, decoding=case.in_decode))


KEY = ("model", "length", "window", "task", "document", "family", "setting")
SCORED = Measurement("quality", Row, KEY, jobs_of_gates, measure)
