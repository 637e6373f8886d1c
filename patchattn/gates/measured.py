"""What a calibration measured for the heads of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.moments.running import fuses_products
from patchattn.moments.text import RotaryMoments

_PARTS = ("mean", "covariance", "frequencies", "order")


@dataclass(frozen=True)
class MeasuredHeads:
    """What a calibration measured for the heads of one layer.

    Args:
        margins: [heads] nats; the margin from which each head closes. -inf never opens it, +inf never closes it. None
            leaves the one threshold of the policy.
        moments: Moments of the keys of other text; None for none.
        probe: [heads, hidden]; what a layer's hidden state adds to the bulk log mass of each head, nats, so that
            margins say what closing costs. None for none.
    """

    margins: Tensor | None = None
    moments: RotaryMoments | None = None
    probe: Tensor | None = None

    def of_heads(self, heads: slice, kv_heads: slice) -> MeasuredHeads:
        """Return what concerns some of the query heads and KV heads."""
        margins = None if self.margins is None else self.margins[heads]
        moments = None if self.moments is None else self.moments.of_heads(kv_heads)
        return MeasuredHeads(margins, moments, None if self.probe is None else self.probe[heads])

    def offsets(self, hidden: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to a bulk log mass so that comparing with 0 decides, None for nothing.

        Args:
            hidden: [batch, query, hidden]; what the attention module was given. None where it is not known: heads
                open, but for those that are closed for every query.
            dtype: To compute in.

        Returns:
            [heads, 1] or [batch, heads, query] nats.
        """
        if self.margins is None:
            return None
        margins = self.margins.to(dtype)[:, None]
        if self.probe is None:
            return margins
        if hidden is None:
            return torch.where(margins == -torch.inf, margins, torch.nan)
        hidden, probe = hidden.to(dtype), self.probe.to(dtype)
        if hidden.shape[1] == 1 and fuses_products(hidden):
            return (hidden * probe).sum(-1, keepdim=True) + margins
        return torch.nn.functional.linear(hidden, probe).mT + margins

    def bits(self) -> dict[str, Tensor]:
        """Return the tensors as the bits of float32 in int32, which casting a module to another dtype leaves alone."""
        found = {"margins": self.margins, "probe": self.probe}
        if self.moments is not None:
            found |= {name: getattr(self.moments, name) for name in _PARTS}
        return {
            f"measured_{name}": tensor.float().contiguous().view(torch.int32)
            for name, tensor in found.items()
            if tensor is not None
        }

    @classmethod
    def of_bits(cls, bits: Mapping[str, Tensor | None]) -> MeasuredHeads:
        """Make it again from what `bits` returned; other names are passed over."""
        margins, probe, mean, covariance, frequencies, order = (
            None if (kept := bits.get(f"measured_{name}")) is None else kept.view(torch.float32)
            for name in ("margins", "probe", *_PARTS)
        )
        if mean is None or covariance is None or frequencies is None:
            return cls(margins, probe=probe)
        moments = RotaryMoments(mean, covariance, frequencies, None if order is None else order.long())
        return cls(margins, moments, probe)
