"""Watching a patched model: every attention call is computed again as dense attention in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import Regions
from patchattn.policy import Phase, Policy
from patchattn.testing.budget import error_budget
from patchattn.testing.decisions import wrong_decisions
from patchattn.testing.dense import dense_attention, token_masks


@dataclass
class Watch:
    """Compares every attention call of a patched model with dense attention; `check` is an observer of calls.

    Args:
        policy: The policy in force.
        when: Beginning of the messages.
        mask: [batch, tokens]; nonzero where a token is real, over the whole text.
        begin: Slot of the first query of the next call; whoever calls the model sets it.
        calls: Calls compared so far.
        worst: Largest error so far as a share of its budget.
        decisions_checked: Whether all decisions could be compared with float64.
        budgets: Error budget by layer, the largest of the calls so far.
        pairs: Pairs that opened and pairs that were asked, by phase.
    """

    policy: Policy
    when: str
    mask: Tensor
    begin: int = 0
    calls: int = 0
    worst: float = 0.0
    decisions_checked: bool = True
    budgets: dict[int, float] = field(default_factory=dict)
    pairs: dict[Phase, list[int]] = field(default_factory=lambda: {"prefill": [0, 0], "decode": [0, 0]})

    def open_fraction(self) -> dict[Phase, float]:
        """Share of the pairs asked that opened, by phase."""
        return {phase: opened / asked for phase, (opened, asked) in self.pairs.items() if asked}

    def check(self, layer: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        """Compare one call, output and decisions; raises AssertionError naming the first place that differs."""
        attended = attend()
        policy, length = self.policy, inputs.query.shape[2]
        phase: Phase = "decode" if length == 1 else "prefill"
        real = self.mask[:, : self.begin + length].bool().to(inputs.query.device)
        rows = real[:, self.begin :]
        if inputs.key.shape[2] != real.shape[1]:
            raise AssertionError(
                f"{self.when}: layer {layer} was given {inputs.key.shape[2]} keys where the text has {real.shape[1]}."
            )
        sizes = {"sink_size": policy.sink_size, "window_size": policy.window_size}
        n_bulk = token_masks(real, self.begin, range(length), **sizes)[2]
        break_even = policy.break_even(phase)
        asked = ((n_bulk >= max(break_even, 1)) & rows)[:, None].expand_as(attended.open)
        stray = attended.open & ~asked
        if stray.any():
            raise AssertionError(f"{self._at(layer, phase, stray)} is reported open but had nothing to decide.")
        reads_bulk = attended.open | ((n_bulk > 0) & (n_bulk < break_even))[:, None]
        parts = (inputs.query, inputs.key, inputs.value, reads_bulk, real, self.begin)
        features = {"scale": inputs.scale, "softcap": inputs.softcap, "sink_logits": inputs.sink_logits}
        truth = dense_attention(*parts, **sizes, **features)
        plain = dense_attention(*parts, **sizes, **features, dtype=inputs.compute_dtype)
        self._compare(layer, phase, inputs, attended, rows, truth.output, plain.output.to(inputs.query.dtype))
        self.calls += 1
        if layer not in (policy.layers or ()) or phase not in policy.phases:
            return attended
        regions = Regions.of(real, query_length=length, break_even=break_even, **sizes)
        found = wrong_decisions(policy, layer, inputs, regions, attended.open, truth, plain)
        if found is None:
            self.decisions_checked = False
        elif found[0].any():
            wrong, margin, tolerance = found
            index = tuple(wrong.nonzero()[0].tolist())
            decided = "opens" if attended.open[index] else "closes"
            raise AssertionError(
                f"{self._at(layer, phase, wrong)} {decided}, but in float64 its margin is {margin[index]:.6g} nats, "
                f"and it may be off by {tolerance:.1e}; {int(wrong.sum())} decisions of this call are wrong."
            )
        self.pairs[phase][0] += int(attended.open.sum())
        self.pairs[phase][1] += int(asked.sum())
        return attended

    def _compare(
        self,
        layer: int,
        phase: Phase,
        inputs: AttentionInputs,
        attended: Attended,
        rows: Tensor,
        truth: Tensor,
        plain: Tensor,
    ) -> None:
        # What padding computes reaches nobody.
        real = rows[:, None, :, None]
        got, truth, plain = (torch.where(real, x.double(), 0) for x in (attended.output, truth, plain))
        error = (got - truth).abs().amax(-1)
        # One decoded token is too little to tell how far plain computation errs: the layer's run so far is.
        budget = max(self.budgets.get(layer, 0.0), error_budget(plain, truth, inputs.query.dtype))
        self.budgets[layer] = budget
        beyond = ~(error <= budget)
        if beyond.any():
            index = tuple(beyond.nonzero()[0].tolist())
            gate = "open" if attended.open[index] else "closed"
            raise AssertionError(
                f"{self._at(layer, phase, beyond)} differs from dense attention under the same mask by "
                f"{error[index]:.3e}; the error budget is {budget:.3e} (plain {inputs.query.dtype} errs by "
                f"{(plain - truth).abs().max():.3e} here). Its gate is {gate}. Beyond the budget in this call: heads "
                f"{beyond.any(2).any(0).nonzero()[:, 0].tolist()}, {int(beyond.sum())} of {beyond.numel()} rows."
            )
        if budget:
            self.worst = max(self.worst, (error.max() / budget).item())

    def _at(self, layer: int, phase: Phase, wrong: Tensor) -> str:
        row, head, query = wrong.nonzero()[0].tolist()
        return f"{self.when}: layer {layer}, batch row {row}, head {head}, query {self.begin + query} ({phase})"
