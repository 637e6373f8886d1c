"""One softmax over one rectangle of keys, and the merge of several: what the blockwise backend is built from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from patchattn.call.inputs import AttentionInputs

# Scores that exist at once where two matrix products take the place of the fused kernel.
_MOST_SCORES = 1 << 22


@dataclass(frozen=True)
class Softmax:
    """Attention of some rows to some keys.

    Args:
        output: [..., rows, value_dim]; zeros where the log mass is -inf.
        log_mass: [..., rows] nats.
    """

    output: Tensor
    log_mass: Tensor

    def merge(self, other: Softmax) -> Softmax:
        """Return the softmax over the keys of both, which are disjoint; every row sees a key of at least one."""
        output = _mix(self.output, other.output, self._share_of(other))
        return Softmax(output, torch.logaddexp(self.log_mass, other.log_mass))

    def take_in(self, other: Softmax) -> None:
        """Change the output, which has the dtype of the log mass, to that over the keys of both."""
        self.output.lerp_(other.output.to(self.output.dtype), self._share_of(other))

    def take_in_rows(self, rows: slice, other: Softmax) -> None:
        """Change some rows, of [rows, ...], output and log mass, to those over the keys of both; a row may see none."""
        own = Softmax(self.output[rows], self.log_mass[rows])
        share = own._share_of(other).masked_fill((other.log_mass == -torch.inf).unsqueeze(-1), 0)
        torch.logaddexp(own.log_mass, other.log_mass, out=own.log_mass)
        own.output.lerp_(other.output.to(own.output.dtype), share)

    def _share_of(self, other: Softmax) -> Tensor:
        """Weight of the other output in that of both, [..., rows, 1]."""
        return torch.sigmoid(other.log_mass - self.log_mass).unsqueeze(-1)


def _mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Mix outputs in the dtype of the log masses, [..., rows, value_dim]."""
    if one.dtype == share.dtype:
        return torch.lerp(one, other, share)
    return one.to(share.dtype).lerp_(other.to(share.dtype), share).to(one.dtype)


def is_fused(inputs: AttentionInputs) -> bool:
    """Say whether the fused CPU kernel computes this call; two matrix products do otherwise."""
    return inputs.query.device.type == "cpu" and inputs.softcap is None


def attend_to(
    inputs: AttentionInputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None = None,
    *,
    causal: bool = False,
) -> Softmax:
    """Attend rows to keys.

    Args:
        inputs: The call, for scale, softcap and dtype.
        query: [batch, heads, rows, dim].
        key: [batch, kv_heads, keys, dim]; at least one key.
        value: [batch, kv_heads, keys, value_dim].
        seen: [batch or 1, 1, rows or 1, keys] bool; None means that every row sees every key. Rows that see none get
            the log mass -inf.
        causal: Row `i` sees keys `0 .. i`; only where `is_fused`, and without `seen`. Values that are not finite spoil
            rows that do not see them.

    Returns:
        Output [batch, heads, rows, value_dim] and log mass [batch, heads, rows] in nats.
    """
    if is_fused(inputs):
        part = _fused(inputs, query, key, value, None if seen is None else bias_of(seen, query.dtype), causal=causal)
        # The kernel takes a row in which no score is a number, or all are -inf, for one without keys: output and log
        # mass 0, which could close a gate. It adds the bias to the score, so a key that is not finite spoils rows that
        # mask it. Only then are the scores computed again, and masked by selection.
        if seen is None:
            if causal or _tells_all(part):
                return part
        else:
            blind = ~seen.any(3)
            lost = ((part.log_mass == 0) & ~blind).any()
            if not (lost or has_nan(part.output) or has_nan(part.log_mass)):
                return without_rows(part, blind)
    part = _by_products(inputs, query, key, value, seen)
    return without_rows(part, part.log_mass == -torch.inf)


def attend_where_finite(
    inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Softmax | None:
    """Attend rows to keys where `is_fused`, with an additive mask; None where what is not finite spoils other rows.

    Shapes as in `attend_to`; the mask has the dtype of the query and leaves each row a key. Without one a value that is
    not a number gives rows that see it what it gives them in plain attention.
    """
    part = _fused(inputs, query, key, value, bias, causal=False)
    # A mask that is added can't hide a key that is not finite from rows that it hides others from.
    spoilt = bias is not None and has_nan(part.output)
    return None if spoilt or not _tells_all(part) else part


def with_sink_logits(part: Softmax, sink_logits: Tensor) -> Softmax:
    """Let learned logits, which broadcast against the log mass, join the softmax without values."""
    total = torch.logaddexp(part.log_mass, sink_logits.to(part.log_mass.dtype))
    return Softmax((part.output * (part.log_mass - total).exp()[..., None]).to(part.output.dtype), total)


def with_unit_stride(x: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous: the CPU kernel assumes it, and is silently wrong if not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fused(
    inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, causal: bool
) -> Softmax:
    dim, value_dim = query.shape[3], value.shape[3]
    if dim != value_dim:
        # The kernel takes one head size; zeros change neither scores nor the real part of the output.
        query, key = (pad(x, (0, max(value_dim - dim, 0))) for x in (query, key))
        value = pad(value, (0, max(dim - value_dim, 0)))
    output, log_mass = torch._scaled_dot_product_flash_attention_for_cpu(  # pyright: ignore[reportPrivateImportUsage]
        query, key, value, is_causal=causal, attn_mask=bias, scale=inputs.scale
    )
    return Softmax(output[..., :value_dim] if dim > value_dim else output, log_mass)


def _by_products(inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Softmax:
    """Attend by two matrix products, as many rows at a time as bound the matrix of scores between them."""
    step = max(_MOST_SCORES // max(query.shape[0] * query.shape[1] * key.shape[2], 1), 1)
    if step < query.shape[2]:
        slabs = [slice(begin, begin + step) for begin in range(0, query.shape[2], step)]
        masks = [seen if seen is None or seen.shape[2] == 1 else seen[:, :, rows] for rows in slabs]
        parts = [
            _by_products(inputs, query[:, :, rows], key, value, mask) for rows, mask in zip(slabs, masks, strict=True)
        ]
        return Softmax(
            torch.cat([part.output for part in parts], dim=2), torch.cat([part.log_mass for part in parts], dim=2)
        )
    grouped = query.to(inputs.compute_dtype).unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.to(inputs.compute_dtype)[:, :, None].mT).flatten(1, 2) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).unflatten(1, (key.shape[1], -1))
    output = (weights @ value.to(inputs.compute_dtype)[:, :, None]).flatten(1, 2)
    return Softmax(output.to(query.dtype), scores.logsumexp(-1))


def has_nan(x: Tensor) -> bool:
    """Say whether there is a NaN, or infinities of both signs: a sum tells, in a small part of the time of `isnan`."""
    return math.isnan(x.sum().item())


def _tells_all(part: Softmax) -> bool:
    """Say whether the kernel told every row: of one in which no score is a number it says output and log mass 0."""
    return torch.count_nonzero(part.log_mass).item() == part.log_mass.numel()


def without_rows(part: Softmax, blind: Tensor) -> Softmax:
    """Zero the rows that see no key, in place: the kernels give them NaN, or the log mass 0."""
    if blind.any():
        part.output.masked_fill_(blind[..., None], 0)
        part.log_mass.masked_fill_(blind, -torch.inf)
    return part


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: 0 where a key is seen, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
