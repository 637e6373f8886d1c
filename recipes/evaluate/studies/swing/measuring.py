"""What the default gate decides on documents, and which far keys heads read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from context import SINK, Context, Job, Measurement
from studies.quality.measuring import appended, document, fractions, model_of, predicted
from studies.quality.places import TASKS, WHOLE
from torch import Tensor
from transformers import DynamicCache

from patchattn import OpenGate, Policy, patch
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import attention_scores
from patchattn.hf.observe import observing
from patchattn.report.timeline import texts_of

SHOWN = WHOLE[:2]
"""Of the real model: an eighth of its full context as the window, and a small window at half of it."""

DOCUMENTS = ("ranking", "0")
"""Of each task; the exact mass has decided on the first."""

STRETCH = 32
TOP, QUERIES = 12, 256
"""How many far keys of a head are looked at, those that the last so many queries of a document read most."""


@dataclass
class Decided:
    """What the default gate decided on one document, heads in the order of layers.

    `context` are open fractions of the whole document, [heads]. Of `stretches` of it, from token `begin` on, and of
    each of the `questions` with its answer, they are [heads][pieces], and of the text that is `following` [heads];
    `asked` and `followed` are the tokens in those. `files` are the files of source text in it, by the token that
    each begins with.
    """

    model: str
    length: int
    window: int
    task: str
    document: str
    context: list[float]
    begin: int
    stretches: list[list[float]]
    questions: list[list[float]]
    asked: list[int]
    following: list[float]
    followed: int
    files: dict[int, str]


def jobs(_: Context) -> list[Job]:
    """List the documents, those that the exact mass decided on first."""
    return [(*place, task, index) for index in DOCUMENTS for place in SHOWN for task in TASKS[place.model]]


def measure(context: Context, name: str, length: int, window: int, task: str, index: str) -> Decided:
    """Have the default gate decide on one document and on what is appended to it."""
    model, one = document(context, name, length, task, index)
    cache, pieces = DynamicCache(), []
    policy = Policy(sink_size=SINK, window_size=window, min_bulk=0)
    with patch(model, policy, record="timeline") as handle:
        predicted(model, one.context, cache)
        read = handle.report()
        handle.reset_report()
        for _ in appended(model, one, cache):
            pieces.append(np.ravel(fractions(handle.report())))
            handle.reset_report()
    tokenizer = model_of(name, context.options["real_model"])[1]["code"].tokenizer
    begin, stretches = read.timeline_of().stretches(STRETCH)
    *questions, following = pieces
    return Decided(
        *(name, length, window, task, index),
        context=np.ravel(fractions(read)).tolist(),
        begin=begin,
        stretches=stretches.tolist(),
        questions=np.transpose(questions).tolist(),
        asked=[len(ids) for ids, _ in one.questions],
        following=following.tolist(),
        followed=len(one.following),
        files=files_of(texts_of(tokenizer, one.context)),
    )


def files_of(texts: Sequence[str]) -> dict[int, str]:
    """Find the heads of files in the texts of tokens."""
    ends = np.cumsum([len(text) for text in texts])
    heads = re.finditer(r"^# file: (\S+)", "".join(texts), flags=re.MULTILINE)
    return {int(np.searchsorted(ends, head.start(), side="right")): head[1] for head in heads}


KEY = ("model", "length", "window", "task", "document")
DECIDED = Measurement("swing", Decided, KEY, jobs, measure)


@dataclass
class TopKeys:
    """The `TOP` far keys that each head reads most at the end of a document under dense attention, [heads].

    `share` is the part of the far attention that they get, and `values` how long their values are beside the mean of
    all far keys, weighted by what they get.
    """

    model: str
    length: int
    window: int
    task: str
    share: list[float]
    values: list[float]


def top_keys(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return share and relative length of values of the far keys that the last queries read most, [heads] each."""
    length, keys = inputs.query.shape[2], inputs.key.shape[2]
    begin = length - QUERIES
    last = replace(inputs, query=inputs.query[:, :, begin:], regions=inputs.regions.cut(begin, length, keys))
    far = last.regions.bulk_mask()
    read = attention_scores(last).masked_fill(~far[:, None], -torch.inf).softmax(-1)[0].mean(1)  # [heads, keys]
    most = read.topk(TOP)
    lengths = inputs.value[0].float().norm(dim=-1)
    relative = (lengths / lengths[:, far[0].any(0)].mean(1, keepdim=True)).repeat_interleave(inputs.group_size, 0)
    share = most.values.sum(1)
    return share, (relative.gather(1, most.indices) * most.values).sum(1) / share


def measure_top(context: Context, name: str, length: int, window: int, task: str) -> TopKeys:
    """Read a document densely and look at the last queries."""
    model, one = document(context, name, length, task, DOCUMENTS[0])
    found: list[tuple[Tensor, Tensor]] = []

    def observer(_: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        found.append(top_keys(inputs))
        return attend()

    policy = Policy(sink_size=SINK, window_size=window, min_bulk=0, gate=OpenGate())
    with patch(model, policy, record=None) as handle, observing(handle, observer):
        predicted(model, one.context, DynamicCache())
    share, values = (torch.cat(part).tolist() for part in zip(*found, strict=True))
    return TopKeys(name, length, window, task, share, values)


def top_jobs(_: Context) -> list[Job]:
    """List the tasks at the first place."""
    return [(*SHOWN[0], task) for task in TASKS[SHOWN[0].model]]


TOP_KEYS = Measurement("swing.keys", TopKeys, KEY[:-1], top_jobs, measure_top)
