"""Which models can be patched, and why the others can't."""

from __future__ import annotations

from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from patchattn.hf.architecture import (
    EAGER,
    LOCAL_LAYERS,
    ORIGINALS,
    asks_for_weights,
    eager_attention,
    has_sink_logits,
    holders,
    implementation_of,
    interface_forward,
    is_local,
    layer_type,
    loop_arguments,
    makes_masks,
    softcap_of,
    text_config,
    underlying,
)
from patchattn.hf.offload import lacks_weights

_OWN_SELECTION = frozenset({"position_bias", "indices", "block_indices", "sinks", "indexer"})
"""Names in an attention module's forward of scores or selections that the gated path would drop."""

_FULL_LAYERS = frozenset({"full_attention", "attention"})
_OTHER_MIXERS = ("Linear", "Delta", "Lightning", "Conv")
"""Parts of the names of layers that are called attention but form no scores over keys."""


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
        model: A Hugging Face model with a decoder: a causal language model, a vision-language model (its text tower
            is meant), a decoder without a head, or a PEFT wrapper of one of these.

    Returns:
        `Supported` (true) with the layers that can be patched, or `Unsupported` (false) with the reasons.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        return Unsupported((f"{type(model).__name__} is not a torch.nn.Module.",))
    name = type(model).__name__
    model = underlying(model)
    if not isinstance(model, PreTrainedModel):
        inner = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
        hint = "" if inner is None else f" Patch the {type(inner).__name__} inside it, before wrapping or compiling it."
        return Unsupported((f"{name} is not a Hugging Face PreTrainedModel.{hint}",))
    name = type(model).__name__
    modules = attention_modules(model)
    reasons = []
    if not _is_causal_decoder(model, modules):
        reasons.append(f"{name} is not a decoder-only causal language model.")
    if lacks_weights(model):
        reasons.append(f"{name} has weights on the meta device; load its weights first.")
    decoder = decoder_of(model)
    # Vision and audio towers stay as they are: only what holds the attention modules decides.
    reasons += _reasons_of_modules(model if decoder is None else decoder, modules)
    if not modules or decoder is None:
        reason = f"{name} has no attention module that goes through transformers' AttentionInterface."
        return Unsupported(tuple(reasons or [reason]))
    if asks_for_weights(model, next(iter(modules.values()))):
        reasons.append(
            f"The configuration of {name} asks for attention weights on every call, which a patched model never forms; "
            "set model.config.output_attentions = False first."
        )
    reasons += _reasons_of_implementation(name, modules)
    reasons = reasons or _reasons_of_layer_types(modules)
    local = tuple(index for index, module in modules.items() if is_local(module))
    layers = tuple(index for index in modules if index not in local)
    if not layers:
        reasons.append(f"{name} has no full-attention layer: {_why_all_local(next(iter(modules.values())).config)}")
    return Unsupported(tuple(reasons)) if reasons else Supported(layers, local)


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """Return the decoder's self-attention modules that go through the attention interface, by layer index.

    Modules of a vision or audio tower have a configuration of another class and are left out.
    """
    found = _interface_modules(model)
    model = underlying(model)
    if hasattr(getattr(model, "config", None), "get_text_config"):
        kind = type(text_config(model))
        found = [module for module in found if type(module.config) is kind] or found
    return {module.layer_idx: module for module in sorted(found, key=lambda module: module.layer_idx)}


def decoder_of(model: nn.Module) -> Any:
    """Return the innermost transformers model that holds the attention modules: the one that makes the masks.

    None if there is none, because there are no such modules or they were taken out of it.
    """
    modules = attention_modules(model)
    found = holders(model, next(iter(modules.values()))) if modules else []
    return found[-1] if found else None


def _interface_modules(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and interface_forward(type(module)) is not None
    ]


