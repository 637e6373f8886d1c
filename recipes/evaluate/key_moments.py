"""Compare sources of key moments: the prompt, and a calibration that holds them after or before the rotary embedding.

python recipes/evaluate/key_moments.py --out docs/results/key_moments.md
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "calibrate")]

from documents import documents

import patchattn
from patchattn import OpenGate, Policy, demo
from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import attention_scores, exact_masses, masked_log_mass
from patchattn.evaluation.answers import Scores, teacher_forced
from patchattn.evaluation.documents import Document
from patchattn.evaluation.statistics import wilson_interval
from patchattn.hf.hooks import STATE
from patchattn.hf.support import attention_modules
from patchattn.measuring.collect import read_document
from patchattn.moments.gaussian import CHUNK, Estimate, KeyMoments, log_mass_of_gaussian
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.moments.text import RotaryMoments, Rotation, bulk_log_mass_from_text

LENGTH, SINK, WINDOW = 4096, 16, 256
MOST = LENGTH - SINK - WINDOW
FIVE = tuple(MOST >> step for step in range(4, -1, -1))
GRID = tuple(range(CHUNK, MOST + 1, CHUNK))
MARGIN = 0.405465  # a threshold of 0.6
OPENED = (0.3, 0.5)

Source = Callable[[int, AttentionInputs, Estimate], Tensor]
"""From layer, call and estimate to the estimated bulk log mass, [1, heads, query]."""

PAGE = """# Where key moments come from

How well the bulk log mass is estimated with key moments of the prompt and of other text. The shipped model in float32,
{tokens:,} tokens, sink {sink}, window {window}; moments of other text are from {measured} documents, everything is
judged on {judged} others of the same kind ({facts} facts). Made by `python recipes/evaluate/key_moments.py`.

| moments | bias | spread | correlation | missed at 30% open | at 50% open |
|---|---|---|---|---|---|
{accuracy}

Bias and spread are of the estimated minus the true log mass, in nats, with the saturating estimate, which is finite for
every pair; correlation is that of estimated and true margin. All three are per head, median over heads (and the worst
head), over pairs with at least {chunk} bulk keys. Missed is the missed mass where one margin for all heads opens this
share of these pairs, with the guarded estimate.

The same sources in the patched model, guarded estimate, threshold 0.6 for every head:

| moments | open | facts exact (95% interval) | text loss |
|---|---|---|---|
{quality}

- **prompt**: this sequence's own bulk keys, the default.
- **before RoPE, in closed form**: one mean and covariance of the keys before rotation, taken as the same at every
  position. Averaging the rotations of the bulk positions, a geometric sum for each pair of frequencies, gives the
  moments for any number of bulk keys. This is `MomentGate(moments="calibration")`.
- **after RoPE, 5 lengths**: mean and covariance of the rotated keys for {five} bulk keys; a query takes
  those nearest to its own number.
- **after RoPE, 1 length**: only those for {most:,} bulk keys.
- **after RoPE, every {chunk} keys**: for every multiple of {chunk} bulk keys: the best that one matrix for each length
  could give, at {grid} times the size of the closed form.
"""


@contextlib.contextmanager
def hooked(model: Any, attend: Callable[[int, AttentionInputs], Attended]) -> Iterator[patchattn.PatchHandle]:
    """Let `attend` compute the attention of every layer."""
    policy = Policy(sink_size=SINK, window_size=WINDOW, min_bulk=0, gate=OpenGate())
    with patchattn.patch(model, policy, backend="blockwise") as handle:
        for layer, module in attention_modules(model).items():
            module._modules[STATE].attend = lambda inputs, mass, threshold, layer=layer: attend(layer, inputs)
        yield handle


def densely(inputs: AttentionInputs) -> Attended:
    """Attend with every gate open."""
    return blockwise_attend(inputs, torch.full(inputs.query.shape[:3], torch.inf), 0.0)


class Sums:
    """Sums over the documents that moments are taken from, by layer: of rotated keys, and of keys before rotation."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.after: dict[tuple[int, int], KeyMoments] = {}
        self.before: dict[int, KeyMoments] = {}

    def add(self, layer: int, inputs: AttentionInputs) -> Attended:
        """Add the bulk keys of a document's last query."""
        bulk = inputs.key[0, :, SINK : SINK + MOST].double()
        for count in {*GRID, *FIVE}:
            self._merge(self.after, (layer, count), bulk[:, :count])
        self._merge(self.before, layer, self.rotation.undone(bulk, torch.arange(SINK, SINK + MOST)))
        return densely(inputs)

    @staticmethod
    def _merge(kept: dict[Any, KeyMoments], at: Any, keys: Tensor) -> None:
        found = KeyMoments.of(keys)
        kept[at] = kept[at].merge(found) if at in kept else found

    def turned(self, layer: int) -> RotaryMoments:
        """Moments of the keys before rotation, to be turned in closed form."""
        mean, covariance = self.before[layer].mean.float(), self.before[layer].covariance.float()
        return RotaryMoments(mean, covariance, self.rotation.frequencies)


