"""What a calibration can learn about each head: a threshold, or a probe that reads the need from the query itself."""

from __future__ import annotations

import torch
from studies.estimates.candidates import Call, Candidate
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_STEPS = 60
_DECAY = 1e-4
_GRID = 200


def fit_probe(calls: list[Call], *, quadratic: bool) -> Candidate:
    """Fit a logistic regression for each head of a layer, from the query to the exact share of the bulk keys.

    Args:
        calls: Calls whose exact log mass is known; every second pair is fitted.
        quadratic: Whether products of the query's components are among the features.
    """
    x = torch.cat([features(call, quadratic=quadratic)[:, ::2] for call in calls], 1)
    share = torch.cat([call.share[:, ::2] for call in calls], 1)
    centre, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-3)
    x = (x - centre) / scale
    weight = torch.zeros(x.shape[0], x.shape[2], 1, requires_grad=True)
    bias = torch.zeros(x.shape[0], 1, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        logits = (x @ weight)[..., 0] + bias
        loss = binary_cross_entropy_with_logits(logits, share, reduction="none").mean(1).sum()
        loss = loss + _DECAY * weight.square().sum()
        loss.backward()
        return loss

    search.step(closure)

    @torch.no_grad()
    def mass(call: Call) -> Tensor:
        logits = ((features(call, quadratic=quadratic) - centre) / scale @ weight)[..., 0] + bias
        return call.local + logits.view_as(call.local)

    return mass


def features(call: Call, *, quadratic: bool) -> Tensor:
    """Local log mass, log of the number of bulk keys and the query, [heads, asked, features]."""
    query = call.query.flatten(0, 1)
    known = torch.stack([call.local.flatten(0, 1), call.log_n.expand(query.shape[:2])], -1)
    if not quadratic:
        return torch.cat([known, query], -1)
    row, column = torch.triu_indices(query.shape[-1], query.shape[-1])
    return torch.cat([known, query, query[..., row] * query[..., column]], -1)


def common_threshold(margins: Tensor, fraction: float) -> Tensor:
    """Find the margin below which a share of all pairs lies; [heads, pairs] -> [heads], all equal.

    A candidate that opens more than that whatever the threshold gets NaN.
    """
    ordered = torch.where(margins.isnan(), -torch.inf, margins).flatten().sort().values
    found = ordered[int(fraction * len(ordered))]
    return torch.where(found == -torch.inf, torch.nan, found).expand(len(margins))


def thresholds_by_head(margins: Tensor, share: Tensor, fraction: float) -> Tensor:
    """Choose a threshold for each head so that all miss least while a share of the pairs is open.

    Args:
        margins: [heads, pairs] nats; -inf and NaN can't be told apart from one another.
        share: [heads, pairs] exact share of the bulk keys.
        fraction: Open fraction over all heads.

    Returns:
        [heads]; -inf closes a head for good, +inf opens it.
    """
    pairs = margins.shape[1]
    ordered, order = torch.where(margins.isnan(), -torch.inf, margins).sort(1)
    found = share.gather(1, order).double().cumsum(1)
    opened = torch.linspace(0, pairs, _GRID).long()
    missed = (found[:, -1:] - torch.cat([torch.zeros(len(found), 1), found], 1)[:, opened]) / pairs
    alike = (ordered == -torch.inf).sum(1, keepdim=True)
    missed = missed.masked_fill((opened > 0) & (opened < alike), torch.inf)
    low, high = 0.0, 1.0
    for _ in range(40):
        price = (low + high) / 2
        chosen = (missed + price * opened / pairs).argmin(1)
        low, high = (price, high) if opened[chosen].double().mean() > fraction * pairs else (low, price)
    chosen = opened[(missed + high * opened / pairs).argmin(1)]
    inf = torch.full_like(ordered[:, :1], torch.inf)
    edges = torch.cat([-inf, ordered[:, 1:], inf], 1)  # a margin below edge j is one of the first j
    return edges.gather(1, chosen[:, None])[:, 0]
