"""Pictures of a calibration: what risk and KL cost, which heads need the far keys, how good the estimate is."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from torch import Tensor

from patchattn.calibration.findings import CURVE_ALPHAS, SCOPES, Findings, name_of
from patchattn.calibration.price_table import PriceTable, price_table, with_prices
from patchattn.calibration.prices import Prices
from patchattn.gates.thresholds import OpenFractionTarget

_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_LEAST_KL = 1e-4
_MARKERS = {"guarded": "o", "saturating": "s", "lognormal": "^"}


def draw(findings: Findings) -> dict[str, bytes]:
    """Draw all pictures; PNG bytes by file name. Prices are drawn where there are some."""
    drawn = {
        "risk.png": _png(risk_figure(findings)),
        "heads.png": _png(heads_figure(findings)),
        "estimate.png": _png(estimate_figure(findings)),
    }
    if (table := price_table(findings)) is not None:
        drawn["prices.png"] = _png(prices_figure(findings, table))
    return drawn


def risk_figure(findings: Findings) -> Figure:
    """Draw missed mass against open fraction for risks, budgets and one threshold for all heads."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    price, promise = figure.subplots(1, 2)
    curves = {scope: findings.risk_curve(CURVE_ALPHAS, scope=scope) for scope in SCOPES}
    budget = [findings.by_mass(OpenFractionTarget(fraction=f / 50)) for f in range(1, 50)]
    ways = {"one threshold for all heads": [point[1:] for point in findings.margin_curve()]}
    ways["open-fraction target"] = [findings.means(margins) for margins in budget]
    for scope, points in curves.items():
        if points:
            ways[f'risk target, scope "{scope}"'] = [point[1:] for point in points]
            promise.plot([p[0] for p in points], [100 * p[1] for p in points], ".-", label=f'scope "{scope}"')
    for name, points in ways.items():
        price.plot([100 * x for x, _ in points], [100 * max(y, 1e-5) for _, y in points], ".-", label=name)
    price.set_yscale("log")
    price.set_ylim(bottom=1e-2)
    price.yaxis.set_major_formatter("{x:g}")
    price.set_xlabel("open pairs, % (mean over heads)")
    price.set_ylabel("missed mass, % (mean over heads)")
    price.set_title("what closing costs, by way of choosing thresholds", fontsize=10)
    promise.set_xscale("log")
    promised = [alpha for points in curves.values() for alpha, *_ in points]
    least, most = (min(promised), max(promised)) if promised else (0.01, 0.3)
    shown = [alpha for alpha in _TICKS if 0.8 * least <= alpha <= 1.2 * most]
    promise.set_xticks(shown, [f"{alpha:g}" for alpha in shown])
    promise.minorticks_off()
    promise.set_ylim(-3, 103)
    promise.set_xlabel("alpha of the risk target")
    promise.set_ylabel("open pairs, % (mean over heads)")
    promise.set_title(f"what a promise costs with {findings.manifest.n_documents} documents", fontsize=10)
    for axes in (price, promise):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def heads_figure(findings: Findings) -> Figure:
    """Draw the open fraction of each head: by the exact share, and under the calibration's own target."""
    target = findings.shown_target()
    opened = None if target is None else findings.expected(findings.by_mass(target)).open_fraction
    share = findings.manifest.oracle_threshold
    exact = findings.tensors["oracle_open_fraction"]
    layers, heads = exact.shape
    size = (min(2 * (0.45 * heads + 1.6), 22), min(0.4 * layers + 1.8, 14))
    figure = Figure(figsize=(max(size[0], 8), max(size[1], 3)), layout="constrained")
    both = figure.subplots(1, 1 if opened is None else 2, squeeze=False)[0]
    image = _grid(both[0], findings, exact, f"exact local share below {share:g}")
    if target is not None and opened is not None:
        _grid(both[1], findings, opened, f"thresholds for {name_of(target)}")
    figure.colorbar(image, ax=list(both), label="open fraction")
    return figure


def prices_figure(findings: Findings, table: PriceTable) -> Figure:
    """Draw what closing each head costs, and what a KL costs: as predicted, as expected, and as measured."""
    prices = with_prices(findings).priced()
    layers, heads = prices.price.shape[:2]
    widths = min(0.35 * heads + 3, 10), 6
    figure = Figure(figsize=(sum(widths), min(max(0.25 * layers + 1.4, 4.6), 8)), layout="constrained")
    grid, curve = figure.subplots(1, 2, width_ratios=widths)
    _price_grid(figure, grid, findings, prices.value[..., 0], table)
    points = _price_curve(prices)
    for name, style, at in (("predicted: costs added up", "--", 1), ("expected", "-", 2)):
        curve.plot([100 * point[0] for point in points], [point[at] for point in points], style, label=name)
    if table.tried:
        opened, measured = [100 * row.open_fraction for row in table.tried], [row.measured for row in table.tried]
        curve.plot(opened, measured, "o", color="black", label=f"measured, {len(prices.kl)} held-out documents")
    curve.set_yscale("log")
    curve.set_xlim(-3, 103)
    curve.set_ylim(bottom=min([_LEAST_KL, *(row.measured / 2 for row in table.tried if row.measured > 0)]))
    curve.yaxis.set_major_formatter("{x:g}")
    curve.set_xlabel("open pairs, % (mean over heads)")
    curve.set_ylabel("KL to dense attention, nats per token")
    curve.set_title("what closing costs, heads weighed by their price", fontsize=10)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    return figure