def from_prompt(_: int, inputs: AttentionInputs, estimate: Estimate) -> Tensor:
    """Estimate with moments of the sequence's own keys."""
    query, key, regions = inputs.query, inputs.key, inputs.regions
    return bulk_log_mass_from_prompt(query, key, regions, scale=inputs.scale, estimate=estimate)[0]


def from_lengths(
    sums: Sums, lengths: tuple[int, ...], layer: int, inputs: AttentionInputs, estimate: Estimate
) -> Tensor:
    """Estimate with moments of rotated keys, those of the length nearest to a query's number of bulk keys, by ratio."""
    n_bulk = inputs.regions.n_bulk[:, None]
    query = inputs.query.unflatten(1, (inputs.key.shape[1], -1)) * inputs.scale
    borders = torch.tensor([math.sqrt(low * high) for low, high in itertools.pairwise(lengths)])
    nearest = torch.bucketize(n_bulk.float(), borders)
    mass = query.new_zeros(inputs.query.shape[:3])
    for index, count in enumerate(lengths):
        mean, covariance = sums.after[layer, count].mean.float(), sums.after[layer, count].covariance.float()
        along = torch.einsum("bhgqd,hd->bhgq", query, mean).flatten(1, 2)
        spread = (torch.einsum("bhgqd,hde->bhgqe", query, covariance) * query).sum(-1).flatten(1, 2)
        found = log_mass_of_gaussian(n_bulk, along, spread, estimate=estimate)
        mass = torch.where(nearest == index, found, mass)
    return mass


def from_closed_form(
    moments: dict[int, RotaryMoments], layer: int, inputs: AttentionInputs, estimate: Estimate
) -> Tensor:
    """Estimate as `MomentGate(moments="calibration")` does."""
    return bulk_log_mass_from_text(inputs.query, inputs.regions, moments[layer], scale=inputs.scale, estimate=estimate)


def sources(sums: Sums) -> dict[str, Source]:
    """Name the sources to compare."""
    return {
        "prompt": from_prompt,
        "other text, before RoPE, in closed form": partial(
            from_closed_form, {layer: sums.turned(layer) for layer in sums.before}
        ),
        "other text, after RoPE, 5 lengths": partial(from_lengths, sums, FIVE),
        "other text, after RoPE, 1 length": partial(from_lengths, sums, (MOST,)),
        f"other text, after RoPE, every {CHUNK} keys": partial(from_lengths, sums, GRID),
    }


class Judged:
    """What one source says of every pair of some documents, beside the truth; by layer, [heads, pairs]."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rows: dict[int, list[Tensor]] = {}

    def add(self, layer: int, inputs: AttentionInputs, local: Tensor, bulk: Tensor) -> None:
        """Add a document: [saturating, guarded, true bulk, local] log masses."""
        enough = inputs.regions.n_bulk[0] >= CHUNK
        masses = (self.source(layer, inputs, "saturating"), self.source(layer, inputs, "guarded"), bulk, local)
        self.rows.setdefault(layer, []).append(torch.stack([mass[0][:, enough].double() for mass in masses]))

    def row(self, name: str) -> str:
        """Write the table's row."""
        found = torch.cat([torch.cat(parts, dim=-1) for parts in self.rows.values()], dim=1)
        saturating, guarded, bulk, local = found
        error = saturating - bulk
        bias, spread = error.mean(-1), error.std(-1)
        pairs = torch.stack([local - saturating, local - bulk], dim=1)
        correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
        share, margin = torch.sigmoid(bulk - local).flatten(), (local - guarded).flatten()
        order = margin.argsort()
        missed = [float(share[order[int(opened * len(order)) :]].sum() / len(order)) for opened in OPENED]
        worst = bias[bias.abs().argmax()]
        cells = [f"{bias.median():+.2f} ({worst:+.1f})", f"{spread.median():.2f} ({spread.max():.1f})"]
        cells += [f"{correlation.median():.2f} ({correlation.min():.2f})", *(f"{value:.2%}" for value in missed)]
        return " | ".join(["", name, *cells, ""]).strip()


