"""What a calibration measured for the heads of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchattn.moments.text import RotaryMoments

_PARTS = ("mean", "covariance", "frequencies", "order")


@dataclass(frozen=True)
class MeasuredHeads:
    """What a calibration measured for the heads of one layer.

    Args:
        margins: [heads] nats; the margin from which each head closes. -inf never opens it, +inf never closes it. None
            leaves the one threshold of the policy.
        moments: Moments of the keys of other text; None for none.
    """

    margins: Tensor | None = None
    moments: RotaryMoments | None = None

    def of_heads(self, heads: slice, kv_heads: slice) -> MeasuredHeads:
        """Return what concerns some of the query heads and KV heads."""
        margins = None if self.margins is None else self.margins[heads]
        return MeasuredHeads(margins, None if self.moments is None else self.moments.of_heads(kv_heads))

    def bits(self) -> dict[str, Tensor]:
        """Return the tensors as the bits of float32 in int32, which casting a module to another dtype leaves alone."""
        found = {"margins": self.margins}
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
        margins, mean, covariance, frequencies, order = (
            None if (kept := bits.get(f"measured_{name}")) is None else kept.view(torch.float32)
            for name in ("margins", *_PARTS)
        )
        if mean is None or covariance is None or frequencies is None:
            return cls(margins)
        return cls(margins, RotaryMoments(mean, covariance, frequencies, None if order is None else order.long()))
