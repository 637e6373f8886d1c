"""Hooks on a patched model's modules: what transformers does not hand to attention and mask functions by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from patchattn.errors import PatchStateError, UnsupportedCallError
from patchattn.hf.architecture import CACHE_NAMES, ORIGINALS, cache_among, hidden_of, implementation_of

STATE = "patchattn_layer"
"""Name of the submodule that a patched attention module carries."""

CACHE_ARGUMENT = "patchattn_cache"
"""Keyword under which the cache reaches the attention function."""

HIDDEN_ARGUMENT = "patchattn_hidden"
"""Keyword under which the hidden state of the layer reaches the attention function, where a probe reads it."""

PAGES_ARGUMENT = "patchattn_pages"
"""Keyword under which pages of continuous batching reach the attention function; their name on the engine's cache."""


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
    if state.batching.serves:
        _pass_pages(state, kwargs)
    kwargs[CACHE_ARGUMENT] = cache_among((*args, *kwargs.values()))
    if state.reads_hidden:
        kwargs[HIDDEN_ARGUMENT] = hidden_of(args, kwargs)
    return args, kwargs


def _pass_pages(state: Any, kwargs: dict[str, Any]) -> None:
    """Hand on the pages of a step of continuous batching; a layer that reads them itself gets them as its cache."""
    for name in CACHE_NAMES:
        pages = getattr(kwargs.get(name), PAGES_ARGUMENT, None)
        if pages is None:
            continue
        if state.is_local:
            kwargs[PAGES_ARGUMENT] = pages.step(), pages.window_of(state.cache_layer)
        else:
            kwargs[PAGES_ARGUMENT] = kwargs[name] = pages.of_layer(state.cache_layer, kwargs)


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


def no_attention_weights() -> UnsupportedCallError:
    """Make the error for a call that asks for attention weights."""
    return UnsupportedCallError(
        "output_attentions=True asks for attention weights, which the patched model never forms.",
        fix="unpatch the model, or drop output_attentions",
    )
