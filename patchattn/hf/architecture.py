"""What transformers calls things: the names of arguments, modules and settings of its models, read here and only here.

Names change with versions and differ between families. Where there is a choice, things are told by what they are and
not by what they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

ORIGINALS = {
    "sdpa": "patchattn",
    "eager": "patchattn_eager",
    "flash_attention_2": "patchattn_fa2",
    "flash_attention_3": "patchattn_fa3",
}
"""Attention implementations a model may have, with the name under which the library takes them over."""

ORIGINAL_OF = {name: original for original, name in ORIGINALS.items()}
"""The same the other way round."""

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"
LOCAL_LAYERS = frozenset({"sliding_attention", "chunked_attention", "window_attention", "hybrid_sliding"})
_QUERY_PROJECTIONS = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value")
_KV_HEADS = "num_key_value_heads"
_HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size")

# What an attention function is given by name, and what it is given only by some models or in some versions; the gated
# path reads or refuses each of these.
_HANDLED = frozenset({"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "s_aux"})
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "cache_position", "target_dtype", "implementation"})


def underlying(model: Any) -> Any:
    """Return the Hugging Face model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def without_head(model: Any) -> Any:
    """Return the part of a model that reads tokens and makes no logits."""
    model = underlying(model)
    return getattr(model, "base_model", model)


def makes_logits(model: Any) -> bool:
    """Say whether a model makes logits of tokens."""
    return underlying(model).get_output_embeddings() is not None


CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What a cache is called: the second up to transformers 5.23, the first from 5.24 on, the third in some families."""


def cache_among(arguments: Iterable[Any]) -> Any:
    """Return the key-value cache among the arguments of a model or an attention module, whatever it is called there.

    None if there is none.
    """
    from transformers.cache_utils import Cache

    for given in arguments:
        if isinstance(given, Cache):
            return given
    return None


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the hidden states, [batch, query, hidden], that an attention module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that hands a model its cache: `cache` from transformers 5.24 on, else `past_key_values`.

    Args:
        model: A Hugging Face causal language model, compiled or in a PEFT wrapper.
        cache: The cache, or None.

    Example:
        >>> from patchattn.testing import tiny_model
        >>> list(with_cache(tiny_model("llama"), None))[0] in ("cache", "past_key_values")
        True
    """
    model = underlying(getattr(model, "_orig_mod", model))
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output brings along; None if it brings none."""
    return getattr(output, "cache", None) if "cache" in _fields(output) else getattr(output, "past_key_values", None)


def _fields(output: Any) -> Any:
    return getattr(type(output), "__dataclass_fields__", ())


# Attention modules.


def interface_forward(kind: type) -> Any:
    """Return the forward function that looks the attention function up, None if the class does not do so.

    It is read from the compiled code: there may be no source file, and a subclass may be defined anywhere. A subclass
    that replaces `forward` without calling its parent's computes attention itself.
    """
    for base in kind.__mro__:
        forward = inspect.unwrap(vars(base).get("forward", None)) if "forward" in vars(base) else None
        if forward is None:
            continue
        code = getattr(forward, "__code__", None)
        if code is None:
            return None
        if _INTERFACE in code.co_names:
            return forward
        if "super" not in code.co_names and "forward" not in code.co_names:
            return None
    return None


def loop_arguments(kind: type) -> list[str]:
    """Return the arguments by which a module that is used in several loops says where its keys are in the cache."""
    forward = interface_forward(kind)
    return [] if forward is None else [name for name in inspect.signature(forward).parameters if "offset" in name]


def makes_masks(kind: type) -> bool:
    """Say whether an attention module's class tells block masks from others: it makes a mask of its own from them."""
    methods = (inspect.unwrap(method) for base in kind.__mro__ for method in vars(base).values() if callable(method))
    return any("BlockMask" in method.__code__.co_names for method in methods if hasattr(method, "__code__"))


def original_attention(module: Any, original: str) -> Callable[..., Any]:
    """Return the attention function that a module calls where its implementation is `original`."""
    if original == "eager":
        return eager_attention(module)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[original]


def eager_attention(module: Any) -> Any:
    """Return the eager attention function of the file that a module's forward is written in, None where it has none."""
    forward = interface_forward(type(module))
    return None if forward is None else forward.__globals__.get(EAGER)


def arguments_with_effect(module: Any) -> frozenset[str]:
    """Return the names of arguments that some attention function of transformers reads, beyond those read here.

    Attention functions are handed whatever a model was called with: labels of a loss, a tokenizer. What none of them
    reads has no effect on attention.
    """
    from transformers import modeling_flash_attention_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions = [ALL_ATTENTION_FUNCTIONS[name] for name in ORIGINALS if name in ALL_ATTENTION_FUNCTIONS.valid_keys()]
    functions += [ALL_ATTENTION_FUNCTIONS["flex_attention"], modeling_flash_attention_utils._flash_attention_forward]
    functions += [function] if (function := eager_attention(module)) is not None else []
    names: set[str] = set()
    for function in functions:
        code = inspect.unwrap(function).__code__
        names |= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        names |= {name for name in code.co_consts if isinstance(name, str) and name.isidentifier()}
    return frozenset(names - _HANDLED - _WITHOUT_EFFECT)


