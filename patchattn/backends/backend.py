"""What a backend offers: one object for each, made in its own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.gates.decision import all_open
from patchattn.policy import MinBulk

Attend = Callable[[AttentionInputs, Tensor, float], Attended]


@dataclass(frozen=True)
class Backend:
    """A way to compute gated attention.

    Args:
        attend: Takes the call, the bulk log mass [batch, heads, query] in nats (+inf opens and -inf closes a pair for
            certain, NaN opens) and the margin in nats from which a gate closes; see
            `patchattn.backends.reference.attend`.
        break_even: What `min_bulk="auto"` means: below this many bulk keys gated attention is not expected to be faster
            than dense; see docs/decisions/0003-break-even.md.
        own_dense: Attends to every causal key with nothing computed for a gate, [batch, heads, query, value_dim];
            None leaves that to `attend` with all gates open.
    """

    attend: Attend
    break_even: MinBulk
    own_dense: Callable[[AttentionInputs], Tensor] | None = None

    def dense(self, inputs: AttentionInputs) -> Tensor:
        """Attend to every causal key; [batch, heads, query, value_dim], zeros for rows that see no key."""
        if self.own_dense is not None:
            return self.own_dense(inputs)
        return self.attend(inputs, all_open(inputs), 0.0).output
