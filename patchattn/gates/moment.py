"""The gate that closes by the moments of the far keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patchattn.call.inputs import AttentionInputs
from patchattn.gates.base import HeadGate, Known
from patchattn.gates.thresholds import DEFAULT_SHARE, Threshold, margin_of
from patchattn.moments.gaussian import DEFAULT_ESTIMATE, Estimate
from patchattn.moments.prompt import PromptMoments, bulk_log_mass_from_prompt
from patchattn.moments.text import bulk_log_mass_from_text, counted_from


class MomentGate(HeadGate):
    """Close a head for a query when the moments of the far keys say that the local keys hold enough mass.

    The bulk keys of a sequence are summarised by their count, mean and covariance; the softmax mass of a query over
    them has a closed form (`estimate`). The head gate closes where the local keys' share of the mass, exact for the
    local keys and estimated for the bulk, is at least `threshold`.

    Args:
        threshold: Local share in (0, 1) from which a gate closes, the same for all heads: lower is cheaper, higher is
            safer. Or `KLTarget`, `OpenFractionTarget` or `RiskTarget`, which take a threshold for each head from a
            calibration.
        moments: Where the moments come from. `"prompt"`: from the sequence's own cached keys. `"calibration"`: from
            the calibration, measured on other text. A target needs a calibration that was measured with the same.
        estimate: `"lognormal"` is the estimate of QAdA (arXiv 2502.09647), an expectation over infinitely many keys.
            The others differ where the spread of the scores is so large that single keys rule the sum, which moments
            can't see: `"guarded"` opens there, `"saturating"` predicts a Gaussian maximum (Derrida 1980).
    """

    kind: Literal["moment"] = "moment"
    threshold: Threshold = DEFAULT_SHARE
    moments: Literal["prompt", "calibration"] = "prompt"
    estimate: Estimate = DEFAULT_ESTIMATE

    @property
    def margin(self) -> float:
        """Margin in nats from which the gate closes; 0 for a target: thresholds per head go into the bulk log mass."""
        return margin_of(self.threshold) if isinstance(self.threshold, float) else 0.0

    @property
    def keeps_moments(self) -> bool:
        """Whether the gate needs the running moments of the prompt's own keys."""
        return self.moments == "prompt"

    def of_calibration(self) -> str:
        """Say what the gate takes from a calibration; see `HeadGate.of_calibration`."""
        if self.moments == "calibration":
            return 'moments="calibration"'
        return "" if isinstance(self.threshold, float) else repr(self.threshold)

    def weigh(self, inputs: AttentionInputs, known: Known) -> tuple[Tensor, PromptMoments | None]:
        """Estimate the bulk log mass; see `HeadGate.weigh`."""
        measured, moments = known.measured, known.moments
        if self.moments == "calibration":
            mass = self._from_calibration(inputs, known)
        else:
            mass, moments = bulk_log_mass_from_prompt(
                inputs, moments, estimate=self.estimate, max_chunks=known.max_chunks
            )
        offsets = None if measured is None else measured.offsets(known.hidden, mass.dtype)
        return mass if offsets is None else with_offsets(mass, offsets), moments

    def _from_calibration(self, inputs: AttentionInputs, known: Known) -> Tensor:
        """Estimate from the key moments of a calibration, [batch, heads, query] nats.

        Without moments it is NaN, which opens, and so it is where positions do not count on from the first real token
        of a sequence, or are not known behind padding; -inf without bulk keys.
        """
        if known.measured is None or known.measured.moments is None:
            return torch.full(inputs.query.shape[:3], torch.nan, dtype=inputs.compute_dtype, device=inputs.query.device)
        regions = inputs.regions
        if known.positions is None or known.positions.dim() != 2:
            begin, is_known = None, (regions.first == 0)[:, None]
        else:
            begin, is_known = counted_from(known.positions, regions)
        mass = bulk_log_mass_from_text(inputs, known.measured.moments, estimate=self.estimate, begin=begin)
        is_known = is_known | (regions.n_bulk == 0)
        return torch.where(is_known[:, None], mass, torch.nan).to(inputs.compute_dtype)


def with_offsets(mass: Tensor, offsets: Tensor) -> Tensor:
    """Add to a bulk log mass what a calibration measured, so that comparing with 0 decides.

    Args:
        mass: [batch, heads, query] nats.
        offsets: See `MeasuredHeads.offsets`; -inf closes whatever the mass, also where the mass opens in doubt, but for
            heads that open with their group.
    """
    offsets = offsets.to(mass.dtype)
    return torch.where(offsets == -torch.inf, torch.finfo(mass.dtype).min, mass + offsets)
