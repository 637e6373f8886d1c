"""What can be served by continuous batching: the refusals, and the engine's class of managers where there is one."""

from __future__ import annotations

from typing import Any

from patchattn.errors import UnsupportedCallError
from patchattn.hf.architecture import head_sizes, head_slices
from patchattn.hf.hooks import STATE

_KINDS = ("full_attention", "sliding_attention")
_PAGE_SIZE = 256  # of the engine, where no configuration says so
_BATCH = "use generate() with a padded batch, or call patchattn.unpatch(model) first"


def manager_class() -> Any:
    """Return the engine's class of managers.

    Raises:
        UnsupportedCallError: This version of transformers has none that can be told apart from its attention.
    """
    import transformers

    try:
        from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    except ImportError:
        CacheAllocator = ContinuousBatchingManager = None
    if CacheAllocator is None or not hasattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn"):
        raise UnsupportedCallError(
            f"Continuous batching of transformers {transformers.__version__} can't run a patched model; that of 5.24 "
            "and later can.",
            fix='pip install "transformers>=5.24", call patchattn.unpatch(model) first, or use generate() with a '
            "padded batch",
        )
    return ContinuousBatchingManager


def check_servable(model: Any, config: Any) -> None:
    """Refuse what can't be served.

    Raises:
        UnsupportedCallError: Says what and why.
    """
    modules = [module for module in model.modules() if STATE in module._modules]
    states = [module._modules[STATE] for module in modules]
    if any(state.drafting is not None for state in states):
        raise _refused("Continuous batching verifies no drafts.", "call patchattn.unpatch(model), then patch(model)")
    for module, state in zip(modules, states, strict=True):
        size, (dim, *_) = getattr(config, "page_size", _PAGE_SIZE), head_sizes(module)
        device = next(module.parameters()).device
        why_not = None if state.by_table is None else state.by_table.why_not(device, size, dim)
        if why_not is not None:
            raise _refused(
                f"The backend {state.backend!r} can't read these pages: {why_not}.",
                'patch with backend="blockwise", or serve with pages of another size',
            )
    if any(state.record == "timeline" for state in states):
        raise _refused(
            'record="timeline" keeps the decisions of one text, and here many are mixed.', 'patch with record="summary"'
        )
    # Layers that are not attention are among them: linear ones keep a state, for which the engine has no place.
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())} - {*_KINDS}
    if kinds:
        raise _refused(f"The engine keeps no pages for layers of {', '.join(sorted(map(str, kinds)))}.", _BATCH)
    if any(state.cache_layer != state.layer for state in states):
        raise _refused("Some layers of the model read the keys of others, which the engine has no pages for.", _BATCH)
    if any(len(set(head_sizes(module))) > 1 for module in modules):
        raise _refused("The model's keys and values differ in size, which the engine has no pages for.", _BATCH)
    if any(state.is_local and state.original not in ("sdpa", "eager") for state in states):
        raise _refused(
            "Sliding layers are served with the model's own attention, which has to take a mask.",
            "load the model with attn_implementation='sdpa'",
        )
    check_config(config)


def check_config(config: Any) -> None:
    """Refuse graphs, which the gates can't be in.

    Raises:
        UnsupportedCallError: Says what is asked for.
    """
    asked = {
        "use_cuda_graph": any(config.cuda_graph_booleans) if getattr(config, "use_cuda_graph", None) else False,
        "use_async_batching": getattr(config, "use_async_batching", None),
        "varlen_compile_config": getattr(config, "varlen_compile_config", None),
        "decode_compile_config": getattr(config, "decode_compile_config", None),
        "default_compile_level": getattr(config, "default_compile_level", None),
    }
    given = [name for name, value in asked.items() if value]
    if given:
        raise _refused(
            f"The gates decide on the host which pages are read, which a graph can't: {', '.join(given)}.",
            "leave these out of the ContinuousBatchingConfig",
        )


def check_heads(model: Any, helper: Any) -> None:
    """Refuse a model of whose KV heads each process holds other ones than the engine has pages for.

    Raises:
        UnsupportedCallError: Says so.
    """
    # The engine goes by the names in the plan, whatever is gathered again after it.
    slices = helper.tp_size if helper.tp_size > 1 and helper.are_kv_heads_tp_ed() else 1
    if head_slices(model)[0] != slices:
        helper.destroy_cpu_comm_group()
        raise _refused(
            f"The engine makes pages as if the KV heads were cut in {slices}, and tensor parallelism cuts those of "
            f"this model in {head_slices(model)[0]}.",
            "serve a whole copy of the model from each process",
        )


def _refused(reason: str, fix: str) -> UnsupportedCallError:
    return UnsupportedCallError(f"A patched model can't be served like this. {reason}", fix=fix)
