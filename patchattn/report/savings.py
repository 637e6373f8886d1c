"""How much work of attention was saved: a closed form from the counted keys."""

from __future__ import annotations

from dataclasses import dataclass

from patchattn.policy import Phase

ROWS_PER_READ: dict[Phase, int] = {"prefill": 128, "decode": 1}
"""Query positions for which a kernel reads a key once: the queries of a tile in prefill, the only one in decode."""


@dataclass(frozen=True)
class HeadShape:
    """Sizes of one layer's heads, for estimates.

    Args:
        dim: Numbers in a query and in a key.
        value_dim: Numbers in a value.
        group_size: Query heads that share a KV head.
        bytes_per_number: Bytes of one number in the cache.
        dtype: Name of the dtype that attention is computed in, without `torch.`; empty if it is not known.
    """

    dim: int
    value_dim: int
    group_size: int
    bytes_per_number: int
    dtype: str = ""


@dataclass(frozen=True)
class Savings:
    """Estimated work of attention: scores and weighted values, nothing else of the model, and not the gate itself.

    The gate's own work (moments, and for `OracleGate` a look at every key) is not taken off.

    Args:
        dense_flops: Floating-point operations of dense attention over the same calls: `2 (dim + value_dim)` for each
            (query head, query, key) triple, a multiplication and an addition counting two.
        flops: The same for the keys that were really scored.
        dense_bytes: Bytes of keys and values that dense attention reads: each key once for the query heads of a group,
            and in prefill once for 128 queries.
        bytes: The same for the keys that were really scored. As if the heads of a group opened together: a lower
            bound, so what is saved is an upper bound.
    """

    dense_flops: int
    flops: int
    dense_bytes: int
    bytes: int

    @property
    def flops_saved(self) -> int:
        """Operations saved; negative where tiles score more keys than are causal."""
        return self.dense_flops - self.flops

    @property
    def bytes_saved(self) -> int:
        """Bytes saved, at most."""
        return self.dense_bytes - self.bytes

    def __add__(self, other: Savings) -> Savings:
        """Add layers or phases."""
        return Savings(
            self.dense_flops + other.dense_flops,
            self.flops + other.flops,
            self.dense_bytes + other.dense_bytes,
            self.bytes + other.bytes,
        )


def of_keys(scored_keys: int, causal_keys: int, shape: HeadShape, phase: Phase) -> Savings:
    """Estimate one layer in one phase from its (query head, query, key) triples."""
    numbers = shape.dim + shape.value_dim
    sharing = shape.group_size * ROWS_PER_READ[phase]

    def read(triples: int) -> int:
        return triples * numbers * shape.bytes_per_number // sharing

    return Savings(2 * numbers * causal_keys, 2 * numbers * scored_keys, read(causal_keys), read(scored_keys))