def _price_grid(figure: Figure, axes: Axes, findings: Findings, cost: Tensor, table: PriceTable) -> None:
    """Draw a colour for each head, on a scale of three decades at most, and the rank of the dearest ones."""
    most = max(float(cost.max()), _LEAST_KL)
    least = min(max(float(cost.min()), 1e-3 * most), 0.1 * most)
    norm = LogNorm(least, most, clip=True)
    # Older versions of matplotlib scale what is drawn before they clip it.
    image = axes.imshow(
        cost.clamp(least, most).numpy(), norm=norm, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    measured = list(findings.manifest.layers)
    for rank, head in enumerate(table.dearest, 1):
        colour = "black" if norm(head.nats) > 0.6 else "white"
        place = head.query_head, measured.index(head.layer)
        axes.text(*place, str(rank), ha="center", va="center", color=colour, fontsize=8)
    across, down = (-(-size // 16) for size in reversed(cost.shape))
    axes.set_xticks(range(0, cost.shape[1], across))
    axes.set_yticks(range(0, cost.shape[0], down), [str(layer) for layer in measured[::down]])
    axes.set_xlabel(f"query head (1 to {len(table.dearest)}: those whose closing costs most)")
    axes.set_ylabel("layer")
    axes.set_title(table.concentration(), fontsize=10)
    extend = "min" if float(cost.min()) < float(norm.vmin or 0) else "neither"
    label = "cost of closing the head, nats of KL per token"
    figure.colorbar(image, ax=axes, label=label, format="{x:g}", extend=extend)


def _price_curve(prices: Prices) -> list[tuple[float, float, float]]:
    """Return (open fraction, predicted KL, expected KL) of thresholds for one budget after another."""
    chosen = [prices.at(step / 50) for step in range(50)]
    found = {prices.opened(rungs): (prices.predicted(rungs), prices.expected(rungs)) for rungs in chosen}
    return [(opened, *kl) for opened, kl in sorted(found.items()) if kl[0] > 0]


def estimate_figure(findings: Findings) -> Figure:
    """Draw the error of the estimate, a point per head, for each estimate that was measured."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    error, doubt = figure.subplots(1, 2)
    for index, estimate in enumerate(findings.manifest.estimates):
        bias, spread = (findings.tensors[name][index].flatten() for name in ("bias", "spread"))
        known = 100 * findings.tensors["known_fraction"][index].flatten().sort(descending=True).values
        marker = _MARKERS[estimate]
        # Hollow markers, and lines of falling width: estimates that agree lie on top of each other.
        error.scatter(bias, spread, s=28, marker=marker, facecolors="none", edgecolors=f"C{index}", label=estimate)
        doubt.plot(range(1, len(known) + 1), known, color=f"C{index}", linewidth=(3.5, 2, 0.8)[index], label=estimate)
    error.axvline(0, color="grey", linewidth=0.8)
    error.set_xscale("symlog", linthresh=1)
    error.margins(x=0.1)
    error.xaxis.set_major_locator(FixedLocator([-30, -10, -3, -1, 0, 1, 3, 10, 30]))
    error.xaxis.set_major_formatter("{x:g}")
    error.set_xlabel("bias of the estimated log mass, nats")
    error.set_ylabel("spread, nats")
    error.set_title("error of the estimate where it is finite, a point per head", fontsize=10)
    doubt.set_xlabel("heads, sorted")
    doubt.set_ylabel("pairs with a finite estimate, %")
    doubt.set_ylim(-3, 103)
    doubt.set_title("the others open without asking", fontsize=10)
    for axes, corner in ((error, "upper left"), (doubt, "lower left")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=corner)
    return figure


def _grid(axes: Axes, findings: Findings, values: Tensor, title: str):
    image = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    layers, heads = values.shape
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"{title}: {100 * float(values.mean()):.1f}% open", fontsize=10)
    if layers * heads <= 200:
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers), [str(layer) for layer in findings.manifest.layers])
        for row in range(layers):
            for column in range(heads):
                value = float(values[row, column])
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
