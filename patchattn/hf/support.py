"""Which models can be patched, and why the others can't."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

ORIGINALS = {
    "sdpa": "patchattn",
    "eager": "patchattn_eager",
    "flash_attention_2": "patchattn_fa2",
    "flash_attention_3": "patchattn_fa3",
}
"""Attention implementations a model may have, with the name under which the library takes them over."""

_UNKNOWN_ARGUMENTS = ("position_bias=", "indices=", "block_indices=", "indexer")
"""Signs in an attention module's source of scores or selections that the gated path would drop."""


@dataclass(frozen=True)
class Supported:
    """The model can be patched.

    Args:
        layers: Indices of the layers that can be patched: full attention, not sliding.
        local_layers: Indices of the sliding or chunked layers, which are local already and left alone.
    """

    layers: tuple[int, ...]
    local_layers: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Supported is true."""
        return True


@dataclass(frozen=True)
class Unsupported:
    """The model can't be patched.

    Args:
        reasons: Every reason found, a sentence each.
    """

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        """Unsupported is false."""
        return False

    def __str__(self) -> str:
        """Return the reasons, a line each."""
        return "\n".join(self.reasons)


def check_support(model: Any) -> Supported | Unsupported:
    """Say whether a model can be patched, and if not, every reason why.

    Args:
        model: A Hugging Face causal language model.

    Returns:
        `Supported` (true) with the layers that can be patched, or `Unsupported` (false) with the reasons.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        return Unsupported((f"{type(model).__name__} is not a torch.nn.Module.",))
    if not isinstance(model, PreTrainedModel):
        return Unsupported((f"{type(model).__name__} is not a Hugging Face PreTrainedModel.",))
    name = type(model).__name__
    reasons = []
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        reasons.append(f"{name} is not a decoder-only causal language model.")
    if any(parameter.is_meta for parameter in model.parameters()):
        reasons.append(f"{name} has parameters on the meta device; load its weights first.")
    if not _uses_attention_interface(model):
        reasons.append(f"{name} computes attention itself instead of going through transformers' AttentionInterface.")
        return Unsupported(tuple(reasons))
    original = model.config._attn_implementation
    if original not in ORIGINALS and original not in ORIGINALS.values():
        reasons.append(
            f"{name} uses the attention implementation {original!r}; call model.set_attn_implementation('sdpa') first."
        )
    modules = attention_modules(model)
    for module in modules.values():
        source = inspect.getsource(type(module))
        found = [sign.rstrip("=") for sign in _UNKNOWN_ARGUMENTS if sign in source]
        if found:
            reasons.append(f"{type(module).__name__} selects or biases keys on its own ({', '.join(found)}).")
            break
    local = tuple(index for index, module in modules.items() if is_local(module))
    layers = tuple(index for index in modules if index not in local)
    if not layers:
        reasons.append(
            f"{name} has no full-attention layer: "
            + ("all its layers are sliding and so local already." if local else "no attention module was found.")
        )
    return Unsupported(tuple(reasons)) if reasons else Supported(layers, local)


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """Return the self-attention modules of a decoder by layer index."""
    found = {}
    for module in model.modules():
        is_attention = type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
        if is_attention and hasattr(module, "config"):
            found[module.layer_idx] = module
    return dict(sorted(found.items()))


def is_local(module: Any) -> bool:
    """Say whether a layer is sliding or chunked, and so local already."""
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[module.layer_idx] != "full_attention"
    return getattr(config, "sliding_window", None) is not None


def _uses_attention_interface(model: Any) -> bool:
    source = inspect.getsource(sys.modules[type(model).__module__])
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
