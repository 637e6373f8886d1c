"""Measure every press of kvpress on one document: a script for the environment that has it, see `presses.py`.

A press drops keys of a layer after the layer has read the context, which changes nothing of what later layers read. So
the context is read once, and each press's keys are set aside.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2])]

import kvpress
import numpy as np
import torch
from context import SINK, Context
from datasets import Dataset
from kvpress.presses import duo_attention_press
from studies.quality.cases import HEADWISE, NO_PRESS, SCORERS, SHARES
from studies.quality.measuring import Row, appended, beside, dense_predictions, document, model_of, predicted
from studies.quality.places import WHOLE
from studies.quality.presses import TEXTS, TOKENS, Pressed, counts_of, digest
from torch import Tensor
from transformers import DynamicCache


class Kept(NamedTuple):
    """What a press leaves of one layer: keys and values [1, KV heads, keys, dim], and those that no query sees.

    `masked` holds their indices (batch row, KV head, key), as the attention of kvpress takes them; None for none.
    """

    keys: Tensor
    values: Tensor
    masked: tuple[Tensor, Tensor, Tensor] | None

    def per_query_head(self, group: int) -> list[int]:
        """Count the keys that each query head has left."""
        _, heads, keys, _ = self.keys.shape
        hidden = torch.bincount(self.masked[1], minlength=heads) if self.masked else torch.zeros(heads)
        return (keys - hidden.long()).repeat_interleave(group).tolist()


@dataclass
class Aside(kvpress.BasePress):
    """Lets presses compress the same context, keeps what each leaves, [presses][layers], and leaves the cache whole."""

    presses: list[kvpress.BasePress]
    kept: list[list[Kept]] = field(default_factory=list)

    def post_init_from_model(self, model: Any) -> None:
        """Prepare the presses."""
        for press in self.presses:
            press.post_init_from_model(model)
        self.kept = [[] for _ in self.presses]

    def compress(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *more: Any) -> Any:
        """Compress one layer by every press."""
        for press, kept in zip(self.presses, self.kept, strict=True):
            left = press.compress(module, hidden_states, keys, values, *more)
            kept.append(Kept(*left, module.masked_key_indices))
            module.masked_key_indices = None
        return keys, values


def listed() -> dict[tuple[str, str], kvpress.BasePress]:
    """Name presses by family and setting; they have the defaults of kvpress, but for the sink of StreamingLLM."""
    found: dict[tuple[str, str], Any] = {(NO_PRESS, ""): kvpress.KnormPress(compression_ratio=0.0)}
    for name in SCORERS:
        options = {"n_sink": SINK} if name == "StreamingLLM" else {}
        kind = getattr(kvpress, f"{name}Press")
        found |= {(name, f"{share:.0%} kept"): kind(compression_ratio=1 - share, **options) for share in SHARES}
    for share in SHARES:
        press = kvpress.DuoAttentionPress(head_compression_ratio=1 - share, on_the_fly_scoring=True)
        found[HEADWISE, f"{share:.0%} of heads"] = press
    return found


def score_heads(context: Context, name: str) -> None:
    """Have kvpress score heads once for a model, on stretches of our text in place of a dataset that it would fetch."""
    path = context.work / f"quality.heads-{name}.npy"
    if not path.exists():
        model, writers = model_of(name, context.options["real_model"])
        writer = writers.get("prose", writers["code"])
        drawn = [writer.stretch(TOKENS, random.Random(f"quality/heads/{at}"))[0] for at in range(TEXTS)]
        texts = [writer.tokenizer.decode([token for unit in units for token in unit]) for units in drawn]
        duo_attention_press.load_dataset = lambda *_, **__: Dataset.from_dict({"chapter": texts})
        whole = path.with_suffix(f".{os.getpid()}.npy")
        np.save(whole, duo_attention_press.duo_attention_on_the_fly(model))
        whole.replace(path)
    scores = np.load(path)
    duo_attention_press.duo_attention_on_the_fly = lambda _: scores


def cached(model: Any, kept: list[Kept]) -> DynamicCache:
    """Make a cache of what a press has left, and hide what no query may see."""
    cache = DynamicCache()
    for index, (layer, left) in enumerate(zip(model.model.layers, kept, strict=True)):
        cache.update(left.keys, left.values, index)
        layer.self_attn.masked_key_indices = left.masked
    return cache


def measure(context: Context, name: str, length: int, task: str, index: int) -> Pressed:
    """Measure every press on one document."""
    model, one = document(context, name, length, task, index)
    dense = dense_predictions(context, name, length, task, index)
    window = next(place.window for place in WHOLE if place[:2] == (name, length))
    score_heads(context, name)
    presses = listed()
    aside, rows = Aside(list(presses.values())), []
    with aside(model):
        predicted(model, one.context, DynamicCache())
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for key, kept in zip(presses, aside.kept, strict=True):
        found = beside(dense, appended(model, one, cached(model, kept), begin=len(one.context)))
        counts = counts_of(one, [keys for left in kept for keys in left.per_query_head(group)])
        rows.append(Row(name, length, window, task, index, *key, **found, **counts))
    return Pressed(name, length, task, index, digest(one), rows)


def main() -> None:
    """Measure the document that the command line names, and print what was found as one line of JSON."""
    torch.set_num_threads(1)
    work, real_model, name, length, task, index = sys.argv[1:]
    context = Context(Path(work), {"real_model": Path(real_model)})
    print(json.dumps(measure(context, name, int(length), task, int(index)), default=vars))


if __name__ == "__main__":
    main()
