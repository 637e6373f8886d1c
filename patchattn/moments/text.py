"""Moments of keys before the rotary embedding, and what it makes of them for any number of keys.

The rotary embedding turns pairs of dimensions: the key in slot `j`, as complex numbers x_f, becomes
`x_f exp(i f j)`. If x has the same mean and covariance at every position, then over the slots of the bulk

- the mean of x_f is multiplied by the mean of `exp(i f j)`,
- `E[x_f conj(x_g)]` by the mean of `exp(i (f - g) j)`, and `E[x_f x_g]` by that of `exp(i (f + g) j)`,

each a geometric sum: one mean and one covariance hold for every context length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions
from patchattn.moments.gaussian import CHUNK, DEFAULT_ESTIMATE, Estimate, KeyMoments, log_mass_of_gaussian

_CHUNKS_PER_SLAB = 32


@dataclass(frozen=True)
class Rotation:
    """How the rotary embedding of one layer turns keys.

    Args:
        frequencies: [dim / 2] radians per slot; 0 for dimensions that are not turned.
        order: [dim] int64; the model's dimension at each place of the rotary order, in which `i` and `i + dim / 2` turn
            together; None where that is the model's own.
    """

    frequencies: Tensor
    order: Tensor | None = None

    def undone(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Turn keys back.

        Args:
            keys: [..., keys, dim], after the rotary embedding.
            slots: [keys] position of each key.

        Returns:
            [..., keys, dim] float64, in rotary order.
        """
        keys = keys.double() if self.order is None else keys.index_select(-1, self.order.to(keys.device)).double()
        angle = slots[:, None] * self.frequencies.to(keys.device, torch.float64)
        u, v = keys.chunk(2, dim=-1)
        cosine, sine = angle.cos(), angle.sin()
        return torch.cat([u * cosine + v * sine, v * cosine - u * sine], dim=-1)


@dataclass(frozen=True)
class RotaryMoments:
    """Mean and covariance of keys before the rotary embedding.

    Dimensions are in rotary order: `i` and `i + dim / 2` turn together.

    Args:
        mean: [kv_heads, dim].
        covariance: [kv_heads, dim, dim].
        frequencies: [dim / 2] radians per slot; 0 for dimensions that are not turned.
        order: [dim] int64; the model's dimension at each place of the rotary order; None where that is the same.
    """

    mean: Tensor
    covariance: Tensor
    frequencies: Tensor
    order: Tensor | None = None

    def over_slots(self, first: int | Tensor, n: Tensor) -> KeyMoments:
        """Average over the rotations of `n` slots from slot `first` on.

        Args:
            first: Position of the first slot; a tensor goes with `n`, one for each.
            n: [...] at least 1; number of slots.

        Returns:
            Moments in rotary order, with leading axes [..., kv_heads].
        """
        half = self.frequencies.shape[0]
        f = self.frequencies
        second = self.covariance + self.mean[:, :, None] * self.mean[:, None, :]
        uu, uv, vv = second[:, :half, :half], second[:, :half, half:], second[:, half:, half:]
        cosine, sine = _mean_turn(f[:, None] - f, first, n)
        real, imag = uu + vv, uv.mT - uv
        apart_real, apart_imag = real * cosine - imag * sine, real * sine + imag * cosine
        cosine, sine = _mean_turn(f[:, None] + f, first, n)
        real, imag = uu - vv, uv + uv.mT
        together_real, together_imag = real * cosine - imag * sine, real * sine + imag * cosine
        across = together_imag - apart_imag
        top = torch.cat([apart_real + together_real, across], dim=-1)
        bottom = torch.cat([across.mT, apart_real - together_real], dim=-1)
        second = torch.cat([top, bottom], dim=-2) / 2

        cosine, sine = (part[..., 0, :] for part in _mean_turn(f[None], first, n))
        u, v = self.mean[:, :half], self.mean[:, half:]
        mean = torch.cat([u * cosine - v * sine, u * sine + v * cosine], dim=-1)
        covariance = second - mean[..., :, None] * mean[..., None, :]
        return KeyMoments(n[..., None].expand(mean.shape[:-1]).to(mean.dtype), mean, covariance)

    def to(self, device: torch.device) -> RotaryMoments:
        """Return the moments on a device."""
        order = None if self.order is None else self.order.to(device)
        mean, covariance = self.mean.to(device), self.covariance.to(device)
        return RotaryMoments(mean, covariance, self.frequencies.to(device), order)

    def of_heads(self, kv_heads: slice) -> RotaryMoments:
        """Return the moments of some of the KV heads."""
        return RotaryMoments(self.mean[kv_heads], self.covariance[kv_heads], self.frequencies, self.order)


