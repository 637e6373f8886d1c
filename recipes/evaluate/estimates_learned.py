"""What a calibration can learn about each head: a threshold, or a probe that reads the need from the query itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from estimates_candidates import Call
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_STEPS = 60
_DECAY = 1e-4
_GRID = 200


@dataclass(frozen=True)
class Probe:
    """A logistic regression for each head of a layer, from the query to the share of the bulk keys.

    Args:
        quadratic: Whether products of the query's components are among the features.
        centre: [heads, 1, features], what is subtracted from the features.
        scale: [heads, 1, features], what they are divided by then.
        weight: [heads, features].
        bias: [heads, 1].
    """

    quadratic: bool
    centre: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, calls: list[Call], *, quadratic: bool) -> Probe:
        """Fit the exact share of the bulk keys on every second pair of some calls."""
        x = torch.cat([features(call, quadratic=quadratic)[:, ::2] for call in calls], 1)
        shares = [
            torch.sigmoid(call.bulk - call.local).flatten(0, 1)[:, ::2] for call in calls if call.bulk is not None
        ]
        share = torch.cat(shares, 1)
        centre = x.mean(1, keepdim=True)
        scale = x.std(1, keepdim=True).clamp(min=1e-3)
        x = (x - centre) / scale
        weight = torch.zeros(x.shape[0], x.shape[2], requires_grad=True)
        bias = torch.zeros(x.shape[0], 1, requires_grad=True)
        search = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            logits = (x @ weight[..., None])[..., 0] + bias
            loss = binary_cross_entropy_with_logits(logits, share, reduction="none").mean(1).sum()
            loss = loss + _DECAY * weight.square().sum()
            loss.backward()
            return loss

        search.step(closure)
        return cls(quadratic, centre, scale, weight.detach(), bias.detach())

    def __call__(self, call: Call) -> Tensor:
        """Return what, compared with the local log mass, gives the predicted share, [kv_heads, group, asked] nats."""
        x = (features(call, quadratic=self.quadratic) - self.centre) / self.scale
        logits = (x @ self.weight[..., None])[..., 0] + self.bias
        return call.local + logits.view_as(call.local)


def features(call: Call, *, quadratic: bool) -> Tensor:
    """Local log mass, log of the number of bulk keys and the query, [heads, asked, features]."""
    query = call.query.flatten(0, 1)
    known = torch.stack([call.local.flatten(0, 1), call.n.float().log().expand(query.shape[:2])], -1)
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
