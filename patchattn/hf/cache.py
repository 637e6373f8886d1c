"""Running prompt moments, tied to the cache whose keys they describe.

The moments of a layer live on that layer's entry in the key-value cache. The entry is replaced by one of a subclass,
of the same name, that carries the moments through everything a cache can be asked to do: beams are reordered, rows
selected or repeated, tokens cropped, the cache reset, copied and pickled. Appending keys never invalidates them.

A static cache holds them in place, like its keys. A CUDA graph may change tensors whose addresses stay, but what it
returns is gone by its next replay, which can't be given it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from patchattn.moments.gaussian import CHUNK
from patchattn.moments.prompt import PromptMoments

_ATTRIBUTE = "_patchattn_moments"
_PLACES = "_patchattn_places"
_GRID = "_patchattn_grid"
_KEYS = "_patchattn_keys"
_CROPPED = "_patchattn_cropped"

# Dynamo of torch 2.11 can't read the attributes of an object one by one.
COMPILED_CALLS_CAN_TRACK = torch.__version__ >= "2.13"
"""Whether a cache whose first call is compiled keeps its moments."""

REBUILD_REASONS = ("no cache", "never kept", "other sizes", "taken back")
"""Why a step of decode finds no moments and takes them from all keys again: the call brings no cache; its cache was
filled by calls that keep none (dense ones, those before the patch, a compiled first call before torch 2.13); they are
of another batch, sink or window; or more tokens than a window were taken out of the cache."""


def load_moments(cache: Any, layer: int, key: Tensor, grid: tuple[int, int]) -> PromptMoments | None:
    """Return the moments kept for a layer, or None where there are none that fit.

    Args:
        cache: The call's cache, or None.
        layer: Index of the layer.
        key: [batch, kv_heads, keys, dim]; the keys of the call.
        grid: Sink and window size; moments taken for others are of no use.
    """
    entry = _entry(cache, layer)
    moments = getattr(entry, _ATTRIBUTE, None)
    if moments is None or getattr(entry, _GRID, None) != grid or moments.chunks.shape[0] != key.shape[0]:
        return None
    return moments if moments.total.device == key.device else moments.to(key.device)


def reach_query(cache: Any, layer: int, queries: int, keys: int) -> bool:
    """Say whether moments are known to go up to the first query of a call: no call between, no keys taken back."""
    return getattr(_entry(cache, layer), _KEYS, None) == keys - queries


def chunks_kept(cache: Any, layer: int, grid: tuple[int, int]) -> int:
    """Say how many chunks the moments of a layer cover, whose calls had one sequence without padding.

    Reads no tensor: it goes by the keys of the last call that kept any.
    """
    return max((getattr(_entry(cache, layer), _KEYS, None) or 0) - sum(grid), 0) // CHUNK


def why_rebuilt(cache: Any, layer: int) -> str:
    """Say why `load_moments` found nothing: one of `REBUILD_REASONS`."""
    entry = _entry(cache, layer)
    if entry is None:
        return "no cache"
    if not hasattr(entry, _ATTRIBUTE):
        return "never kept"
    return "taken back" if getattr(entry, _ATTRIBUTE) is None else "other sizes"


def store_moments(cache: Any, layer: int, moments: PromptMoments, grid: tuple[int, int], keys: int) -> None:
    """Keep the moments of a layer after a call over `keys` slots with its cache; a call without one keeps none.

    A compiled graph can't make a class: a kind of cache entry that no call outside of a graph has used and that
    `prepare` did not know keeps no moments there, and they are taken from its keys again on every call. So do all
    kinds before torch 2.13.
    """
    entry = _entry(cache, layer)
    if entry is None:
        return
    if not getattr(entry, "tracks_moments", False):
        entry = _tracked(entry)
        if entry is None:
            return
        cache.layers[layer] = entry
    _keep(entry, moments)
    setattr(entry, _GRID, grid)
    setattr(entry, _KEYS, None if torch.compiler.is_compiling() else keys)  # a number would be a part of the graph
    setattr(entry, _CROPPED, 0)


def make_places(cache: Any, layer: int, key: Tensor) -> None:
    """Make places for moments in a static cache, in a call that keeps none: a compiled step after it may.

    Args:
        cache: The call's cache, or None.
        layer: Index of the layer.
        key: [batch, kv_heads, keys, dim]; the keys of the call.
    """
    entry = _entry(cache, layer)
    if _stays_in_place(entry) and not hasattr(entry, _PLACES) and not torch.compiler.is_compiling():
        _hold(entry, PromptMoments.empty(key).parts)


def key_bytes(cache: Any, layer: int) -> int:
    """Return the bytes of one key and its value in a layer of a cache that is filled."""
    entry = _entry(cache, layer)
    return sum(x.nbytes // max(x.shape[2], 1) for x in (entry.keys, entry.values))


def prepare() -> None:
    """Make the tracking classes of the cache entries that transformers has, which a compiled graph can't do."""
    from transformers import cache_utils

    for kind in list(vars(cache_utils).values()):
        if isinstance(kind, type) and kind.__name__.endswith("Layer") and not inspect.isabstract(kind):
            _tracking(kind)


