"""Compare sources of key moments: the prompt, and a calibration that holds them after or before the rotary embedding.

python recipes/evaluate/key_moments.py --out docs/results/key_moments.md
"""

from __future__ import annotations

import argparse
import contextlib
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
from patchattn.calibration.collect import read_document
from patchattn.evaluation.scores import Scores, score, wilson_interval
from patchattn.evaluation.tasks import Document
from patchattn.gate import Measured, bulk_log_mass_from_calibration, exact_bulk_log_mass
from patchattn.hf.hooks import STATE
from patchattn.hf.support import attention_modules
from patchattn.inputs import Attended, AttentionInputs
from patchattn.moments import CHUNK, KeyMoments, bulk_log_mass_from_prompt
from patchattn.policy import Estimate
from patchattn.reference import masked_log_mass

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
{tokens:,} tokens, sink {sink}, window {window}; moments of other text are from {measured} documents, everything is judged
on {judged} others of the same kind ({facts} facts). Made by `python recipes/evaluate/key_moments.py`.

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

- **prompt**: this sequence's own bulk keys.
- **after RoPE, 5 lengths**: mean and covariance of the rotated keys for {five} bulk keys; a query takes those nearest
  to its own number of bulk keys. What `MomentGate(moments="calibration")` uses.
- **after RoPE, 1 length**: only those for {most:,} bulk keys.
- **after RoPE, every {chunk}**: as above, but for every multiple of {chunk} bulk keys: what five lengths give away.
- **before RoPE, in closed form**: one mean and covariance of the keys before rotation, taken as the same at every
  position. Averaging the rotations of the positions that are bulk, a geometric sum for each pair of frequencies, gives
  the moments in the query's frame for any number of bulk keys; here for every multiple of {chunk}.
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


def turned(keys: Tensor, frequencies: Tensor, *, back: bool = False) -> Tensor:
    """Rotate keys [..., keys, dim] from slot 0 on, or back, as complex numbers [..., keys, dim / 2]."""
    first, second = keys.double().chunk(2, dim=-1)
    angle = torch.arange(keys.shape[-2])[:, None] * frequencies
    return torch.complex(first, second) * torch.polar(torch.ones_like(angle), -angle if back else angle)


class Sums:
    """Sums over the documents that moments are taken from, by layer: of rotated keys, and of keys before rotation."""

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies
        self.after: dict[tuple[int, int], KeyMoments] = {}
        self.before: dict[int, KeyMoments] = {}

    def add(self, layer: int, inputs: AttentionInputs) -> Attended:
        """Add the bulk keys of a document's last query."""
        bulk = inputs.key[0, :, SINK : SINK + MOST].double()
        for count in {*GRID, *FIVE}:
            self._merge(self.after, (layer, count), bulk[:, :count])
        upright = turned(inputs.key[0], self.frequencies, back=True)[:, SINK : SINK + MOST]
        self._merge(self.before, layer, torch.cat([upright.real, upright.imag], dim=-1))
        return densely(inputs)

    @staticmethod
    def _merge(kept: dict[Any, KeyMoments], at: Any, keys: Tensor) -> None:
        found = KeyMoments.of(keys)
        kept[at] = kept[at].merge(found) if at in kept else found

    def rotated(self, layer: int, counts: tuple[int, ...]) -> KeyMoments:
        """Moments of the rotated keys for some numbers of bulk keys."""
        return stacked([self.after[layer, count] for count in counts], counts)

    def in_closed_form(self, layer: int, counts: tuple[int, ...]) -> KeyMoments:
        """Moments that the keys before rotation have after it, averaged over the bulk slots."""
        return stacked([rotated_in_closed_form(self.before[layer], self.frequencies, n) for n in counts], counts)


def stacked(parts: list[KeyMoments], counts: tuple[int, ...]) -> KeyMoments:
    """Put moments for several numbers of bulk keys into one, leading axes [lengths, kv_heads]."""
    mean, covariance = (torch.stack([getattr(p, name) for p in parts]).float() for name in ("mean", "covariance"))
    return KeyMoments(torch.tensor(counts)[:, None].expand(mean.shape[:2]).float(), mean, covariance)


