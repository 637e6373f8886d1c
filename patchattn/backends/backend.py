"""What a backend offers: one object for each, made in its own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.page_table import TableInputs
from patchattn.call.paged import PagedRows, PagedStore
from patchattn.gates.base import HeadGate, Known
from patchattn.gates.decision import all_open
from patchattn.moments.prompt import PromptMoments
from patchattn.policy import MOST_TOKENS, MinBulk, Phase

Attend = Callable[[AttentionInputs, Tensor, float], Attended]

NOT_ASKED = MOST_TOKENS
"""The break-even of a call in which no query is asked: more bulk keys than any query has."""


@dataclass(frozen=True)
class CallShape:
    """What is known of an attention call before anything is computed.

    Args:
        batch: Number of sequences.
        queries: Query rows of each.
        keys: Key slots up to the last query's own.
        heads: Number of query heads.
        dim: Head dimension.
        sink_size: Number of first tokens that are always attended.
        window_size: Number of last tokens that are always attended.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    dim: int
    sink_size: int
    window_size: int


@dataclass(frozen=True)
class PagedBackend:
    """Attention of sequences with one query each whose keys are in pages, of which no more are read than needed.

    Args:
        attend: Does the same as `attend` of the backend; the call is as `PagedRows.without_keys` returns it.
        dense: Attends to every key, [sequences, heads, 1, value_dim].
    """

    attend: Callable[[AttentionInputs, PagedRows, PagedStore, Tensor, float], Attended]
    dense: Callable[[AttentionInputs, PagedRows, PagedStore], Tensor]


@dataclass(frozen=True)
class TableBackend:
    """The same for all sequences with one query of a step at once, where decisions stay on the device.

    Args:
        attend: Weighs by a gate that reads no keys, and attends; rows that are not asked read all of their keys. Of
            moments, positions and hidden states it is given a row for each of `PageTable.numbers`.
        why_not: Says what keeps it from serving, from device, page size and head dimension; None if nothing does.
    """

    attend: Callable[[TableInputs, HeadGate, Known], Attended]
    why_not: Callable[[torch.device, int, int], str | None]


@dataclass(frozen=True)
class Backend:
    """A way to compute gated attention.

    Args:
        attend: Takes the call, the bulk log mass [batch, heads, query] in nats (+inf opens and -inf closes a pair for
            certain, NaN opens) and the margin in nats from which a gate closes; see
            `patchattn.backends.reference.attend`.
        break_even: What `min_bulk="auto"` means, from the shape of a call and its phase alone: the number of bulk keys
            below which asking a query is not expected to be faster than dense attention, or `NOT_ASKED` where asking
            any query of the call is not; see docs/decisions/0003-break-even.md.
        own_weighed: Weighs and attends in one go, where it can: what `weigh` of the gate and `attend` would give. Or
            None.
        own_dense: Attends to every causal key with nothing computed for a gate, [batch, heads, query, value_dim];
            None leaves that to `attend` with all gates open.
        paged: The same for keys in pages; None where the backend has none.
        by_table: The same for keys in pages, with all sequences and decisions on the device; None where it has none.
    """

    attend: Attend
    break_even: Callable[[CallShape, Phase], int]
    own_weighed: Callable[[AttentionInputs, HeadGate, Known], tuple[Attended, PromptMoments] | None] | None = None
    own_dense: Callable[[AttentionInputs], Tensor] | None = None
    paged: PagedBackend | None = None
    by_table: TableBackend | None = None

    def least_asked(self, sink_size: int, window_size: int) -> MinBulk:
        """Return the numbers of bulk keys below which no query is asked, however long its call."""

        def endless(phase: Phase) -> int:
            queries = 1 if phase == "decode" else MOST_TOKENS
            shape = CallShape(1, queries, MOST_TOKENS, 1, 64, sink_size, window_size)
            return self.break_even(shape, phase)

        return MinBulk(prefill=endless("prefill"), decode=endless("decode"))

    def dense(self, inputs: AttentionInputs) -> Tensor:
        """Attend to every causal key; [batch, heads, query, value_dim], zeros for rows that see no key."""
        if self.own_dense is not None:
            return self.own_dense(inputs)
        return self.attend(inputs, all_open(inputs), 0.0).output