def _mean_turn(frequencies: Tensor, first: int | Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `exp(i f j)` over `n` slots from `first` on: its real and imaginary part, [..., 1, rows, columns]."""
    n = n.to(frequencies.dtype)[..., None, None, None]
    if isinstance(first, Tensor):
        first = first.to(frequencies.dtype)[..., None, None, None]
    sine = (frequencies / 2).sin()
    length = torch.where(sine == 0, 1.0, (n * frequencies / 2).sin() / (n * torch.where(sine == 0, 1.0, sine)))
    middle = frequencies * (first + (n - 1) / 2)
    return length * middle.cos(), length * middle.sin()


def counted_from(positions: Tensor, regions: Regions) -> tuple[Tensor, Tensor]:
    """Find out from where a model counts positions.

    Args:
        positions: [batch or 1, query] int64; position that the model gives each query.
        regions: The call.

    Returns:
        [batch] int64: the position of each sequence's first real token, by its first real query; and [batch, query]
        bool: whether the position of each query is what counting on from there gives.
    """
    begins = positions.to(regions.valid.device) - regions.positions
    begin = begins.gather(1, regions.real.int().argmax(dim=1, keepdim=True))
    return begin[:, 0], begins == begin


def bulk_log_mass_from_text(
    inputs: AttentionInputs,
    moments: RotaryMoments,
    *,
    estimate: Estimate = DEFAULT_ESTIMATE,
    begin: Tensor | None = None,
) -> Tensor:
    """Estimate each query's bulk log mass from moments of other text.

    The moments are turned for the middle of each chunk of the grid that prompt moments are on, so that one prefill and
    many steps of decode agree.

    Args:
        inputs: The attention call; of its keys nothing is used.
        moments: Moments of the layer's keys.
        estimate: See `log_mass_of_gaussian`.
        begin: [batch] int64; position of each sequence's first real token, see `counted_from`. None for 0, as
            `generate` counts.

    Returns:
        [batch, heads, query] nats, dtype of the moments; -inf without bulk keys.
    """
    query, regions = inputs.query, inputs.regions
    batch, heads, length, dim = query.shape
    kv_heads = moments.mean.shape[0]
    if moments.order is not None:
        query = query.index_select(3, moments.order)
    n_bulk = regions.n_bulk
    first = regions.sink_size if begin is None else begin[:, None] + regions.sink_size
    chunk = CHUNK * (n_bulk[:, 0] // CHUNK)
    if length == 1:
        counts, groups = n_bulk[:, None], 1
        rows = torch.zeros_like(counts)
    else:
        groups = (length - 1) // CHUNK + 2
        counts = chunk[:, None, None] + torch.arange(groups * CHUNK, device=query.device).view(groups, CHUNK)
        # The row whose n_bulk is zero, extended below zero where padding or sink have not been filled yet.
        zero_row = regions.first + regions.sink_size + regions.window_size - 1 - regions.query_slot
        rows = (counts + zero_row[:, None, None]).clamp(0, length - 1)
    masses = []
    for at in range(0, groups, _CHUNKS_PER_SLAB):
        n, index = counts[:, at : at + _CHUNKS_PER_SLAB], rows[:, at : at + _CHUNKS_PER_SLAB].flatten(1)
        turned = moments.over_slots(first, n[..., 0] // CHUNK * CHUNK + CHUNK // 2)
        mean, covariance = (part.transpose(1, 2) for part in (turned.mean, turned.covariance))
        q = query.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim)).to(mean.dtype) * inputs.scale
        # [batch, kv_heads, chunks, rows of all heads of the group, dim]: one product for all that share a matrix.
        q = q.view(batch, kv_heads, -1, *n.shape[1:], dim).transpose(2, 3)
        shape, q = q.shape[:-1], q.flatten(3, 4)
        along, spread = (q @ mean[..., None])[..., 0], ((q @ covariance) * q).sum(-1)
        along, spread = along.view(shape), spread.view(shape)
        mass = log_mass_of_gaussian(n[:, None, :, None], along, spread, softcap=inputs.softcap, estimate=estimate)
        masses.append(mass.transpose(2, 3).flatten(1, 2).flatten(2))
    column = (n_bulk - chunk[:, None]).clamp(min=0) if length > 1 else torch.zeros_like(n_bulk)
    return torch.cat(masses, dim=2).gather(2, column[:, None].expand(-1, heads, -1))
