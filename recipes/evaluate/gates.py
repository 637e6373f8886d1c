"""Compare all head gates on the shipped model: exact match and text loss against open fraction.

python recipes/evaluate/gates.py --out docs/results/gates
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent)]

from gates_page import write_pages
from grid import FULL, LEAN, Case, Setting, cases, wanted
from ranking import ranking
from shipped import LENGTHS, SINK, calibration, command_line, document, load
from store import Row, Store, share_out

import patchattn
from patchattn import Policy
from patchattn.evaluation.answers import teacher_forced
from patchattn.evaluation.documents import Document
from patchattn.testing.replay import replay_gates

BLOCK = 2
"""Documents that a gate reads before the next gate has its turn, so that an unfinished run has something of all."""


def measure(model: Any, case: Case, setting: Setting, documents: dict[int, Document]) -> Iterator[Row]:
    """Score one gate on some documents; yields what each one gives."""
    about = {"kinds": setting.kinds, "length": setting.length, "window": setting.window}
    about |= {"family": case.family, "setting": case.setting}
    if case.gate is None:
        for index, one in documents.items():
            yield about | {"document": index, "counts": [0, 0, 0, 0], **_scored(model, one)}
        return
    policy = Policy(sink_size=SINK, window_size=setting.window, min_bulk=0, gate=case.gate)
    measured = calibration() if setting.window == calibration().manifest.window_size else None
    with patchattn.patch(model, policy, calibration=measured) as handle:
        before = [0, 0, 0, 0]
        for index, one in documents.items():
            if case.random is not None:
                replay_gates(handle, _at_random(model, case, setting, index))
            scored = _scored(model, one)
            now = _counts(handle.report())
            yield about | {"document": index, "counts": [a - b for a, b in zip(now, before, strict=True)], **scored}
            before = now


def _scored(model: Any, one: Document) -> Row:
    found = teacher_forced(model, [one])
    return {"right": found.right, "asked": found.asked, "loss": found.text_loss}


def _counts(report: Any) -> list[int]:
    """Open pairs, pairs asked, keys scored and causal keys so far, in prefill."""
    layers = [phases["prefill"] for phases in report.layers.values()]
    opened = sum(sum(layer.open_pairs) for layer in layers)
    asked = sum(layer.asked * len(layer.open_pairs) for layer in layers)
    return [opened, asked, sum(layer.scored_keys for layer in layers), sum(layer.causal_keys for layer in layers)]


def _at_random(model: Any, case: Case, setting: Setting, index: int) -> dict[int, list[torch.Tensor]]:
    """Draw decisions for one document: whole heads, or single pairs."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    seed = f"{case.family}/{case.setting}/{setting.key}/{index}"
    shape = (layers, 1, heads, setting.length)
    asked = torch.arange(setting.length) >= SINK + setting.window
    if case.family == "random heads":
        chosen = random.Random(seed).sample(range(layers * heads), int(case.random or 0))
        opened = torch.zeros(layers * heads, dtype=torch.bool)
        opened[chosen] = True
        drawn = opened.view(layers, 1, heads, 1).expand(shape)
    else:
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
        drawn = torch.rand(shape, generator=generator) < (case.random or 0)
    return {layer: [drawn[layer] & asked] for layer in range(layers)}


def work(part: int, parts: int, folder: Path) -> None:
    """Measure what is not there yet of one process's documents."""
    model, *_ = load()
    store = Store(folder, "gates", part)
    done = {_key(row) for row in store.rows()}
    found = {length: ranking(folder, length) for length in LENGTHS}
    for setting, every, headline in _stages():
        mine = every[part::parts]
        for begin in range(0, len(mine), BLOCK):
            block = mine[begin : begin + BLOCK]
            documents = {i: document(setting.kinds, setting.length, f"gates/{i}") for i in block}
            for case in cases(setting, found[setting.length][str(setting.window)]):
                if headline and not case.headline:
                    continue
                about = (*setting.key, case.family, case.setting)
                missing = {i: one for i, one in documents.items() if (*about, i) not in done}
                if missing:
                    store.add(measure(model, case, setting, missing))
                    done |= {(*about, i) for i in missing}
            print(f"process {part}: {setting.key}, documents {list(block)}", flush=True)


def _stages() -> Iterator[tuple[Setting, range, bool]]:
    """Yield (setting, documents, only headline cases): what matters most comes first."""
    yield FULL, FULL.documents, False
    for setting in LEAN:
        yield setting, setting.documents, False
    yield FULL, FULL.headline, True


def _key(row: Row) -> tuple[Any, ...]:
    return (row["kinds"], row["length"], row["window"], row["family"], row["setting"], row["document"])


def main() -> None:
    """Measure every gate; documents that are saved already are kept."""
    arguments = command_line("gates", __doc__)
    found = {length: ranking(arguments.work, length) for length in LENGTHS}
    share_out(work, arguments.processes, arguments.work)
    write_pages(wanted(Store(arguments.work, "gates").rows(), found), arguments.out, arguments.work)


if __name__ == "__main__":
    main()