def _is_causal_decoder(model: Any, modules: dict[int, Any]) -> bool:
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_causal", True) is False:
        return False
    if model.can_generate():
        return all(getattr(module, "is_causal", True) for module in modules.values())
    # A decoder without a head says of itself that it is causal.
    return bool(modules) and all(getattr(module, "is_causal", False) is True for module in modules.values())


def _reasons_of_modules(model: Any, modules: dict[int, Any]) -> list[str]:
    """Find attention that the gated path would miss or get wrong."""
    reasons = []
    known = {id(module) for module in modules.values()}
    configs = {id(module.config) for module in modules.values()}
    for module in model.modules():
        kind, index = type(module).__name__, getattr(module, "layer_idx", None)
        if "CrossAttention" in kind or getattr(module, "is_cross_attention", False) is True:
            reasons.append(f"{kind} attends to another sequence.")
        elif id(module) in known:
            found = sorted(_OWN_SELECTION & _names(interface_forward(type(module)).__code__))
            if found:
                reasons.append(f"{kind} selects or biases keys on its own ({', '.join(found)}).")
            elif loops := loop_arguments(type(module)):
                reasons.append(f"{kind} is called several times for a token ({', '.join(loops)}).")
            elif makes_masks(type(module)):
                reasons.append(f"{kind} makes a mask of its own from the one it is given.")
        elif id(getattr(module, "config", None)) in configs and interface_forward(type(module)) is not None:
            reasons.append(f"{kind} is a second attention module of layer {index}, or of a layer without an index.")
        elif kind.endswith("Attention") and isinstance(index, int) and not any(part in kind for part in _OTHER_MIXERS):
            reasons.append(
                f"{kind} computes attention itself instead of going through transformers' AttentionInterface."
            )
    return list(dict.fromkeys(reasons))


def _names(code: CodeType) -> set[str]:
    """Names and keyword arguments that a function's compiled code uses."""
    constants = [(name,) if isinstance(name, str) else name for name in code.co_consts]
    keywords = {name for group in constants if isinstance(group, tuple) for name in group if isinstance(name, str)}
    # A name that is only read, as the learned sinks handed on as `s_aux`, is no sign: only the indexer is.
    return keywords | ({"indexer"} & set(code.co_names))


def _reasons_of_implementation(name: str, modules: dict[int, Any]) -> list[str]:
    originals = {implementation_of(module.config) for module in modules.values()}
    reasons = [
        f"{name} uses the attention implementation {original!r}; call model.set_attn_implementation('sdpa') first."
        for original in sorted(originals - {*ORIGINALS, *ORIGINALS.values()}, key=str)
    ]
    if originals & {"sdpa", ORIGINALS["sdpa"]} and any(_needs_more_than_sdpa(module) for module in modules.values()):
        reasons.append(
            f"{name} has a softcap or sink logits, which sdpa drops; call model.set_attn_implementation('eager') first."
        )
    eager = originals & {"eager", ORIGINALS["eager"]}
    if eager and any(eager_attention(module) is None for module in modules.values()):
        reasons.append(
            f"{name} is eager, but the file of its attention has no {EAGER}; call "
            "model.set_attn_implementation('sdpa') first."
        )
    return reasons


def _needs_more_than_sdpa(module: Any) -> bool:
    # transformers 5.17 gives Gemma 2 sdpa by default, and its sdpa ignores the softcap without a word.
    return softcap_of(module) is not None or has_sink_logits(module)


def _reasons_of_layer_types(modules: dict[int, Any]) -> list[str]:
    kinds = {layer_type(module) for module in modules.values()} - _FULL_LAYERS - LOCAL_LAYERS - {None}
    return [f"Layers of the type {kind!r} are not known." for kind in sorted(kinds, key=str)]


def _why_all_local(config: Any) -> str:
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    if getattr(config, "layer_types", None) is None and window and longest and window >= longest:
        return (
            f"its sliding window of {window} tokens covers all {longest} positions, so setting "
            "model.config.sliding_window = None before the patch changes no result and makes its layers full."
        )
    return "all its layers are sliding and so local already."
