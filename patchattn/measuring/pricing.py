"""Prices of a calibration: documents to fit the probe to, others to price, and others on which the KL is measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchattn.calibration.calibration import Calibration
from patchattn.calibration.manifest import Manifest
from patchattn.calibration.prices import Prices
from patchattn.calibration.risk import rung_margins
from patchattn.errors import CalibrationError
from patchattn.gates import MomentGate
from patchattn.gates.thresholds import KLTarget, OpenFractionTarget
from patchattn.hf.architecture import makes_logits, without_head
from patchattn.hf.logits import head_of
from patchattn.hf.patching import patch
from patchattn.hf.weights import input_device
from patchattn.measuring.prices import Pricing
from patchattn.measuring.probe import Probe
from patchattn.measuring.statistics import MARGINS, Totals
from patchattn.measuring.steps import Steps
from patchattn.measuring.tensors import price_tensors
from patchattn.measuring.values import Valuing
from patchattn.policy import Policy

_MOST_FITTED, _MOST_PRICED = 12, 8
_LEAST = 3

GATED = 0.2
"""Open fraction of the gated model in which pairs are valued."""

_EVERY = 4
"""The KL of a held-out document is the mean over one token in so many."""

_TOKENS_AT_A_TIME = 256


def check_prices(model: Any, gate: MomentGate, held_out: int, *, prices: bool) -> None:
    """Refuse prices that can't be measured, and a policy that needs prices where none are.

    Args:
        model: The model.
        gate: Gate of the policy.
        held_out: At most so many documents are held out.
        prices: Whether prices are measured.

    Raises:
        CalibrationError: Says which.
    """
    if not prices and isinstance(gate.threshold, KLTarget):
        raise CalibrationError(
            f"The policy's gate has {gate.threshold!r}, which needs prices.", fix="measure with prices=True"
        )
    if prices and held_out < 1:
        raise CalibrationError(f"Expected held_out of at least 1 document, got {held_out}.", fix="for instance 16")
    if prices and gate.moments == "calibration":
        raise CalibrationError(
            'Prices go with moments="prompt"; the policy\'s gate has moments="calibration".', fix="leave prices out"
        )
    if prices and not makes_logits(model):
        raise CalibrationError(
            f"Prices say what closing does to the prediction of tokens, which {type(model).__name__} does not make.",
            fix="load the model with AutoModelForCausalLM, or measure without prices",
        )


@dataclass(frozen=True)
class Split:
    """Which documents do what; none does two things.

    Args:
        fitted: Documents that the probe is fitted to.
        priced: Documents that prices are from.
        held_out: Documents on which the patched model's KL is measured.
    """

    fitted: list[int]
    priced: list[int]
    held_out: list[int]

    @classmethod
    def of(cls, documents: list[int], held_out: int) -> Split:
        """Share documents out: a third each for probe and prices, up to as many as it takes, and the rest.

        Args:
            documents: The documents.
            held_out: On at most so many of the rest the KL is measured.

        Raises:
            CalibrationError: There are too few.
        """
        if len(documents) < _LEAST:
            raise CalibrationError(
                f"Prices need {_LEAST} documents or more, for the probe, the prices and the measured KL; there are "
                f"{len(documents)}.",
                fix="give more texts, or measure without prices",
            )
        third = len(documents) // 3
        fitted, priced = min(third, _MOST_FITTED), min(third, _MOST_PRICED)
        return cls(documents[:fitted], documents[fitted : fitted + priced], documents[fitted + priced :][:held_out])

    @property
    def count(self) -> int:
        """How many readings of documents that are."""
        return len(self.fitted) + 2 * len(self.priced) + len(self.held_out)


def price_documents(
    model: Any, policy: Policy, layers: tuple[int, ...], probe: Probe, split: Split, steps: Steps, cut: list[Tensor]
) -> dict[str, Tensor]:
    """Fit the probe, price with it, and value what it prices in a gated model.

    Args:
        model: The model.
        policy: Sink and window.
        layers: Indices of the layers.
        probe: Where sums go.
        split: Which documents do what.
        steps: Goes through them.
        cut: The documents, [tokens] ids.

    Returns:
        The tensors of the probe and of the curves.
    """
    local = (policy.sink_size, policy.window_size)
    fitting = Pricing(model, layers, local, probe.fit_to)
    steps.each(split.fitted, lambda index: fitting.price(cut[index], index))
    tensors = probe.tensors(steps.added_up())
    pricing = Pricing(model, layers, local, partial(probe.price_with, tensors))
    # A run that goes on from a checkpoint has none of what was priced before.
    dense: dict[int, Tensor] = {}
    steps.each(split.priced, lambda index: dense.update({index: pricing.price(cut[index], index).cpu()}))
    sums, n_priced = steps.added_up(), len(split.priced)
    gated = Prices.of(price_tensors(sums, n_priced) | {"margins": MARGINS}, GATED).at(GATED)
    valuing = Valuing(model, layers, local, probe, tensors, rung_margins(MARGINS)[gated])
    steps.each(split.priced, lambda index: valuing.value(cut[index], dense.pop(index, None)))
    return tensors | price_tensors(steps.added_up(), n_priced, gated)


def with_measured_kl(
    model: Any,
    manifest: Manifest,
    policy: Policy,
    tensors: dict[str, Tensor],
    totals: Totals,
    split: Split,
    steps: Steps,
    cut: list[Tensor],
) -> Calibration:
    """Measure the KL of the patched model on held-out documents, and make the calibration.

    Args:
        model: The model.
        manifest: What it will say, with nothing held out yet.
        policy: The policy that it brings along.
        tensors: Its tensors, with nothing held out yet.
        totals: Where sums go.
        split: Which documents do what.
        steps: Goes through them.
        cut: The documents, [tokens] ids.
    """
    assert manifest.prices is not None
    gate = MomentGate(estimate=manifest.prices.estimate)
    neutral = Policy(sink_size=policy.sink_size, window_size=policy.window_size, gate=gate)
    calibration = Calibration(manifest, neutral, tensors)

    def measure(at: int) -> None:
        kl, opened = measured_kl(model, calibration, cut[split.held_out[at]])
        totals.sums["kl"][at], totals.sums["kl_open"][at] = kl, opened

    steps.each(range(len(split.held_out)), measure)
    sums = steps.added_up()
    held_out = {
        "kl": sums["kl"].float(),
        "kl_open_fraction": sums["kl_open"].clamp(0, 1).half(),
    }
    source = manifest.prices.model_copy(update={"held_out": len(split.held_out)})
    return Calibration(manifest.model_copy(update={"prices": source}), policy, tensors | held_out)


def policies_tried(calibration: Calibration) -> list[Policy]:
    """Return the policies whose KL is measured, one for each of `TRIED`; every query with bulk keys is asked."""
    source, policy = calibration.manifest.prices, calibration.policy
    assert source is not None
    targets = [OpenFractionTarget(fraction=fraction) for fraction in calibration.tensors["tried"].tolist()]
    gates = [MomentGate(threshold=target, estimate=source.estimate) for target in targets]
    layers, sink, window = calibration.manifest.layers, policy.sink_size, policy.window_size
    return [Policy(sink_size=sink, window_size=window, gate=gate, layers=layers, min_bulk=0) for gate in gates]


@torch.no_grad()
def measured_kl(model: Any, calibration: Calibration, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Measure KL(dense || patched) on a document.

    Args:
        model: The model, not patched.
        calibration: Prices, with nothing held out yet.
        ids: [tokens] ids.

    Returns:
        [settings] nats per token, and [settings] open fractions; float64.
    """
    ids = ids[None].to(input_device(model))
    output = without_head(model)(input_ids=ids, use_cache=False)
    shown = slice(_EVERY - 1, None, _EVERY)
    hidden, opened = [output.last_hidden_state[:, shown]], []
    for policy in policies_tried(calibration):
        with patch(model, policy, calibration=calibration) as handle:
            hidden.append(without_head(model)(input_ids=ids, use_cache=False).last_hidden_state[:, shown])
            opened.append(handle.report().open_fraction())
    found = torch.zeros(len(hidden) - 1, dtype=torch.float64)
    ids = ids[:, shown]
    with head_of(model, output) as logits_of:
        for begin in range(0, ids.shape[1], _TOKENS_AT_A_TIME):
            rows = slice(begin, begin + _TOKENS_AT_A_TIME)
            # One after another: with a large vocabulary each takes hundreds of megabytes.
            predictions = (logits_of(ids[:, rows], x[:, rows])[0].double().log_softmax(-1) for x in hidden)
            dense = next(predictions)
            for at, other in enumerate(predictions):
                # What is as good as impossible adds nothing.
                terms = torch.where(dense == -torch.inf, 0.0, dense.exp() * (dense - other))
                found[at] += terms.sum().cpu()
    return found / ids.shape[1], torch.tensor(opened, dtype=torch.float64)
