"""What the gates of a model weigh up: exact and estimated log masses of every pair, on dense activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.evaluation.documents import check_longest
from patchattn.gates import MomentGate, OpenGate
from patchattn.gates.base import Known
from patchattn.gates.measured import MeasuredHeads
from patchattn.hf.observe import observing
from patchattn.hf.patching import patch
from patchattn.measuring.collect import read_document
from patchattn.moments.gaussian import Estimate
from patchattn.policy import Policy

ESTIMATES: tuple[Estimate, ...] = ("guarded", "saturating", "lognormal")


@dataclass(frozen=True)
class Margins:
    """The masses that the gates of one layer compare while a model reads one document densely.

    Args:
        positions: [queries] int64; positions of the queries that have bulk keys.
        local: [heads, queries] nats; exact log mass of the local keys.
        bulk: [heads, queries] nats; exact log mass of the bulk keys.
        top: [heads, queries] nats; the largest score of a bulk key.
        estimates: Estimated log mass of the bulk keys, [heads, queries] nats, by source of the moments and name of the
            estimate. +inf where the gate opens whatever its threshold.
    """

    positions: Tensor
    local: Tensor
    bulk: Tensor
    top: Tensor
    estimates: dict[tuple[str, Estimate], Tensor]

    @property
    def bulk_share(self) -> Tensor:
        """Share of each query's attention that lies on bulk keys, [heads, queries]."""
        return torch.sigmoid(self.bulk - self.local)

    def opens(self, threshold: float, estimate: tuple[str, Estimate] | None = None) -> Tensor:
        """Say which pairs a gate opens, [heads, queries] bool.

        Args:
            threshold: Local share in (0, 1).
            estimate: Source of the moments and name of the estimate; None for the exact mass, as the oracle.
        """
        mass = self.bulk if estimate is None else self.estimates[estimate]
        return ~(self.local - mass >= math.log(threshold) - math.log1p(-threshold))


def record_margins(
    model: Any,
    token_ids: Sequence[int],
    *,
    sink_size: int = 16,
    windows: Sequence[int] = (1024,),
    estimates: Sequence[Estimate] = ESTIMATES,
    calibration: Any = None,
) -> dict[int, dict[int, Margins]]:
    """Read one document with dense attention and compute what every gate would compare.

    Takes about as long as dense attention in plain PyTorch; memory is linear in the document's length.

    Args:
        model: A causal language model that can be patched, not patched now.
        token_ids: The document.
        sink_size: Tokens in the sink.
        windows: Window sizes, all measured in one reading.
        estimates: Which estimates to compute.
        calibration: A `patchattn.Calibration`; for its own window, estimates from its key moments are computed too.

    Returns:
        By window and layer. Windows that the document does not outgrow are left out.

    Raises:
        DocumentError: The document is longer than the model's context.

    Example:
        >>> found = record_margins(model, document.token_ids, windows=(256,))  # doctest: +SKIP
        >>> found[256][0].opens(0.6).float().mean(1)  # open fraction of each head of layer 0  # doctest: +SKIP
    """
    check_longest(model, len(token_ids))
    sizes = [window for window in windows if len(token_ids) > sink_size + window]
    found: dict[int, dict[int, Margins]] = {window: {} for window in sizes}

    def observe(layer: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        for window, masses in zip(sizes, exact_masses(inputs, sizes), strict=True):
            at_window = replace(inputs, regions=replace(inputs.regions, window_size=window))
            asked = at_window.regions.asked[0]
            gates = [MomentGate(estimate=name) for name in estimates]
            known = Known()
            if calibration is not None and calibration.manifest.window_size == window:
                known = Known(measured=MeasuredHeads(moments=calibration.key_moments(layer)))
                gates += [MomentGate(estimate=name, moments="calibration") for name in estimates]
            found[window][layer] = Margins(
                positions=at_window.regions.positions[0, asked],
                local=masses.local[0, :, asked],
                bulk=masses.bulk[0, :, asked],
                top=masses.largest_bulk[0, :, asked],
                estimates={
                    (gate.moments, gate.estimate): gate.weigh(at_window, known)[0][0, :, asked] for gate in gates
                },
            )
        return attend()

    if sizes:
        policy = Policy(sink_size=sink_size, window_size=1, min_bulk=0, gate=OpenGate())
        with patch(model, policy, record=None) as handle, observing(handle, observe):
            read_document(model, torch.tensor(list(token_ids)))
    return found
