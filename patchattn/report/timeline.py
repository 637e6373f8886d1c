"""Which head read the far keys for which token, and the text that goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchattn.errors import ReportError
from patchattn.policy import Phase

Head = tuple[int, int]
"""(layer, query head), both counted from 0."""


class Stretches(NamedTuple):
    """How often heads were open in passages of a text.

    Args:
        begin: Token at which the first stretch begins.
        open: [heads, stretches] float32, open fractions.
    """

    begin: int
    open: Tensor

    @property
    def swing(self) -> Tensor:
        """How much each head changes from passage to passage, [heads], at most 0.5.

        The standard deviation of its stretches around their mean over 33 neighbours: many heads open more and more as a
        text grows, which is no swinging.
        """
        trend = F.avg_pool1d(self.open, 33, 1, padding=16, count_include_pad=False)
        return (self.open - trend).std(1, correction=0)


@dataclass(frozen=True, eq=False)
class Timeline:
    """The decisions of one sequence, token by token, in the order in which the model read the tokens.

    Only gated calls are in it. A token below break-even counts as open in every head; one without far keys, as closed.

    Args:
        heads: The heads.
        phases: The phase each token was read in.
        open: [heads, tokens] bool, on the CPU; whether the head read the keys beyond sink and window.
    """

    heads: tuple[Head, ...]
    phases: tuple[Phase, ...]
    open: Tensor

    def open_heads(self, token: int) -> list[Head]:
        """List the heads that were open for a token."""
        return [self.heads[index] for index in self.open[:, token].nonzero()[:, 0].tolist()]

    def stretches(self, size: int = 32) -> Stretches:
        """Average the decisions over stretches of the text: single tokens flicker, a stretch is a passage.

        They begin at the first token at which heads part: up to the first full chunk of far keys nobody is asked.
        Tokens that do not fill a stretch at the end are left out.

        Args:
            size: Tokens in a stretch.

        Raises:
            ReportError: Heads part too late, or never, to fill a stretch.
        """
        mixed = self.open.any(0) & ~self.open.all(0)
        begin = int(mixed.int().argmax()) if mixed.any() else len(self.phases)
        opened = self.open[:, begin:].float()
        count = opened.shape[1] // size
        if not count:
            raise ReportError(
                f"Of {len(self.phases):,} tokens no {size} follow the first one at which heads part.",
                fix="run the model on a text that is longer than sink and window by a few hundred tokens",
            )
        return Stretches(begin, opened[:, : count * size].unflatten(1, (count, size)).mean(-1))


def timeline_of(calls: dict[int, list[Any]], heads: Iterable[Head] | None, row: int) -> Timeline:
    """Join recorded calls to the timeline of one sequence.

    Args:
        calls: By layer, (phase, open pairs [batch, heads, query]) of each gated call.
        heads: Heads to keep, in this order; None means all.
        row: Row of the batch.

    Raises:
        ReportError: Nothing was recorded, no such head or row, or layers that went through different calls.
    """
    recorded = {layer: found for layer, found in calls.items() if found}
    if not recorded:
        raise ReportError(
            "No timeline was recorded.",
            fix='patch with record="timeline" and run the model on a text longer than sink, window and break-even',
        )
    runs = {layer: tuple((phase, opened.shape[2]) for phase, opened in found) for layer, found in recorded.items()}
    first, expected = next(iter(runs.items()))
    other = next((layer for layer, run in runs.items() if run != expected), None)
    if other is not None:
        raise ReportError(
            f"Layer {first} recorded {len(expected)} gated calls and layer {other} {len(runs[other])}, or of other "
            "lengths, so their tokens can't be put side by side.",
            fix="call reset_report() before the run to look at, and run calls that all patched layers take part in",
        )
    smallest = min(opened.shape[0] for found in recorded.values() for _, opened in found)
    if not 0 <= row < smallest:
        raise ReportError(
            f"Row {row} is not in every recorded call: the smallest batch has {smallest} rows.",
            fix=f"choose a row from 0 to {smallest - 1}, or call reset_report() between runs of different batches",
        )
    bits = {layer: torch.cat([opened[row].cpu() for _, opened in found], dim=-1) for layer, found in recorded.items()}
    every = [(layer, head) for layer, grid in bits.items() for head in range(grid.shape[0])]
    chosen = every if heads is None else [(int(layer), int(head)) for layer, head in heads]
    unknown = sorted(set(chosen) - set(every))
    if unknown or not chosen:
        raise ReportError(
            f"The timeline has no heads {unknown}." if unknown else "No heads were chosen.",
            fix=f"choose (layer, query head) pairs of layers {sorted(bits)}, or leave heads out for all of them",
        )
    phases = tuple(phase for phase, count in expected for _ in range(count))
    return Timeline(tuple(chosen), phases, torch.stack([bits[layer][head] for layer, head in chosen]).bool())


def fitting_texts(tokens: Any, tokenizer: Any, count: int, *, is_cut: bool = False) -> list[str]:
    """Turn tokens into texts, one for each token of a timeline.

    Args:
        tokens: Texts of tokens, or token ids where a tokenizer is given; a tensor may have a batch axis of one. One
            more than the timeline is fine: the last token that a model writes is never read.
        tokenizer: To decode ids; None where texts are given.
        count: Tokens in the timeline.
        is_cut: Whether the timeline ends early, so that there may be any number of tokens more.

    Raises:
        ReportError: Another kind or another number of tokens.
    """
    if isinstance(tokens, Tensor):
        tokens = (tokens[0] if tokens.dim() == 2 and tokens.shape[0] == 1 else tokens).tolist()
    kind = str if tokenizer is None else int
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(isinstance(t, kind) for t in tokens):
        wanted = "a sequence of texts, one per token" if tokenizer is None else "a flat sequence of token ids"
        raise ReportError(
            f"Expected tokens to be {wanted}, got {type(tokens).__name__}.",
            fix="pass tokens=token_ids with tokenizer=tokenizer, or tokens=[text of each token] without one",
        )
    if len(tokens) not in (count, count + 1) and not (is_cut and len(tokens) > count):
        raise ReportError(
            f"The timeline has {count:,} tokens and the text {len(tokens):,}.",
            fix="pass the tokens of all gated calls since the patch or the last reset_report(), in order; calls that "
            "attended densely are not in the timeline (report.dense_calls counts them)",
        )
    tokens = list(tokens[: count + 1])
    texts = tokens if tokenizer is None else texts_of(tokenizer, tokens)
    return texts[:count]


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode token ids one by one, so that the texts joined are the text of all.

    A token that ends within a character has an empty text; the character belongs to the token that completes it.
    """
    texts, before, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        known = _decode(tokenizer, ids[before:read])
        text = _decode(tokenizer, ids[before:end])
        complete = len(text) > len(known) and not text.endswith("\ufffd")
        if complete or end == len(ids):
            texts.append(text[len(known) :])
            before, read = read, end
        else:
            texts.append("")
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
