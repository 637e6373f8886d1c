"""How close a patched model's predictions stay to those of the dense one, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Agreement:
    """How much of what dense attention predicts is predicted under a policy too. They can be added.

    Args:
        tokens: Tokens that were predicted by both, with the same tokens before them.
        agreed: Those of them for which both hold the same token the most likely.
        kl_sum: Sum of KL(dense || policy) over the tokens, nats.
    """

    tokens: int = 0
    agreed: int = 0
    kl_sum: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        """Put two sets of tokens together."""
        return Agreement(self.tokens + other.tokens, self.agreed + other.agreed, self.kl_sum + other.kl_sum)

    @property
    def top1(self) -> float:
        """Share of the tokens in which both agree; NaN without any."""
        return self.agreed / self.tokens if self.tokens else math.nan

    @property
    def kl(self) -> float:
        """Mean KL to dense, nats per token; NaN without any token."""
        return self.kl_sum / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class Predictions:
    """What a model predicts after some tokens.

    Log-probabilities are kept in half precision, [tokens, vocabulary] float16, for they are many. They are scaled to
    sum to one again before they are compared, so that this adds less than 1e-6 nats to a KL.
    """

    log_probs: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Predictions:
        """Keep logits, [tokens, vocabulary] of any dtype."""
        rows = logits.split(_ROWS_AT_A_TIME)
        return cls(torch.cat([part.float().log_softmax(-1).half() for part in rows]))

    def agreement(self, logits: Tensor) -> Agreement:
        """Compare with the logits of a policy after the same tokens, [tokens, vocabulary] of any dtype.

        Logits that are not finite give a KL that is not finite.
        """
        agreed, kl = 0, 0.0
        for kept, part in zip(self.log_probs.split(_ROWS_AT_A_TIME), logits.split(_ROWS_AT_A_TIME), strict=True):
            dense, other = kept.float().log_softmax(-1), part.float().log_softmax(-1)
            agreed += int((dense.argmax(-1) == other.argmax(-1)).sum())
            # Half precision holds -inf for what is as good as impossible: nothing times anything is nothing.
            terms = torch.where(dense == -math.inf, 0.0, dense.exp() * (dense - other))
            kl += terms.sum(dtype=torch.float64).item()
        return Agreement(len(logits), agreed, kl)
