"""What a patched layer counts for the report: in plain integers where the host runs it, in tensors elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from patchattn.call.inputs import Attended
from patchattn.call.regions import Counts
from patchattn.hf.cache import REBUILD_REASONS
from patchattn.policy import PHASES, Phase
from patchattn.report import LayerCounts

DENSE_REASONS = ("layer", "not drafting", "phase", "short", "mask", "local")
"""Why a call does not go through the gate: the policy leaves out the layer or the phase, a model that drafts is not
about to, no query has enough bulk keys, the call brings a mask that is not plainly causal (packed sequences, a 4-D
mask), or the layer is local already (sliding or chunked). The last two run the model's own attention implementation."""

# In the order of the fields of `LayerCounts`.
_BY_PHASE = ("asked", "below", "scored", "causal", "gated_calls")
_PLACES = [(name, phase) for name in _BY_PHASE for phase in PHASES] + [("dense_calls", why) for why in DENSE_REASONS]
_PLACES += [("rebuilt", why) for why in REBUILD_REASONS]
_PLACE = {what: place for place, what in enumerate(_PLACES)}
_MOST_WAITING = 64


class Counters(nn.Module):
    """Counters of one layer.

    A compiled graph counts in tensors, for integers would recompile it. Elsewhere what the host knows is counted in
    integers, and what it would have to wait for is kept until many calls can be added up at once. The buffers follow
    the module's device, are not cast by `model.to(dtype)` and stay out of the state dict.

    Args:
        heads: Number of query heads on this device.
    """

    opened: Tensor
    counts: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("opened", torch.zeros(len(PHASES), heads, dtype=torch.long), persistent=False)
        self.register_buffer("counts", torch.zeros(len(_PLACES), dtype=torch.long), persistent=False)
        self.on_host = [0] * len(_PLACES)
        self.waiting: tuple[list[Tensor], ...] = tuple([] for _ in _PLACES)
        self.waiting_open: tuple[list[Tensor], ...] = tuple([] for _ in PHASES)

    def add(self, name: str, which: str, amount: int | Tensor = 1) -> None:
        """Add to a counter; `which` is a phase or a reason."""
        place = _PLACE[name, which]
        if torch.compiler.is_compiling():
            self.counts[place].add_(amount)
        elif isinstance(amount, int):
            self.on_host[place] += amount
        else:
            self._wait(self.waiting[place], amount)

    def count(self, phase: Phase, counts: Counts, attended: Attended) -> None:
        """Add one gated call."""
        self._add_open(phase, attended.open)
        self.add("asked", phase, counts.n_asked)
        self.add("below", phase, counts.n_below)
        self.add("scored", phase, attended.scored_keys)
        self.add("causal", phase, counts.n_causal)

    def _add_open(self, phase: Phase, opened: Tensor) -> None:
        row = PHASES.index(phase)
        if torch.compiler.is_compiling() or opened.shape[2] != 1:
            self.opened[row].add_(opened.sum((0, 2)))
        else:
            self._wait(self.waiting_open[row], opened)

    def _wait(self, waiting: list[Tensor], amount: Tensor) -> None:
        waiting.append(amount)
        if len(waiting) >= _MOST_WAITING:
            self._settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Counters:  # noqa: FBT001, FBT002
        """Move the buffers, as `nn.Module` does; what was counted so far is on one device."""
        self._settle()
        return super()._apply(fn, recurse)

    def _settle(self) -> None:
        for row, calls in enumerate(self.waiting_open):
            if calls:
                self.opened[row].add_(torch.cat(calls).sum((0, 2)).to(self.opened.device))
                calls.clear()
        for place, amounts in enumerate(self.waiting):
            if amounts:
                self.counts[place].add_(torch.stack(amounts).sum().to(self.counts.device))
                amounts.clear()

    def reset(self) -> None:
        """Set every counter back to zero."""
        self._settle()
        self.opened.zero_()
        self.counts.zero_()
        self.on_host = [0] * len(_PLACES)

    def of_phase(self, phase: Phase) -> LayerCounts:
        """Return what the gates did in one phase."""
        totals = self._totals()
        opened = self.opened[PHASES.index(phase)].tolist()
        asked, below, scored, causal, calls = (totals[name, phase] for name in _BY_PHASE)
        return LayerCounts(tuple(opened), asked, below, scored, causal * len(opened), calls)

    def by_reason(self, name: Literal["dense_calls", "rebuilt"]) -> dict[str, int]:
        """Return how many calls did not go through the gate, or rebuilt prompt moments, by reason; none with 0."""
        return {reason: count for (counter, reason), count in self._totals().items() if counter == name and count}

    def _totals(self) -> dict[tuple[str, str], int]:
        self._settle()
        return {what: a + b for what, a, b in zip(_PLACES, self.counts.tolist(), self.on_host, strict=True)}
