"""Compare sources of key moments: the prompt, and other text, after or before the rotary embedding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from context import LENGTH, POLICY, SINK, WINDOW, Answered, Context, Measurement, documents, load, read_densely
from page import Page, filled
from torch import Tensor

from patchattn import patch
from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import Masses, exact_masses
from patchattn.evaluation.answers import teacher_forced
from patchattn.hf.observe import observing
from patchattn.moments.gaussian import CHUNK, Estimate, KeyMoments
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.moments.text import RotaryMoments, Rotation, bulk_log_mass_from_text

MOST = LENGTH - SINK - WINDOW
FIVE = tuple(MOST >> step for step in range(4, -1, -1))
GRID = tuple(range(CHUNK, MOST + 1, CHUNK))
MARGIN = 0.405465  # a threshold of 0.6
OPENED = (0.3, 0.5)
MEASURED_ON, JUDGED_ON = 16, 6
"""Documents that moments are taken from, and that sources are judged on."""


@dataclass(frozen=True)
class Row(Answered):
    """One source of moments: how well it estimates on dense activations, and what the model does where it decides.

    `accuracy` has medians over heads and the worst heads, and the missed mass by open fraction; it is empty for dense
    attention. `open` is the fraction in prefill, `text_loss` in nats per token.
    """

    source: str
    accuracy: dict[str, float]
    open: float
    right: int
    asked: int
    text_loss: float


@cache
def moments_of_text() -> tuple[dict[tuple[int, int], KeyMoments], dict[int, RotaryMoments]]:
    """Take moments of the bulk keys of each document's last query.

    Returns:
        By layer and number of bulk keys, moments of keys as they are, [kv_heads, 1]; by layer, those before rotation.
    """
    rotation = Rotation(load()[0].model.rotary_emb.inv_freq)
    after: dict[tuple[int, int], KeyMoments] = {}
    before: dict[int, KeyMoments] = {}

    def add(kept: dict[Any, KeyMoments], at: Any, keys: Tensor) -> None:
        found = KeyMoments.of(keys)
        kept[at] = kept[at].merge(found) if at in kept else found

    def visit(layer: int, inputs: AttentionInputs) -> None:
        slots = torch.arange(SINK, SINK + MOST)
        keys = inputs.key[0, :, slots].double()
        add(before, layer, rotation.undone(keys, slots))
        for count in {*GRID, *FIVE}:
            add(after, (layer, count), keys[:, None, :count])

    read_densely(documents("calibrate", MEASURED_ON), visit)
    rotated = {at: KeyMoments(one.count, one.mean.float(), one.covariance.float()) for at, one in after.items()}
    means = {layer: (one.mean.float(), one.covariance.float()) for layer, one in before.items()}
    return rotated, {layer: RotaryMoments(*one, rotation.frequencies) for layer, one in means.items()}


def from_lengths(lengths: tuple[int, ...], layer: int, inputs: AttentionInputs, estimate: Estimate) -> Tensor:
    """Estimate with moments of rotated keys, those of the length nearest to a query's number of bulk keys, by ratio."""
    n_bulk = inputs.regions.n_bulk[:, None, None]
    query = inputs.query.unflatten(1, (inputs.key.shape[1], -1))
    borders = torch.tensor([math.sqrt(low * high) for low, high in itertools.pairwise(lengths)])
    nearest = torch.bucketize(n_bulk.float(), borders)
    mass = query.new_zeros(query.shape[:-1])
    for index, count in enumerate(lengths):
        found = moments_of_text()[0][layer, count].log_mass(query, n_bulk, scale=inputs.scale, estimate=estimate)
        mass = torch.where(nearest == index, found, mass)
    return mass.flatten(1, 2)


DENSE = "(dense)"
SOURCES: dict[str, Callable[[int, AttentionInputs, Estimate], Tensor]] = {
    "prompt": lambda _, inputs, estimate: bulk_log_mass_from_prompt(inputs, estimate=estimate)[0],
    "other text, before RoPE, in closed form": lambda layer, inputs, estimate: bulk_log_mass_from_text(
        inputs, moments_of_text()[1][layer], estimate=estimate
    ),
    "other text, after RoPE, 5 lengths": partial(from_lengths, FIVE),
    "other text, after RoPE, 1 length": partial(from_lengths, (MOST,)),
    f"other text, after RoPE, every {CHUNK} keys": partial(from_lengths, GRID),
}
"""From layer, call and estimate to the estimated bulk log mass, [1, heads, query]."""


@cache
def judged() -> list[tuple[int, AttentionInputs, Masses]]:
    """Read the documents that sources are judged on; layer, inputs and exact masses of every call."""
    found = []
    dense = documents("moments", JUDGED_ON)
    read_densely(dense, lambda layer, inputs: found.append((layer, inputs, exact_masses(inputs)[0])))
    return found


def accuracy_of(source: str) -> dict[str, float]:
    """Compare a source with the truth on dense activations, over the pairs with at least a chunk of bulk keys."""
    masses = []
    for layer, inputs, exact in judged():
        guesses = [SOURCES[source](layer, inputs, estimate) for estimate in ("saturating", "guarded")]
        enough = inputs.regions.n_bulk[0] >= CHUNK
        masses.append(torch.cat([*guesses, exact.bulk, exact.local])[..., enough].double())
    by_document = torch.stack(masses).unflatten(0, (JUDGED_ON, -1))  # [documents, layers, masses, heads, pairs]
    saturating, guarded, bulk, local = by_document.permute(2, 1, 3, 0, 4).flatten(3, 4).flatten(1, 2)
    bias, spread = (saturating - bulk).mean(-1), (saturating - bulk).std(-1)
    margins = torch.stack([local - saturating, local - bulk], dim=1)
    correlation = torch.stack([torch.corrcoef(of_head)[0, 1] for of_head in margins])
    bulk_share = torch.sigmoid(bulk - local).flatten()[(local - guarded).flatten().argsort()]
    found = {
        "bias": bias.median(), "worst_bias": bias[bias.abs().argmax()],
        "spread": spread.median(), "worst_spread": spread.max(),
        "correlation": correlation.median(), "worst_correlation": correlation.min(),
    }  # fmt: skip
    pairs = len(bulk_share)
    found |= {str(opened): bulk_share[int(opened * pairs) :].sum() / pairs for opened in OPENED}
    return {name: float(value) for name, value in found.items()}


def measure(_: Context, source: str) -> Row:
    """Judge a source, then let it decide about every pair of the patched model."""
    accuracy = {} if source == DENSE else accuracy_of(source)

    def observer(layer: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        if source == DENSE:
            return attend()
        return blockwise_attend(inputs, SOURCES[source](layer, inputs, "guarded"), MARGIN)

    with patch(load()[0], POLICY) as handle, observing(handle, observer):
        found = teacher_forced(load()[0], documents("moments", JUDGED_ON))
    opened = handle.report().open_fraction("prefill")
    return Row(source, accuracy, opened, found.right["fact"], found.asked["fact"], found.text_loss)


ROWS = Measurement("key_moments", Row, ("source",), lambda _: [(source,) for source in (DENSE, *SOURCES)], measure)
MEASURED = (ROWS,)


def page(context: Context) -> Page:
    """Show how well each source estimates, and what it opens and keeps."""
    rows = ROWS.rows(context)
    five = ", ".join(f"{count:,}" for count in FIVE)
    accuracy = [row for row in rows if row.accuracy]
    return Page(filled(globals(), rows=rows, accuracy=accuracy, asked=rows[0].asked, five=five, lengths=len(GRID)))