def layer_type(module: Any) -> str | None:
    """Return the type of a module's layer, None where the configuration does not tell layers apart."""
    layer_types = getattr(module.config, "layer_types", None)
    return None if layer_types is None else layer_types[module.layer_idx]


def is_local(module: Any) -> bool:
    """Say whether a layer is sliding or chunked, and so local already."""
    kind = layer_type(module)
    if kind is not None:
        return kind in LOCAL_LAYERS
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)) is not None


def cache_layer(module: Any, modules: Mapping[int, Any]) -> int:
    """Return the index under which a module's keys are in the cache: its own, or that of the layer that it shares with.

    Args:
        module: An attention module.
        modules: All attention modules of the decoder, by layer.
    """
    if not getattr(module, "is_kv_shared_layer", False):
        return module.layer_idx
    owners = [
        index
        for index, other in modules.items()
        if not getattr(other, "is_kv_shared_layer", False) and layer_type(other) == layer_type(module)
    ]
    return max((index for index in owners if index < module.layer_idx), default=module.layer_idx)


def softcap_of(module: Any) -> float | None:
    """Return the softcap of a module's scores, None where it has none."""
    return getattr(module, "attn_logit_softcapping", None)


def has_sink_logits(module: Any) -> bool:
    """Say whether a module has a learned logit per head that joins the softmax."""
    return hasattr(module, "sinks")


def query_heads(module: Any) -> int:
    """Count the query heads of a layer, on all devices together."""
    heads = module.config.num_attention_heads
    return heads[module.layer_idx] if isinstance(heads, list | tuple) else heads


def group_size(module: Any) -> int:
    """Count the query heads that share a KV head."""
    group = getattr(module, "num_key_value_groups", None)
    if isinstance(group, int):
        return group
    return query_heads(module) // (getattr(module.config, _KV_HEADS, None) or query_heads(module))


def head_sizes(module: Any) -> tuple[int, int]:
    """Return the dimension of queries and keys, and that of values: they differ where both come from a latent."""
    sizes = (getattr(module, name, None) for name in _HEAD_DIMS)
    dim = next((size for size in sizes if isinstance(size, int)), None) or head_dim(module.config)
    return dim, getattr(module, "v_head_dim", None) or dim


def head_slices(model: Any) -> tuple[int, int]:
    """Return into how many slices tensor parallelism cuts the query heads, and which of them is on this device.

    A plan that gathers the projected queries again leaves every head on every device.
    """
    plan, mesh = getattr(model, "tp_plan", None) or {}, getattr(model, "_device_mesh", None)
    cut = any(name.rsplit(".", 1)[-1] in _QUERY_PROJECTIONS and style == "colwise" for name, style in plan.items())
    if mesh is None or not cut:
        return 1, 0
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return mesh.size(), mesh.get_local_rank()


# Configurations.


def implementation_of(config: Any) -> str:
    """Return the name of the attention implementation that a configuration asks for."""
    return config._attn_implementation_internal


def set_implementation(config: Any, name: str) -> None:
    """Have modules of a configuration call another attention function, past the checks meant for users."""
    config._attn_implementation_internal = name


def text_config(model: Any) -> Any:
    """Return the configuration of a model's decoder."""
    return model.config.get_text_config(decoder=True)


def kv_heads(config: Any) -> int:
    """Return the number of KV heads in a decoder's configuration; as many as query heads if it states none."""
    return getattr(config, _KV_HEADS, None) or config.num_attention_heads


def head_dim(config: Any) -> int:
    """Return the dimension of queries and keys that a decoder's configuration states or amounts to."""
    return next(
        (size for name in _HEAD_DIMS[:2] if (size := getattr(config, name, None))),
        config.hidden_size // config.num_attention_heads,
    )


def context_of(model: Any) -> int | None:
    """Return the most tokens that a model reads; None if its configuration names no limit."""
    return getattr(text_config(model), "max_position_embeddings", None)


def vocabulary_of(model: Any) -> int:
    """Return the number of tokens that a model knows."""
    return text_config(model).vocab_size


def hidden_size(model: Any) -> int:
    """Return the size of the hidden state that a decoder's layers are given."""
    return text_config(model).hidden_size


def name_of(model: Any) -> str:
    """Return the name or folder that a model was loaded from, or that of its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def commit_of(model: Any) -> str | None:
    """Return the commit on the Hub that a model was loaded from, None if it was not."""
    return getattr(model.config, "_commit_hash", None)


def asks_for_weights(model: nn.Module, module: nn.Module) -> bool:
    """Say whether the configuration of a model, or of a part that holds `module`, asks for attention weights."""
    return any(part.config.output_attentions is True for part in holders(model, module))


def holders(model: nn.Module, module: nn.Module) -> list[Any]:
    """Return the transformers models that hold a module, the outermost first."""
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if any(inner is module for inner in part.modules())]
