"""Find out how a model's rotary embedding turns its keys: by looking at keys, not at names of models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchattn.calibration.manifest import Rotary
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.hf.architecture import context_of, vocabulary_of, without_head
from patchattn.hf.weights import input_device
from patchattn.measuring.reading import seen_by
from patchattn.moments.text import Rotation

_POSITIONS = (0, 1, 2, 3, 5, 13, 47, 101, 499, 1999, 7993)
# A float32 angle that is further from zero is off by more than 0.01 radians.
_FURTHEST = 1 << 17
# Keys turned in bfloat16 differ by less than 1%, in a layer of any depth; with the wrong pairs by more than 100%.
_TOLERANCE = 0.03
# How far keys may differ where values differ too, and at most: a third of what the wrong pairs give.
_TIMES_NOISE, _MOST_TOLERANCE = 3, 0.3


@dataclass(frozen=True)
class FoundRotary:
    """How the keys of a model are turned.

    Args:
        rotary: Which dimensions turn together.
        rotations: By layer.
    """

    rotary: Rotary
    rotations: dict[int, Rotation]


class _Keys:
    """Takes keys and values of the first token of every row, in every layer."""

    def __init__(self) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}

    def see(self, layer: int, inputs: AttentionInputs, attend: Callable[[], Attended]) -> Attended:
        for found, given in ((self.keys, inputs.key), (self.values, inputs.value)):
            found.setdefault(layer, []).append(given[:, :, 0].transpose(0, 1))
        return attend()


def find_rotary(model: Any, layers: tuple[int, ...], longest: int) -> FoundRotary | None:
    """Read the same two tokens at several positions, and see which way of turning back gives the same keys again.

    Args:
        model: The model.
        layers: Indices of the measured layers.
        longest: Tokens in the longest document; positions go up to the model's context, for prompts may be longer.

    Returns:
        What fits the keys of every measured layer; None if nothing does, for instance where frequencies change with
        the length.
    """
    furthest = max(longest, min(context_of(model) or 0, _FURTHEST)) - 2
    positions = sorted({min(p, furthest) for p in (*_POSITIONS, longest - 2, furthest)})
    taken = _taken_at(model, layers, positions)
    if taken is None:
        return None
    keys = {layer: torch.stack(of_layer) for layer, of_layer in taken.keys.items()}
    tolerances = {layer: _tolerance(torch.stack(of_layer)) for layer, of_layer in taken.values.items()}
    dim = next(iter(keys.values())).shape[-1]
    frequencies = _frequencies(model)
    for rotary in _candidates({2 * len(f) for f in frequencies}, dim):
        order = rotary.order(dim)
        turning = None if order == sorted(order) else torch.tensor(order)
        still = torch.zeros(dim // 2)
        lists = [torch.cat([f.cpu().float(), still])[: dim // 2] for f in frequencies if 2 * len(f) == rotary.size]
        # Some models leave out the rotary embedding in some layers.
        rotations = [Rotation(f, turning) for f in (*lists, still)]
        found = {
            layer: next((r for r in rotations if _change(_back(r, of_layer, positions)) <= tolerances[layer]), None)
            for layer, of_layer in keys.items()
        }
        known = {layer: rotation for layer, rotation in found.items() if rotation is not None}
        if len(known) == len(found):
            return FoundRotary(rotary, known)
    return None


@torch.no_grad()
def _taken_at(model: Any, layers: tuple[int, ...], positions: list[int]) -> _Keys | None:
    """Read two tokens at each position, each as the first of a row: it sees nothing but itself in any layer.

    So what a layer is given does not depend on the position, and rounding does not add up from layer to layer. Each
    position is read by itself, since some models take frequencies for the furthest position of a call.
    """
    reader = without_head(model)
    if "position_ids" not in inspect.signature(reader.forward).parameters:
        return None
    vocabulary = vocabulary_of(model)
    one, other = vocabulary // 2, vocabulary // 3
    taken, device = _Keys(), input_device(model)
    ids = torch.tensor([[one, other], [other, one]], device=device)
    with seen_by(taken.see, model, layers, local=(0, 1)):
        for position in positions:
            at = torch.tensor([position, position + 1], device=device).expand_as(ids)
            # With a mask, positions are not taken for the borders of packed sequences.
            reader(input_ids=ids, position_ids=at, attention_mask=torch.ones_like(ids), use_cache=False)
    return taken if set(taken.keys) == set(layers) else None


def _frequencies(model: Any) -> list[Tensor]:
    """Return every list of frequencies that the model's rotary embeddings hold."""
    names = (name for name, _ in model.named_buffers() if name.endswith("inv_freq") and "original" not in name)
    return [model.get_buffer(name) for name in names]


def _candidates(sizes: set[int], dim: int) -> Iterator[Rotary]:
    for size in sorted(sizes) or [dim]:
        for first in dict.fromkeys((0, dim - size)):
            if dim % 2 == 0 and 0 <= first and first + size <= dim:
                yield Rotary(layout="halves", first=first, size=size)
                yield Rotary(layout="interleaved", first=first, size=size)


def _back(rotation: Rotation, keys: Tensor, positions: list[int]) -> Tensor:
    """Turn keys back, [positions, kv_heads, tokens, dim]."""
    tokens = keys.shape[2]
    rows = zip(keys, torch.tensor(positions, device=keys.device), strict=True)
    return torch.stack([rotation.undone(of_row, at.expand(tokens)) for of_row, at in rows])


def _change(found: Tensor) -> float:
    """Say how much [positions, heads, tokens, dim] changes with the position, as a share of the smallest token."""
    return float((found - found[:1]).norm(dim=(1, 3)).amax() / found[0].norm(dim=(0, 2)).amin().clamp(min=1e-30))


def _tolerance(values: Tensor) -> float:
    """Say how much keys of a layer may change with the position, from how much values do, which are never turned.

    Values change only where turned keys matter to a lone token, through rounding: beside a learned sink logit.
    """
    return min(_TOLERANCE + _TIMES_NOISE * _change(values.double()), _MOST_TOLERANCE)
