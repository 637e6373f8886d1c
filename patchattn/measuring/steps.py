"""Documents one after another: shared by processes, kept in a checkpoint, told to whoever waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchattn.measuring.checkpoint import keep, resume
from patchattn.measuring.statistics import Totals

Progress = Callable[[int, int], None]
"""Called with the number of finished documents and of all documents; one that is read twice counts twice."""


class Steps:
    """Does something with each of some documents, and goes on where an earlier run was broken off.

    Args:
        totals: Sums that a document adds to.
        checkpoint: File to which the sums are written after each document; None for none.
        key: Digest of everything that the run depends on.
        count: How many documents there will be in all.
        tell: Called after each.
    """

    def __init__(self, totals: Totals, checkpoint: Path | None, key: str, count: int, tell: Progress) -> None:
        self._totals, self._checkpoint, self._key, self._count, self._tell = totals, checkpoint, key, count, tell
        self._begun, self._done = 0, 0 if checkpoint is None else resume(totals, checkpoint, key)

    def each(self, documents: Sequence[int], do: Callable[[int], object]) -> None:
        """Do something with those of some documents that are this process's, unless the checkpoint has them."""
        rank, world = ranks()
        for index in documents[rank::world]:
            self._begun += 1
            if self._begun > self._done:
                do(index)
                if self._checkpoint is not None:
                    keep(self._totals, self._checkpoint, self._key, self._begun)
                self._tell(min(self._begun * world, self._count), self._count)

    def added_up(self) -> dict[str, Tensor]:
        """Return the sums of all processes."""
        return added_up(self._totals.sums)


def ranks() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def added_up(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return sums over all processes."""
    if ranks()[1] == 1:
        return sums
    on_gpu = torch.distributed.get_backend() == "nccl"
    found = {}
    for name, values in sums.items():
        shared = values.cuda() if on_gpu else values.clone()
        torch.distributed.all_reduce(shared)
        found[name] = shared.cpu()
    return found
