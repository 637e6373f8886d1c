"""A few rows against many keys in bfloat16 by two matrix products, which read keys faster than the fused kernel does.

A product in bfloat16 sums in float32 and rounds the result: scores of 30 nats would come out wrong by a tenth of a nat.
So the log mass of the keys that were read before goes into the sum. What is left of a score that counts beside these is
a few nats at most, and its rounding is that which the kernel gives to its weights.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from patchattn.backends.blockwise.softmax import Softmax

GRID = 128
"""Products are over multiples of so many keys: their kernels are compiled for each length, in half a millisecond."""

# Numbers in the keys from which the products gain: they are half a dozen small operations beside.
_FEWEST_NUMBERS = 1 << 18
# The kernel takes one row at a tenth of the speed of several.
_FEWEST_NUMBERS_OF_ONE_ROW = 1 << 15
_MOST_ROWS = 16
# More at once leave the processor's cache, and the copies that a product makes of them the allocator's heap.
_MOST_NUMBERS = 1 << 21
# A weight beside the mass of the keys before; beyond it weights are told from a higher level.
_LARGEST_WEIGHT = math.exp(2)


def may_use_products(query: Tensor, key: Tensor, begin: int, end: int) -> bool:
    """Say whether two products attend to slots of a call without softcap, and are faster than the fused kernel.

    Args:
        query: [kv_heads, rows, dim].
        key: [kv_heads, keys, dim].
        begin: First slot to attend to.
        end: Past the last slot.
    """
    kv_heads, rows, dim = query.shape
    fewest = _FEWEST_NUMBERS if rows > 1 else _FEWEST_NUMBERS_OF_ONE_ROW
    return (
        query.dtype == torch.bfloat16
        and kv_heads * (end - begin) * dim >= fewest
        and rows <= _MOST_ROWS
        and begin + _on_grid(end - begin) <= key.shape[1]
        and query.device.type == "cpu"
        and _has_fast_products()
    )


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, begin: int, end: int, scale: float, near: Softmax
) -> Softmax | None:
    """Attend rows to a range of slots and to keys that they have attended to, where `may_use_products`.

    Args:
        query: [kv_heads, rows, dim] in bfloat16.
        key: [kv_heads, keys, dim]; up to 127 keys after `end` are read and passed over.
        value: [kv_heads, keys, value_dim]; rows spoil where one that is passed over is not finite.
        begin: First slot to attend to.
        end: Past the last slot.
        scale: Factor on the dot products.
        near: Of the other keys: output [kv_heads, rows, value_dim], log mass [kv_heads, rows] in float32.

    Returns:
        Output [kv_heads, rows, value_dim] and log mass [kv_heads, rows] of all, float32; None where scores are not
        finite.
    """
    n_keys = end - begin
    length = _on_grid(n_keys)
    key, value = (x.narrow(1, begin, length) for x in (key, value))
    step = max(_MOST_NUMBERS // (key.shape[0] * key.shape[2]) // GRID, 1) * GRID
    for start in range(0, length, step):
        some = slice(start, start + step)
        level = near.log_mass.to(query.dtype).unsqueeze(1)
        weights = _weights(query, key[:, some], level, scale, n_keys - start)
        if not weights.amax().item() <= _LARGEST_WEIGHT:
            level = level + weights.mT.contiguous().amax(-1).clamp(min=1).log().unsqueeze(1)
            weights = _weights(query, key[:, some], level, scale, n_keys - start)
            if not weights.amax().item() <= _LARGEST_WEIGHT:
                return None
        before = (near.log_mass - level.squeeze(1)).exp_()
        total = weights.sum(1, dtype=torch.float32).add_(before)
        output = (near.output * before.unsqueeze(-1)).add_(torch.bmm(weights.mT, value[:, some]))
        near = Softmax(output.div_(total.unsqueeze(-1)), total.log_().add_(level.squeeze(1)))
    return near


def is_flat(x: Tensor) -> bool:
    """Say whether batch and KV heads of a tensor are one axis, so that no copy is made of them."""
    return x.stride(0) == x.shape[1] * x.stride(1)


def _weights(query: Tensor, key: Tensor, level: Tensor, scale: float, n_seen: int) -> Tensor:
    """Compute weights relative to that of the level, [heads, keys, rows]; 0 from key `n_seen` on."""
    weights = torch.baddbmm(level, key, query.mT, beta=-1, alpha=scale).exp_()
    if n_seen < key.shape[1]:
        weights.narrow(1, n_seen, key.shape[1] - n_seen).zero_()
    return weights


def _on_grid(n_keys: int) -> int:
    return -(-n_keys // GRID) * GRID


@functools.cache
def _has_fast_products() -> bool:
    """Say whether the processor multiplies matrices in bfloat16 by itself; torch is many times slower where not."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
