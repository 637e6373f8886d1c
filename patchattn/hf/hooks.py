"""Hooks on a patched model's modules: what transformers does not hand to attention and mask functions by itself."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from patchattn.errors import PatchStateError, UnsupportedCallError
from patchattn.hf.architecture import ORIGINALS, cache_among, hidden_of, implementation_of

STATE = "patchattn_layer"
"""Name of the submodule that a patched attention module carries."""

CACHE_ARGUMENT = "patchattn_cache"
"""Keyword under which the cache reaches the attention function."""

HIDDEN_ARGUMENT = "patchattn_hidden"
"""Keyword under which the hidden state of the layer reaches the attention function, where a probe reads it."""

_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching")


def install_cache_hook(module: nn.Module) -> Any:
    """Let the cache of each call reach the attention function, and the hidden state; returns the hook's handle."""
    return module.register_forward_pre_hook(_pass_cache, with_kwargs=True)


def _pass_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    state = module._modules[STATE]
    if implementation_of(module.config) != ORIGINALS[state.original]:
        raise PatchStateError(
            f"The model's attention implementation was changed to {implementation_of(module.config)!r} after it was "
            "patched, which silently switches the patch off.",
            fix="call patchattn.unpatch(model) before set_attn_implementation, and patch again after it",
        )
    if kwargs.get("output_attentions"):
        raise no_attention_weights()
    kwargs[CACHE_ARGUMENT] = cache_among((*args, *kwargs.values()))
    if state.reads_hidden:
        kwargs[HIDDEN_ARGUMENT] = hidden_of(args, kwargs)
    return args, kwargs


def install_mask_hook(decoder: nn.Module) -> None:
    """Let a compiled call of a decoder say that it is plainly causal; `decoder` is the module that makes the masks.

    Without mask, positions and cache, transformers looks at the positions it made for boundaries of packed sequences.
    A compiled graph can't look, so it gets the mask of packed sequences always. A padding mask of ones says the same as
    none and spares the search.
    """
    decoder.register_forward_pre_hook(_say_plain, with_kwargs=True)


def remove_mask_hook(decoder: nn.Module) -> None:
    """Undo `install_mask_hook`; does nothing where there is no hook."""
    # By identity: copies of a patched model have the hook too.
    for number in [number for number, hook in decoder._forward_pre_hooks.items() if hook is _say_plain]:
        decoder._forward_pre_hooks.pop(number)
        decoder._forward_pre_hooks_with_kwargs.pop(number)


def _say_plain(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.compiler.is_compiling() or len(args) > 1:
        return None
    if any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids")):
        return None
    if cache_among(kwargs.values()) is not None:
        return None
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None
    ones = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return args, {**kwargs, "attention_mask": ones}


class BatchingRefusal:
    """Makes a model refuse continuous batching, and takes that back. It is undone when the patch is.

    The layers' states hold it, so that a patch can be undone from any module that holds the layers. It does not keep
    the model alive, and in a copy of the model it is about the copy.

    Args:
        model: The model; one that has no such methods is left as it is. None if there is none any more.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model, self.is_undone = None if model is None else weakref.ref(model), False
        for name in _CONTINUOUS_BATCHING:
            if hasattr(model, name):
                vars(model)[name] = _refuse_continuous_batching

    @property
    def model(self) -> nn.Module | None:
        """The model; None if there is none any more."""
        return None if self._model is None else self._model()

    def undo(self) -> None:
        """Give the model its methods back; does nothing the second time."""
        self.is_undone = True
        for name in _CONTINUOUS_BATCHING if self.model is not None else ():
            vars(self.model).pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchingRefusal:
        """Be about the copy of the model; about none where only a part of the model is copied."""
        return BatchingRefusal(memo.get(id(self.model)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Be about the model that comes out of the pickle."""
        return BatchingRefusal, (self.model,)


def _refuse_continuous_batching(*_: Any, **__: Any) -> Any:
    raise UnsupportedCallError(
        "Continuous batching keeps keys in pages that the gated path can't read.",
        fix="call patchattn.unpatch(model) first, or use generate() with a padded batch",
    )


def no_attention_weights() -> UnsupportedCallError:
    """Make the error for a call that asks for attention weights."""
    return UnsupportedCallError(
        "output_attentions=True asks for attention weights, which the patched model never forms.",
        fix="unpatch the model, or drop output_attentions",
    )
