"""From the sums over documents to the tensors of a calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.calibration.key_moments import pack_covariance
from patchattn.calibration.prices import TRIED
from patchattn.measuring.statistics import MARGINS
from patchattn.measuring.values import values_of
from patchattn.moments.text import Rotation


def curve_tensors(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the curves."""
    halves = sums["documents"]
    every, known = halves.sum(), sums["errors"][0]
    bias = sums["errors"][1] / known.clamp(min=1)
    variance = sums["errors"][2] / known.clamp(min=1) - bias.square()
    pairs = sums["open_pairs"]
    return {
        "margins": MARGINS.clone(),
        "missed_mass": _half_upwards((sums["missed_mass"] / halves.clamp(min=1).view(2, 1, 1, 1, 1)).clamp(0, 1)),
        "open_fraction": (sums["open_fraction"] / every).clamp(0, 1).half(),
        "recall": _share(sums["hits"], sums["oracle_pairs"][None, ..., None].expand_as(pairs)).half(),
        "precision": _share(sums["hits"], pairs).half(),
        "bias": bias.float(),
        "spread": variance.clamp(min=0).sqrt().float(),
        "known_fraction": (known / sums["asked"][:, None].clamp(min=1)).float(),
        "oracle_open_fraction": (sums["oracle_open_fraction"] / every).float(),
    }


def key_tensors(sums: dict[str, Tensor], rotations: dict[int, Rotation]) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of the key moments, and the error of storing a covariance."""
    divisor = sums["key_count"].clamp(min=1)[:, None, None]
    mean = sums["key_total"] / divisor
    covariance = sums["key_outer"] / divisor[..., None] - mean[..., :, None] * mean[..., None, :]
    deviation, factor, error = pack_covariance((covariance + covariance.mT) / 2)
    frequencies = torch.stack([rotation.frequencies for rotation in rotations.values()])
    found = {"key_mean": mean.float(), "key_deviation": deviation, "key_factor": factor}
    # Two digits: the last ones depend on the order of the sums.
    return found | {"key_frequencies": frequencies.float()}, min(float(f"{error:.1e}"), 1.0)


def price_tensors(sums: dict[str, Tensor], documents: int, gated: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of the price curves, means over documents; nothing was tried on held-out documents yet.

    Args:
        sums: Those of all processes.
        documents: Number of documents that prices are from.
        gated: [layers, query_heads] int64; rungs of the gated model that values are of; None where there are none yet.
    """
    price, slope = sums["price"] / documents, sums["slope"] / documents
    value = price if gated is None else values_of(price, slope, gated)
    nothing = torch.zeros(0, len(TRIED))
    return {
        "price": _falling(price.float()),
        "value": _falling(value.float()),
        "priced_open_fraction": (sums["priced_open_fraction"] / documents).clamp(0, 1).half(),
        "tried": torch.tensor(TRIED),
        "kl": nothing,
        "kl_open_fraction": nothing.half(),
    }


def _falling(curve: Tensor) -> Tensor:
    """Return the lowest curve above one that falls to zero along the rungs: what is worth less than nothing is free."""
    return curve.clamp(min=0).flip(-1).cummax(-1).values.flip(-1)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Divide counts; a share of nothing is 1."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1).clamp(0, 1)


def _half_upwards(values: Tensor) -> Tensor:
    """Round values in [0, 1] to half precision, never down, so that no promise is broken by rounding."""
    rounded = values.half()
    # Positive half floats are ordered like their bits.
    upwards = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.double() < values, upwards, rounded)
