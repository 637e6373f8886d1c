"""What prices say in a few numbers, for tables, cards and pictures: what a KL costs, and which heads matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patchattn.calibration.findings import Findings, KLRow

_MOST_HEADS = 10


@dataclass(frozen=True)
class TriedRow:
    """Thresholds that were tried on held-out documents.

    Args:
        predicted: What closing costs, added up, nats of KL per token; see `Prices.predicted`.
        measured: KL(dense || patched), mean over the documents, nats per token.
        bound: The least KL that these thresholds can be promised for, see `KLTarget`, nats per token.
        open_fraction: Open pairs, mean over the documents.
    """

    predicted: float
    measured: float
    bound: float
    open_fraction: float


@dataclass(frozen=True)
class HeadPrice:
    """What closing a head for every query costs where the other heads are gated too.

    Args:
        layer: Index of the layer.
        query_head: Index of the query head.
        nats: What it costs, nats of KL per token.
        share: Its share of what closing all heads costs.
    """

    layer: int
    query_head: int
    nats: float
    share: float


@dataclass(frozen=True)
class PriceTable:
    """What prices say.

    Args:
        targets: What each of some KL targets gives.
        tried: What came of thresholds on held-out documents, the dearest last.
        dearest: The heads whose closing costs most, at most ten, the dearest first.
        heads: Number of heads in all.
    """

    targets: list[KLRow]
    tried: list[TriedRow]
    dearest: list[HeadPrice]
    heads: int

    def concentration(self) -> str:
        """Say how much of the price the dearest heads carry."""
        share = sum(head.share for head in self.dearest)
        return f"{len(self.dearest)} of {self.heads} heads carry {share:.0%} of the price of closing them all"


def with_prices(findings: Findings) -> Findings:
    """Return the findings with the estimate that has prices, whatever the calibration's own policy says."""
    source = findings.manifest.prices
    return findings if source is None else replace(findings, estimate=source.estimate)


def price_table(findings: Findings) -> PriceTable | None:
    """Gather what prices say; None where there are none."""
    if findings.manifest.prices is None:
        return None
    findings = with_prices(findings)
    prices = findings.priced()
    closed = prices.value[..., 0].double()
    whole, columns = float(closed.sum()), closed.shape[1]
    values, order = closed.flatten().sort(descending=True, stable=True)
    dearest = [
        HeadPrice(findings.manifest.layers[at // columns], at % columns, nats, nats / whole if whole else 0.0)
        for nats, at in zip(values[:_MOST_HEADS].tolist(), order[:_MOST_HEADS].tolist(), strict=True)
    ]
    measured, opened = prices.measured(), prices.kl_open_fraction.double().mean(0).tolist()
    # Nothing was measured where nothing was held out.
    tried = [TriedRow(*row, *rest) for row, *rest in zip(measured, prices.bounds().tolist(), opened, strict=False)]
    return PriceTable(findings.kl_table(), tried, dearest, closed.numel())
