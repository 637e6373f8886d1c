"""One pass of the kernel over some keys of each row, and two passes merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from patchattn.backends.flex.call import Settings
from patchattn.gates.decision import decide, with_groups


def one_pass(  # pragma: compiled
    settings: Settings, query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of a mask.

    Args:
        settings: Scale and softcap.
        query: [batch, kv_heads, rows, dim].
        key: [batch or 1, kv_heads, keys, dim].
        value: [batch or 1, kv_heads, keys, value_dim].
        block_mask: What each row sees.

    Returns:
        Output in float32 and log mass, [batch, kv_heads, rows]; of rows without keys they differ between devices.
    """
    output, aux = flex_attention(
        query,
        key,
        value,
        score_mod=modified(settings.softcap),
        block_mask=block_mask,
        scale=settings.scale,
        return_aux=AuxRequest(lse=True),
    )
    return output.float(), cast(Tensor, aux.lse)


def with_sink_logits(output: Tensor, log_mass: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let sink logits, [batch, kv_heads, rows], join the softmax of the local pass; None changes nothing."""
    if sink_logits is None:
        return output, log_mass
    return output * torch.sigmoid(log_mass - sink_logits)[..., None], torch.logaddexp(log_mass, sink_logits)


def decided(  # pragma: compiled
    settings: Settings, log_mass: Tensor, bulk_log_mass: Tensor, asked: Tensor, margin: Tensor
) -> Tensor:
    """Decide, see `decide`; masses are [batch, kv_heads, rows], and where groups are whole the rows are a group.

    The margin is a tensor, so that another one is not another graph.
    """
    opened = decide(log_mass, bulk_log_mass, asked, margin)
    return with_groups(opened, bulk_log_mass, axis=2) if settings.opens_groups else opened


def merged(local: tuple[Tensor, Tensor], bulk: tuple[Tensor, Tensor], has_bulk: Tensor) -> Tensor:  # pragma: compiled
    """Merge output and log mass of both passes; `has_bulk` [batch, kv_heads, rows] says which rows read bulk keys."""
    (output, log_mass), (bulk_output, bulk_log_mass) = local, bulk
    share = torch.where(has_bulk, torch.sigmoid(bulk_log_mass - log_mass), 0)[..., None]
    has_local = (log_mass > -torch.inf) | log_mass.isnan()
    output = torch.where(has_local[..., None], output * (1 - share), 0)
    return output + torch.where(has_bulk[..., None], bulk_output * share, 0)


def modified(softcap: float | None, null: tuple[int, Tensor] | None = None) -> Callable[..., Tensor] | None:
    """Cap the scores, and give the null key its own.

    Args:
        softcap: Cap; None for none.
        null: Slot of the null key and its scores, [batch, kv_heads, rows]; None for none.
    """
    if softcap is None and null is None:
        return None

    def modify(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:  # pragma: compiled
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if null is not None:
            score = torch.where(key == null[0], null[1][b, h, row], score)
        return score

    return modify
