"""The documents of the study, the directions of the sketches, and what was found on each document, kept on disk."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from context import POLICY, ROOT, SINK, WINDOW, Context, Job, Measurement, load
from studies.quality.documents import OF_REAL, OF_SHIPPED, Asked, Writer, trained, writers
from studies.quality.lines import calibration
from studies.towards_the_oracle.estimates import Basis
from studies.towards_the_oracle.seeing import Pass, kept
from torch import Tensor

from patchattn import patch
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.evaluation.documents import TokenizedText
from patchattn.hf.loading import load_pretrained
from patchattn.hf.observe import observing
from patchattn.hf.support import attention_modules
from patchattn.measuring.prices import Pricing
from patchattn.measuring.probe import Probe
from patchattn.measuring.reading import read_document
from patchattn.measuring.statistics import Settings, Totals
from patchattn.moments.gaussian import KeyMoments

sys.path[:0] = [str(ROOT / "recipes" / "calibrate")]

from documents import UNLIKE, made_of_real, unlike

REAL, SHIPPED = "SmolLM2-135M", "shipped"
FIRST, PRICED, JUDGED = "first", "priced", "judged"
COUNTS = {REAL: {FIRST: 12, PRICED: 3, JUDGED: 6}, SHIPPED: {FIRST: 12, PRICED: 6, JUDGED: 9}}
"""Documents of each model: what scores say is priced on the second ones, and the last are judged.