def judge(model: Any, tokens: list[Tensor], named: dict[str, Source]) -> list[str]:
    """Compare every source with the truth on dense activations."""
    judged = {name: Judged(source) for name, source in named.items()}

    def attend(layer: int, inputs: AttentionInputs) -> Attended:
        bulk, local = exact_masses(inputs)[0].bulk, exact_local_log_mass(inputs)
        for one in judged.values():
            one.add(layer, inputs, local, bulk)
        return densely(inputs)

    with hooked(model, attend):
        for ids in tokens:
            read_document(model, ids)
    return [one.row(name) for name, one in judged.items()]


def exact_local_log_mass(inputs: AttentionInputs) -> Tensor:
    """Compute the log mass of the local keys, [1, heads, query]."""
    slabs = [slice(begin, begin + 256) for begin in range(0, inputs.query.shape[2], 256)]
    masks = (inputs.regions.local_mask(rows)[:, None] for rows in slabs)
    scores = (attention_scores(inputs, rows) for rows in slabs)
    parts = [masked_log_mass(score, mask, None) for score, mask in zip(scores, masks, strict=True)]
    return torch.cat(parts, dim=2)


def quality(model: Any, judged: list[Document], source: Source) -> tuple[float, Scores]:
    """Score the model with every gate decided by one source; open fraction and scores."""

    def attend(layer: int, inputs: AttentionInputs) -> Attended:
        return blockwise_attend(inputs, source(layer, inputs, "guarded"), MARGIN)

    with hooked(model, attend) as handle:
        found = teacher_forced(model, judged)
    return handle.report().open_fraction("prefill"), found


def main() -> None:
    """Take moments, judge every source, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measured", type=int, default=16, help="documents that moments are taken from")
    parser.add_argument("--judged", type=int, default=6, help="documents that sources are judged on")
    parser.add_argument("--out", type=Path, default=Path("docs/results/key_moments.md"))
    arguments = parser.parse_args()
    model, _ = demo.load()
    model = model.float()  # so that differences come from the moments, not from rounding
    sums = Sums(Rotation(model.model.rotary_emb.inv_freq))
    with hooked(model, sums.add):
        for document in documents(arguments.measured, LENGTH):
            read_document(model, torch.tensor(document.token_ids))
    named = sources(sums)
    judged = documents(arguments.judged, LENGTH, seed="moments")
    accuracy = judge(model, [torch.tensor(document.token_ids) for document in judged], named)
    print("\n".join(accuracy), flush=True)
    lines = []
    for name, source in {"(dense)": None, **named}.items():
        opened, found = (1.0, teacher_forced(model, judged)) if source is None else quality(model, judged, source)
        right, asked = found.right["fact"], found.asked["fact"]
        low, high = wilson_interval(right, asked)
        lines.append(f"| {name} | {opened:.1%} | {right / asked:.3f} ({low:.3f}-{high:.3f}) | {found.text_loss:.4f} |")
        print(lines[-1], flush=True)
    page = PAGE.format(
        tokens=LENGTH,
        sink=SINK,
        window=WINDOW,
        measured=arguments.measured,
        judged=arguments.judged,
        facts=found.asked["fact"],
        accuracy="\n".join(accuracy),
        quality="\n".join(lines),
        chunk=CHUNK,
        most=MOST,
        five=", ".join(f"{count:,}" for count in FIVE),
        grid=len(GRID),
    )
    arguments.out.write_text(page)


if __name__ == "__main__":
    main()