def rotated_in_closed_form(before: KeyMoments, frequencies: Tensor, count: int) -> KeyMoments:
    """Average the moments of keys over the rotations of the first `count` bulk slots.

    With dimension pairs as complex numbers x, slot j turns x_f by `exp(i f j)`. The mean of x_f is multiplied by the
    mean of that over slots, E[x_f conj(x_g)] by the mean of `exp(i (f - g) j)`, and E[x_f x_g] by that of
    `exp(i (f + g) j)`.
    """
    half = before.mean.shape[-1] // 2

    def mean_turn(frequency: Tensor) -> Tensor:
        sine = (frequency / 2).sin()
        size = torch.where(sine.abs() < 1e-12, 1.0, (count * frequency / 2).sin() / (count * sine))
        return torch.polar(torch.ones_like(frequency), frequency * (SINK + (count - 1) / 2)) * size

    second = before.covariance + before.mean[..., :, None] * before.mean[..., None, :]
    uu, uv, vv = second[..., :half, :half], second[..., :half, half:], second[..., half:, half:]
    hermitian = torch.complex(uu + vv, uv.mT - uv) * mean_turn(frequencies[:, None] - frequencies)
    plain = torch.complex(uu - vv, uv + uv.mT) * mean_turn(frequencies[:, None] + frequencies)
    mean = torch.complex(before.mean[..., :half], before.mean[..., half:]) * mean_turn(frequencies)
    mean = torch.cat([mean.real, mean.imag], dim=-1)
    cross = (plain.imag - hermitian.imag) / 2
    top = torch.cat([(hermitian.real + plain.real) / 2, cross], dim=-1)
    bottom = torch.cat([cross.mT, (hermitian.real - plain.real) / 2], dim=-1)
    second = torch.cat([top, bottom], dim=-2)
    return KeyMoments(before.count, mean, second - mean[..., :, None] * mean[..., None, :])


def from_prompt(_: int, inputs: AttentionInputs, estimate: Estimate) -> Tensor:
    """Estimate with moments of the sequence's own keys."""
    query, key, regions = inputs.query, inputs.key, inputs.regions
    return bulk_log_mass_from_prompt(query, key, regions, scale=inputs.scale, estimate=estimate)[0]


def from_text(moments: dict[int, KeyMoments], layer: int, inputs: AttentionInputs, estimate: Estimate) -> Tensor:
    """Estimate with moments of other text."""
    return bulk_log_mass_from_calibration(inputs, Measured(moments=moments[layer]), estimate=estimate)


def sources(sums: Sums) -> dict[str, Source]:
    """Name the sources to compare."""
    layers = sorted(sums.before)

    def after(counts: tuple[int, ...]) -> Source:
        return partial(from_text, {layer: sums.rotated(layer, counts) for layer in layers})

    return {
        "prompt": from_prompt,
        "after RoPE, 5 lengths": after(FIVE),
        "after RoPE, 1 length": after((MOST,)),
        f"after RoPE, every {CHUNK}": after(GRID),
        "before RoPE, in closed form": partial(
            from_text, {layer: sums.in_closed_form(layer, GRID) for layer in layers}
        ),
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
        bulk, local = exact_bulk_log_mass(inputs), exact_local_log_mass(inputs)
        for one in judged.values():
            one.add(layer, inputs, local, bulk)
        return densely(inputs)

    with hooked(model, attend):
        for ids in tokens:
            read_document(model, ids)
    return [one.row(name) for name, one in judged.items()]


def exact_local_log_mass(inputs: AttentionInputs) -> Tensor:
    """Compute the log mass of the local keys, [1, heads, query]."""
    from patchattn.gate import attention_scores

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
        found = score(model, judged)
    return handle.report().open_fraction("prefill"), found


def main() -> None:
    """Take moments, judge every source, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measured", type=int, default=32, help="documents that moments are taken from")
    parser.add_argument("--judged", type=int, default=8, help="documents that sources are judged on")
    parser.add_argument("--out", type=Path, default=Path("docs/results/key_moments.md"))
    arguments = parser.parse_args()
    model, _ = demo.load()
    model = model.float()  # so that differences come from the moments, not from rounding
    sums = Sums(model.model.rotary_emb.inv_freq.double())
    with hooked(model, sums.add):
        for document in documents(arguments.measured, LENGTH):
            read_document(model, torch.tensor(document.token_ids))
    named = sources(sums)
    judged = documents(arguments.judged, LENGTH, seed="moments")
    accuracy = judge(model, [torch.tensor(document.token_ids) for document in judged], named)
    print("\n".join(accuracy), flush=True)
    lines = []
    for name, source in {"(dense)": None, **named}.items():
        opened, found = (1.0, score(model, judged)) if source is None else quality(model, judged, source)
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
    )
    arguments.out.write_text(page)


if __name__ == "__main__":
    main()