The probe of the shipped model is fitted to half of the first ones; that of the real model, its calibration's, to some
of them at twice the length. `BASED` of them give the directions of the sketches.
"""

LENGTH = 2048
"""Tokens of a document."""

BASED = 3

SEEN, OTHERS = (None, "note", "list"), ("fact", "chain", "fact")
"""What the shipped model is asked in turn: where scores are fitted and priced, and where they are judged."""

QUESTIONS = 12


@cache
def model_of(name: str, folder: Path | None) -> tuple[Any, Any]:
    """Load a model in float32, and its tokenizer."""
    return load() if name == SHIPPED else load_pretrained(folder, dtype="float32", local_files_only=True)


class One(NamedTuple):
    """One document: its kind, its tokens [tokens] int64, and where in them the answers to its questions are."""

    kind: str
    ids: Tensor
    answers: list[slice]

    @classmethod
    def of(cls, kind: str, asked: Asked) -> One:
        """Ask all questions at the end of the context; what is longer than `LENGTH` is cut off."""
        tokens, answers = list(asked.context), []
        for ids, at in asked.questions:
            answers.append(slice(len(tokens) + at, len(tokens) + len(ids)))
            tokens += [*ids, *asked.closing]
        return cls(kind, torch.tensor(tokens[:LENGTH]), [answer for answer in answers if answer.stop <= LENGTH])


@cache
def documents(name: str, part: str, tokenizer: Any) -> list[One]:
    """Make documents; those of `FIRST` are for the probe."""
    counts = COUNTS[name]
    begin = counts[FIRST] * (part == PRICED)
    end = begin + counts[part]
    if name == SHIPPED:
        made = [_of_shipped(at, tokenizer, judged=part == JUDGED) for at in range(end)]
    elif part == JUDGED:
        asked = made_of_real(tokenizer, end, [LENGTH], "oracle")
        made = [One.of(kind, one) for kind, one in zip([*OF_REAL] * end, asked, strict=False)]
    else:
        kinds = [f"{text}, {kind}" if kind else text for text, kind in UNLIKE] * end
        made = [
            One(kind, torch.tensor(ids), []) for kind, ids in zip(kinds, unlike(tokenizer, end, [LENGTH]), strict=False)
        ]
    return made[begin:]


def _of_shipped(at: int, tokenizer: Any, *, judged: bool) -> One:
    rng, kinds = random.Random(f"oracle/{judged}/{at}"), OTHERS if judged else SEEN
    kind, writer = kinds[at % len(kinds)], _halves(tokenizer)[judged]
    if kind is None:
        units, _ = writer.stretch(LENGTH - 1, rng)
        return One("plain", torch.tensor([token for unit in units for token in unit]), [])
    return One.of(kind, trained(kind, QUESTIONS, writer, LENGTH * 3 // 4, rng))


@cache
def _halves(tokenizer: Any) -> tuple[Writer, Writer]:
    text = writers(tokenizer, OF_SHIPPED)["code"].text
    cut = len(text.lines) // 2
    parts = (slice(cut), slice(cut, None))
    first, second = (Writer(TokenizedText(text.lines[part], text.tokens[part]), tokenizer) for part in parts)
    return first, second


def bases(context: Context, name: str) -> dict[int, Basis]:
    """Return the directions of the sketches by layer; they are found once."""
    found = kept(_folder(context) / f"{name}-bases.safetensors", lambda: _find_bases(context, name))
    pairs = zip(found["keys"], found["queries"], strict=True)
    return {layer: Basis(keys, queries) for layer, (keys, queries) in enumerate(pairs)}


def _find_bases(context: Context, name: str) -> dict[str, Tensor]:
    model, tokenizer = model_of(name, context.options["real_model"])
    sums: dict[int, list[Tensor]] = {}

    def observer(layer: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        query = inputs.query[0].double().unflatten(0, (inputs.key.shape[1], -1)).flatten(1, 2) * inputs.scale
        key = inputs.key[0, :, SINK:].double()
        moments = [query.mT @ query / query.shape[1], KeyMoments.of(key).covariance]
        old = sums.get(layer, [torch.zeros_like(one) for one in moments])
        sums[layer] = [a + b for a, b in zip(old, moments, strict=True)]
        return attend()

    with patch(model, POLICY, record=None) as handle, observing(handle, observer):
        for one in documents(name, FIRST, tokenizer)[:BASED]:
            read_document(model, one.ids)
    found = [Basis.of(*sums[layer]) for layer in sorted(sums)]
    return {part: torch.stack([getattr(one, part) for one in found]) for part in ("keys", "queries")}


def probe_of(context: Context, name: str) -> tuple[Probe, dict[str, Tensor]]:
    """Return the library's probe with its tensors: of the real model's calibration, or fitted to the shipped model."""
    model, tokenizer = model_of(name, context.options["real_model"])
    config, layers = model.config, tuple(attention_modules(model))
    heads = config.num_attention_heads
    dim = config.hidden_size // heads
    settings = Settings(layers, heads, config.num_key_value_heads, dim, key_moments=False, oracle_margin=0.0)
    totals = Totals(settings)
    probe = Probe(totals, config.hidden_size, "lognormal")
    if name == REAL:
        measured = calibration(WINDOW)
        assert measured is not None
        return probe, measured.tensors

    def fit() -> dict[str, Tensor]:
        pricing = Pricing(model, layers, (SINK, WINDOW), probe.fit_to)
        for at, one in enumerate(documents(name, FIRST, tokenizer)[: COUNTS[name][FIRST] // 2]):
            pricing.price(one.ids, at)
        return probe.tensors(totals.sums)

    return probe, kept(_folder(context) / f"{name}-probe.safetensors", fit)


@dataclass(frozen=True)
class Read:
    """One document: its kind, its tokens, what closing every pair costs in nats per token, and seconds."""

    model: str
    part: str
    document: int
    kind: str
    tokens: int
    closed: float
    seconds: float


def read(context: Context, name: str, part: str, index: int) -> Read:
    """Read one document and keep what was found."""
    one = documents(name, part, model_of(name, context.options["real_model"])[1])[index]
    begun = perf_counter()
    found = tensors(context, name, part, index)
    return Read(name, part, index, one.kind, len(one.ids), float(found["price"].sum()), perf_counter() - begun)


def tensors(context: Context, name: str, part: str, index: int) -> dict[str, Tensor]:
    """Return what was found on a document, see `Pass.read`; prices are in nats per token, for all queries."""

    def make() -> dict[str, Tensor]:
        model, tokenizer = model_of(name, context.options["real_model"])
        ids = documents(name, part, tokenizer)[index].ids
        probe, fitted = probe_of(context, name)
        return Pass(model, (SINK, WINDOW), bases(context, name), partial(probe.margin, fitted)).read(ids, index)

    return kept(_folder(context) / f"{name}-{part}-{index}.safetensors", make)


def _folder(context: Context) -> Path:
    return context.work / "towards_the_oracle"


def _jobs(context: Context) -> list[Job]:
    return [(name, part, at) for name in COUNTS for part in (PRICED, JUDGED) for at in range(COUNTS[name][part])]


READ = Measurement("towards_the_oracle.read", Read, ("model", "part", "document"), _jobs, read)
