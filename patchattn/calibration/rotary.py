"""Find out how a model's rotary embedding turns its keys: by looking at keys, not at names of models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.calibration.manifest import Rotary
from patchattn.hf.weights import input_device
from patchattn.rotary import Rotation

if TYPE_CHECKING:
    from patchattn.calibration.collect import Collecting
    from patchattn.inputs import Attended, AttentionInputs

_POSITIONS = (0, 1, 2, 3, 5, 13, 47, 101, 499, 1999, 7993)
# Keys in bfloat16, turned by angles in bfloat16, differ by less than 1%; with the wrong pairs by more than 100%.
_TOLERANCE = 0.03


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
    """Takes the keys of every layer."""

    def __init__(self) -> None:
        self.by_layer: dict[int, Tensor] = {}

    def attend(self, layer: int, inputs: AttentionInputs) -> Attended:
        self.by_layer[layer] = inputs.key
        return blockwise_attend(inputs, inputs.query.new_full(inputs.query.shape[:3], torch.inf).float(), 0.0)


def find_rotary(collecting: Collecting, longest: int) -> FoundRotary | None:
    """Read the same two tokens at several positions, and see which way of turning back gives the same keys again.

    Args:
        collecting: The patched model, with sink 0 and window 1.
        longest: Positions are below this.

    Returns:
        What fits the keys of every measured layer; None if nothing does, for instance where frequencies change with
        the length.
    """
    model = collecting.model
    keys, positions = _keys_at(collecting, sorted({min(p, longest - 2) for p in (*_POSITIONS, longest - 2)}))
    if keys is None:
        return None
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
            layer: next((r for r in rotations if _fits(r, of_layer, positions)), None)
            for layer, of_layer in keys.items()
        }
        known = {layer: rotation for layer, rotation in found.items() if rotation is not None}
        if len(known) == len(found):
            return FoundRotary(rotary, known)
    return None


@torch.no_grad()
def _keys_at(collecting: Collecting, positions: list[int]) -> tuple[dict[int, Tensor] | None, Tensor]:
    """Return by layer the keys of two tokens at each position and the one after, [positions, kv_heads, 2, dim]."""
    model = collecting.model
    reader: Any = getattr(model, "base_model", model)
    at = torch.tensor(positions)[:, None] + torch.arange(2)
    if "position_ids" not in inspect.signature(reader.forward).parameters:
        return None, at
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([vocabulary // 2, vocabulary // 3]).expand_as(at)
    taken: Any = _Keys()
    collecting.start(taken)
    # With a mask, positions are not taken for the borders of packed sequences.
    place = {"input_ids": ids, "position_ids": at, "attention_mask": torch.ones_like(at)}
    device = input_device(model)
    reader(**{name: tensor.to(device) for name, tensor in place.items()}, use_cache=False)
    complete = set(taken.by_layer) == set(collecting.settings.layers)
    return (taken.by_layer if complete else None), at


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


def _fits(rotation: Rotation, keys: Tensor, at: Tensor) -> bool:
    """Say whether keys turned back are the same at every position."""
    back = torch.stack([rotation.undone(of_row, slots.to(keys.device)) for of_row, slots in zip(keys, at, strict=True)])
    return bool((back - back[:1]).norm(dim=(1, 3)).amax() <= _TOLERANCE * back[0].norm(dim=(0, 2)).amin())