def _entry(cache: Any, layer: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[layer] if layers is not None and layer < len(layers) else None


_TRACKING: dict[type, type] = {}


def _tracked(entry: Any) -> Any:
    """Return a cache entry with the same contents that carries moments along; None where there is no class for it."""
    kind = type(entry)
    if torch.compiler.is_compiling() and (kind not in _TRACKING or not COMPILED_CALLS_CAN_TRACK):
        return None
    # A new object, because a compiled graph can't change the class of an old one.
    tracked = object.__new__(_tracking(kind))
    for name, content in entry.__dict__.items():
        setattr(tracked, name, content)
    return tracked


def _tracking(base: type) -> type:
    """Return the subclass of a cache layer's class that carries moments along, made once per class."""
    if base not in _TRACKING:
        _TRACKING[base] = _make_tracking(base)
    return _TRACKING[base]


def _make_tracking(base: type) -> type:
    class Tracking(base):
        tracks_moments = True
        _layer_type = None  # else transformers makes the subclass the one for its type of layer, for all models

        def reset(self) -> None:
            base.reset(self)
            setattr(self, _ATTRIBUTE, None)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            base.reorder_cache(self, beam_idx)
            _select(self, beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            base.batch_select_indices(self, indices)
            _select(self, indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            base.batch_repeat_interleave(self, repeats)
            moments = getattr(self, _ATTRIBUTE)
            if moments is not None:
                rows = torch.arange(moments.chunks.shape[0], device=moments.chunks.device)
                _keep(self, moments.select(rows.repeat_interleave(repeats)))

        def crop(self, tokens_to_remove: int) -> None:
            before = int(self.get_seq_length())  # a static cache returns its counter, which the crop changes
            base.crop(self, tokens_to_remove)
            # Covered keys are at least a window away from the newest one, so a shorter crop leaves them in place. Crops
            # add up until moments are stored again: calls in between may have been dense.
            cropped = getattr(self, _CROPPED) + before - int(self.get_seq_length())
            setattr(self, _CROPPED, cropped)
            if cropped > getattr(self, _GRID)[1]:
                setattr(self, _ATTRIBUTE, None)

        def __reduce__(self) -> tuple[Any, ...]:
            return _remake, (base,), self.__dict__.copy()

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return self.__reduce__()

    del Tracking._layer_type
    for name in ("reset", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"):
        if not hasattr(base, name):
            delattr(Tracking, name)
    Tracking.__name__, Tracking.__qualname__ = base.__name__, base.__qualname__
    return Tracking


def _keep(entry: Any, moments: PromptMoments) -> None:
    """Keep moments with a cache entry, in place if it is one of a static cache; a reset leaves their places."""
    if moments is getattr(entry, _ATTRIBUTE, None):
        return
    if _stays_in_place(entry):
        places = getattr(entry, _PLACES, None)
        if places is None or not all(map(_fits, places, moments.parts)):
            places = _hold(entry, moments.parts)
        else:
            for place, part in zip(places, moments.parts, strict=True):
                place.copy_(part)
        moments = PromptMoments(*places)  # not the one before, which keeps what it made of their content
    setattr(entry, _ATTRIBUTE, moments)


def _stays_in_place(entry: Any) -> bool:
    return getattr(entry, "is_compileable", False)


def _hold(entry: Any, places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not torch.compiler.is_compiling():  # a graph can't mark tensors of its own
        for place in places:
            torch._dynamo.mark_static_address(place)
    setattr(entry, _PLACES, places)
    return places


def _fits(place: Tensor, part: Tensor) -> bool:
    if not torch.compiler.is_compiling() and place.is_inference() and not torch.is_inference_mode_enabled():
        return False  # what was made in inference mode can't be changed outside of it
    return (place.shape, place.dtype, place.device) == (part.shape, part.dtype, part.device)


def _select(entry: Any, rows: Tensor) -> None:
    moments = getattr(entry, _ATTRIBUTE)
    if moments is not None:
        rows = torch.as_tensor(rows)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        _keep(entry, moments.select(rows))


def _remake(base: type) -> Any:
    return object.__new__(_tracking(base))
