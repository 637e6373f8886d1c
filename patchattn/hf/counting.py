"""What a patched layer counts for the report: in plain integers where the host runs it, in tensors elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchattn.call.inputs import Attended
from patchattn.call.regions import Regions, host_may_read
from patchattn.hf.cache import REBUILD_REASONS
from patchattn.policy import PHASES, Phase

DENSE_REASONS = ("layer", "phase", "short", "mask", "local")
"""Why a call does not go through the gate: the policy leaves out the layer or the phase, no query has enough bulk keys,
the call brings a mask that is not plainly causal (packed sequences, a 4-D mask), or the layer is local already (sliding
or chunked). The last two run the model's own attention implementation."""

_BY_PHASE = ("asked", "below", "scored", "causal", "gated_calls")
_PLACES = [(name, phase) for name in _BY_PHASE for phase in PHASES] + [("dense_calls", why) for why in DENSE_REASONS]
_PLACES += [("rebuilt", why) for why in REBUILD_REASONS]
_PLACE = {what: place for place, what in enumerate(_PLACES)}
_MOST_WAITING = 64


class Counters(nn.Module):
    """Counters of one layer.

    A compiled graph and a device count in tensors: integers would recompile the graph, or wait for the device. Eager
    calls on a CPU count in integers, which costs a third, and sum the decisions of many decode steps at once. The
    buffers follow the module's device, are not cast by `model.to(dtype)` and stay out of the state dict.

    Args:
        heads: Number of query heads on this device.
    """

    dense_reasons, rebuild_reasons = DENSE_REASONS, REBUILD_REASONS
    opened: Tensor
    counts: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("opened", torch.zeros(len(PHASES), heads, dtype=torch.long), persistent=False)
        self.register_buffer("counts", torch.zeros(len(_PLACES), dtype=torch.long), persistent=False)
        self.on_host = [0] * len(_PLACES)
        self.waiting: tuple[list[Tensor], ...] = tuple([] for _ in PHASES)

    def add(self, name: str, which: str, amount: int | Tensor = 1) -> None:
        """Add to a counter; `which` is a phase or a reason."""
        place = _PLACE[name, which]
        if host_may_read(self.counts):
            self.on_host[place] += int(amount)
        else:
            self.counts[place].add_(amount)

    def count(self, phase: Phase, regions: Regions, attended: Attended) -> None:
        """Add one gated call."""
        counts = regions.counts
        self._add_open(phase, attended.open)
        self.add("asked", phase, counts.n_asked)
        self.add("below", phase, counts.n_below)
        self.add("scored", phase, attended.scored_keys)
        self.add("causal", phase, counts.n_causal * attended.open.shape[1])

    def _add_open(self, phase: Phase, opened: Tensor) -> None:
        row = PHASES.index(phase)
        if not host_may_read(opened) or opened.shape[2] != 1:
            self.opened[row].add_(opened.sum((0, 2)))
            return
        self.waiting[row].append(opened)
        if len(self.waiting[row]) >= _MOST_WAITING:
            self._settle()

    def _settle(self) -> None:
        for row, calls in enumerate(self.waiting):
            if calls:
                self.opened[row].add_(torch.cat(calls).sum((0, 2)).to(self.opened.device))
                calls.clear()

    @property
    def open_pairs(self) -> Tensor:
        """Open pairs by phase and query head, [phases, heads] int64."""
        self._settle()
        return self.opened

    def reset(self) -> None:
        """Set every counter back to zero."""
        self._settle()
        self.opened.zero_()
        self.counts.zero_()
        self.on_host = [0] * len(_PLACES)

    def _read(self, name: str, kinds: tuple[str, ...]) -> list[int]:
        counts = [a + b for a, b in zip(self.counts.tolist(), self.on_host, strict=True)]
        return [counts[_PLACE[name, kind]] for kind in kinds]

    @property
    def asked(self) -> list[int]:
        """Queries whose gates decided, by phase."""
        return self._read("asked", PHASES)

    @property
    def below(self) -> list[int]:
        """Queries below break-even, by phase."""
        return self._read("below", PHASES)

    @property
    def scored(self) -> list[int]:
        """Triples (query head, query, key) whose score was computed, by phase."""
        return self._read("scored", PHASES)

    @property
    def causal(self) -> list[int]:
        """Triples that dense attention has to score, by phase."""
        return self._read("causal", PHASES)

    @property
    def gated_calls(self) -> list[int]:
        """Calls that went through the gate, by phase."""
        return self._read("gated_calls", PHASES)

    @property
    def dense_calls(self) -> list[int]:
        """Calls that did not, by reason."""
        return self._read("dense_calls", DENSE_REASONS)

    @property
    def rebuilt(self) -> list[int]:
        """Steps of decode whose prompt moments were taken from all keys again, by reason."""
        return self._read("rebuilt", REBUILD_REASONS)
