"""What a calibration found: curves, thresholds and what they give, as tables, cards and pictures show it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from patchattn.calibration.manifest import Manifest
from patchattn.calibration.prices import Prices
from patchattn.calibration.prices import documents_needed as documents_needed_for_kl
from patchattn.calibration.risk import Curves, documents_needed, rung_margins, rungs
from patchattn.errors import CalibrationError
from patchattn.gates.thresholds import KLTarget, OpenFractionTarget, RiskTarget, Target
from patchattn.moments.gaussian import Estimate

ALPHAS = (0.005, 0.01, 0.02, 0.05, 0.1)
"""Risks that cards and tables show."""

KL_TARGETS = (0.002, 0.005, 0.01, 0.02, 0.05)
"""KL targets that cards and tables show, nats per token."""

CURVE_ALPHAS: list[float] = torch.logspace(-3.5, -0.5, 31).tolist()
"""Risks along a curve."""

Scope = Literal["head", "model"]
SCOPES: tuple[Scope, ...] = ("head", "model")

_LEAST_SHOWN = 0.02


@dataclass(frozen=True)
class Expected:
    """What thresholds give on the calibration's documents, on dense activations.

    Args:
        open_fraction: [layers, query_heads].
        missed_mass: [layers, query_heads].
        recall: [layers, query_heads]; of the pairs that the exact share opens, those that open.
        precision: [layers, query_heads]; of the pairs that open, those that the exact share opens.
    """

    open_fraction: Tensor
    missed_mass: Tensor
    recall: Tensor
    precision: Tensor


@dataclass(frozen=True)
class RiskRow:
    """What one risk target gives on the documents that were measured.

    Args:
        alpha: The risk asked for.
        scope: `"head"` or `"model"`, see `RiskTarget`.
        documents_needed: Documents that the promise needs.
        open_fraction: Mean over heads; None where there are too few documents.
        missed_mass: Mean over heads; None where there are too few documents.
        never_open: Heads that are closed for every query.
        always_open: Heads that are open for every query.
    """

    alpha: float
    scope: str
    documents_needed: int
    open_fraction: float | None = None
    missed_mass: float | None = None
    never_open: int | None = None
    always_open: int | None = None


@dataclass(frozen=True)
class KLRow:
    """What one KL target gives.

    Args:
        nats: The KL asked for, nats per token.
        open_fraction: Open pairs, mean over heads, where that KL is expected.
        predicted: What closing costs, added up, nats per token; see `Prices.predicted`.
        expected: The KL that is expected, nats per token.
        promised_open_fraction: Open pairs where it is promised; None where nothing that was tried can promise it.
        documents_needed: Held-out documents that the promise needs.
        lacks_documents: Whether fewer were held out.
        never_open: Heads that are closed for every query, where the KL is expected.
        always_open: Heads that are open for every query.
    """

    nats: float
    open_fraction: float
    predicted: float
    expected: float
    promised_open_fraction: float | None
    documents_needed: int
    lacks_documents: bool
    never_open: int
    always_open: int

    def promise(self) -> str:
        """Say what a promise of it costs, in a few words."""
        if self.promised_open_fraction is not None:
            return f"{self.promised_open_fraction:.1%}"
        return f"needs {self.documents_needed} held out" if self.lacks_documents else "none tried"


@dataclass(frozen=True)
class Findings:
    """What a calibration's tensors say, with one of the estimates.

    Args:
        manifest: Which model, which text, measured how.
        tensors: The measured tensors.
        estimate: The estimate.
        own_target: The target of the calibration's policy; None where it has none.

    Raises:
        CalibrationError: The estimate was not measured.
    """

    manifest: Manifest
    tensors: dict[str, Tensor] = field(repr=False)
    estimate: Estimate
    own_target: Target | None

    def __post_init__(self) -> None:
        """Refuse an estimate that was not measured."""
        measured = self.manifest.estimates
        if self.estimate not in measured:
            raise CalibrationError(
                f"The estimate {self.estimate!r} was not measured; the calibration has {', '.join(measured)}.",
                fix="use an estimate that was measured",
            )

    @property
    def index(self) -> int:
        """Where the estimate is in the tensors."""
        return self.manifest.estimates.index(self.estimate)

    @cached_property
    def curves(self) -> Curves:
        """The curves."""
        return Curves(
            rung_margins(self.tensors["margins"]),
            self.tensors["missed_mass"][:, self.index].float(),
            self.tensors["open_fraction"][self.index].float(),
            self.manifest.documents,
        )

    @cached_property
    def prices(self) -> Prices | None:
        """What closing costs in KL; None where that was not measured with this estimate."""
        source = self.manifest.prices
        if source is None or source.estimate != self.estimate:
            return None
        return Prices.of(self.tensors, source.gated)

    def priced(self) -> Prices:
        """Return the prices.

        Raises:
            CalibrationError: They were not measured, or with another estimate.
        """
        source = self.manifest.prices
        if source is None:
            raise CalibrationError(
                "The calibration was measured without prices.",
                fix="measure it again with patchattn.calibrate(..., prices=True), on the command line --prices",
            )
        if self.prices is None:
            raise CalibrationError(
                f"Prices were measured with the estimate {source.estimate!r}, not {self.estimate!r}.",
                fix=f"use MomentGate(estimate={source.estimate!r})",
            )
        return self.prices

    def prices_for(self, target: Target) -> Prices | None:
        """Return the prices that a target takes its thresholds from; None where it takes them from missed mass.

        Raises:
            CalibrationError: The target needs prices, and there are none with this estimate.
        """
        if isinstance(target, KLTarget):
            return self.priced()
        return None if isinstance(target, RiskTarget) else self.prices

    def thresholds(self, target: Target) -> Tensor:
        """Choose the margin from which each head closes, [layers, query_heads] nats; see `Calibration.thresholds`."""
        prices = self.prices_for(target)
        if prices is None or isinstance(target, RiskTarget):
            return self.by_mass(target)
        return prices.margins[prices.rungs(target)] * self.tensors["probe_scale"]

    def offsets(self, target: Target) -> tuple[Tensor, Tensor | None]:
        """Return what the gate adds to the bulk log mass of each head: [layers, query_heads] nats, and the probe.

        Returns:
            The margins, and [layers, query_heads, hidden] of the probe that goes with them; None without prices.
        """
        margins = self.thresholds(target)
        if self.prices_for(target) is None:
            return margins, None
        return margins + self.tensors["probe_offset"], self.tensors["probe"].float()

    def expected_kl(self, target: Target, layers: list[int] | None = None) -> float | None:
        """Say which KL to dense a target's thresholds are expected to give; None where they are not from prices.

        Args:
            target: The target.
            layers: Where the layers with gates are in the tensors, others being dense; None means all.
        """
        prices = self.prices_for(target)
        if prices is None or isinstance(target, RiskTarget):
            return None
        return prices.expected(prices.rungs(target), layers)

    def by_mass(self, target: Target) -> Tensor:
        """Choose margins by the missed mass, whether or not there are prices; not for a `KLTarget`."""
        assert not isinstance(target, KLTarget)
        return self.curves.margins[rungs(self.curves, target)]

    def kl_table(self) -> list[KLRow]:
        """Return a row for each of `KL_TARGETS`; none without prices."""
        return [] if self.prices is None else [_kl_row(self.prices, nats) for nats in KL_TARGETS]

    def expected(self, margins: Tensor) -> Expected:
        """Say what thresholds gave on the documents that were measured.

        Args:
            margins: [layers, query_heads] nats, of thresholds by mass: those by price are on another scale. A value
                between two margins of the grid is taken as the lower one.
        """
        rung = torch.searchsorted(self.curves.margins, margins.contiguous(), right=True) - 1
        chosen = rung.clamp(min=0)[..., None]

        def at(curve: Tensor) -> Tensor:
            return curve.float().gather(-1, chosen)[..., 0]

        return Expected(
            at(self.curves.open_fraction),
            at(self.curves.missed_mass_of_all),
            at(self.tensors["recall"][self.index]),
            at(self.tensors["precision"][self.index]),
        )

    def everywhere(self, margin: float | Tensor) -> Tensor:
        """Return the same margin for all heads, [layers, query_heads] nats."""
        return torch.as_tensor(margin).expand_as(self.tensors["oracle_open_fraction"])

    def means(self, margins: Tensor, layers: list[int] | None = None) -> tuple[float, float]:
        """Return open fraction and missed mass for margins per head, means over the heads of some layers or of all.

        Args:
            margins: [layers, query_heads] nats.
            layers: Where the layers are in the tensors; None means all.
        """
        found, rows = self.expected(margins), slice(None) if layers is None else layers
        return float(found.open_fraction[rows].mean()), float(found.missed_mass[rows].mean())

    def risk_curve(
        self, alphas: Iterable[float], *, scope: Scope = "head", layers: list[int] | None = None
    ) -> list[tuple[float, float, float]]:
        """Return (alpha, open fraction, missed mass) for the risks that so many documents can carry; see `means`."""
        found = [(alpha, self._carried(RiskTarget(alpha=alpha, scope=scope))) for alpha in alphas]
        return [(alpha, *self.means(margins, layers)) for alpha, margins in found if margins is not None]

    def margin_curve(self, *, layers: list[int] | None = None) -> list[tuple[float, float, float]]:
        """Return (margin, open fraction, missed mass) for each margin of the grid, the same for all heads."""
        return [(float(m), *self.means(self.everywhere(m), layers)) for m in self.tensors["margins"]]

    def points_of(self, layers: list[int] | None) -> dict[str, Any]:
        """Return what risks cost, for the page of a report, JSON-ready.

        `"model"`, the number of `"documents"`, and points as means over the layers: `"targets"` [alpha, open fraction,
        missed mass] and `"one"` [margin, open fraction, missed mass], one margin for all.
        """
        return {
            "model": self.manifest.model,
            "documents": self.manifest.n_documents,
            "targets": self.risk_curve([round(alpha, 5) for alpha in CURVE_ALPHAS], layers=layers),
            "one": self.margin_curve(layers=layers),
        }

    def shown_target(self) -> Target | None:
        """Choose the target that tables of missed mass show: the calibration's own, or the least usual risk.

        Returns:
            None where there are too few documents for any.
        """
        usual = [RiskTarget(alpha=alpha) for alpha in ALPHAS if alpha >= _LEAST_SHOWN]
        own = self.own_target
        if own is not None and not isinstance(own, KLTarget) and self.prices_for(own) is None:
            usual = [own, *usual]
        return next((target for target in usual if self._carried(target) is not None), None)

    def risk_table(self) -> list[RiskRow]:
        """Return a row for each alpha of `ALPHAS` and each scope."""
        return [self._risk_row(RiskTarget(alpha=alpha, scope=scope)) for scope in SCOPES for alpha in ALPHAS]

    def _risk_row(self, target: RiskTarget) -> RiskRow:
        head, margins = (target.alpha, target.scope, documents_needed(target)), self._carried(target)
        if margins is None:
            return RiskRow(*head)
        closed, opened = (int((margins == end).sum()) for end in (-torch.inf, torch.inf))
        return RiskRow(*head, *self.means(margins), closed, opened)

    def _carried(self, target: Target) -> Tensor | None:
        """Return the thresholds of a target, None where there are too few documents for it."""
        try:
            return self.thresholds(target)
        except CalibrationError:
            return None


def _kl_row(prices: Prices, nats: float) -> KLRow:
    chosen = prices.rungs(KLTarget(nats=nats))
    needed, last = documents_needed_for_kl(nats), prices.price.shape[-1] - 1
    promised, lacks = None, needed > len(prices.kl)
    with contextlib.suppress(CalibrationError):
        promised = prices.opened(prices.rungs(KLTarget(nats=nats, promised=True)))
    closed, opened = (int((chosen == end).sum()) for end in (0, last))
    known = prices.opened(chosen), prices.predicted(chosen), prices.expected(chosen)
    return KLRow(nats, *known, promised, needed, lacks, closed, opened)


def name_of(target: Target) -> str:
    """Name a target in a few words, for headings."""
    if isinstance(target, KLTarget):
        return f"KL {target.nats:g}" + (", promised" if target.promised else "")
    if isinstance(target, OpenFractionTarget):
        return f"budget {target.fraction:.0%}"
    return f"alpha {target.alpha:g}" + ("" if target.scope == "head" else ", mean over heads")
