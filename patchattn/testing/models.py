"""Tiny models with random weights, one per family that the test matrix covers."""

from __future__ import annotations

from typing import Any

import torch

from patchattn.hf.loading import random_model

# Untied embeddings, because Gemma's scaled ones would make the model repeat its last token.
_GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 24}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
}
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Random weights of the usual size give flat attention; larger ones make heads that differ.
    "initializer_range": 0.15,
    "sliding_window": None,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}

IMAGE_TOKEN = 127
"""Token that stands for an image patch in the tiny vision-language models."""

VISION_START, VISION_END = 125, 124
"""Tokens around an image in the tiny Qwen2-VL."""

_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    # Every expert is active in the tiny mixtures, so that rounding can't send a token elsewhere.
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma2": {**_HYBRID, **_GEMMA, "attn_logit_softcapping": 4.0, "attn_implementation": "eager"},
    "gemma3_text": {**_HYBRID, **_GEMMA},
    "gemma4_text": {
        **_HYBRID,
        **_GEMMA,
        # Queries and keys of length one, not scaled: longer heads look at single keys only.
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
    },
    "phi3": {},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "cohere2": _HYBRID,
    "olmo2": {},
    "starcoder2": {},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "gpt_oss": {**_HYBRID, "num_local_experts": 2, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "gpt_neox": {"num_key_value_heads": None},  # as many as query heads; its configuration has no such field
    # Lightning attention in blocks shorter than the texts of the tests.
    "minimax": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "block_size": 16,
    },
    "gemma3": {
        "text_config": {**_TEXT, **_HYBRID, **_GEMMA},
        "tie_word_embeddings": False,
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    },
    "qwen2_vl": {
        "text_config": {
            **_TEXT,
            "model_type": "qwen2_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 96, "num_heads": 2, "patch_size": 4},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 126,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    },
    "bloom": {"n_layer": 2, "n_head": 6},
    "falcon": {},
    "deepseek_v32": {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16},
}

VISION_FAMILIES = ("gemma3", "llava", "qwen2_vl")
"""Vision-language families, whose text tower can be patched."""

REFUSED_FAMILIES = ("bloom", "falcon", "deepseek_v32")
"""Families that `patchattn.patch` refuses, for the tests that say so."""

HYBRID_FAMILIES = ("minimax",)
"""Text families with layers of linear attention, whose full layers can be patched; they have caches of their own."""

FAMILIES = tuple(name for name in _OWN_FIELDS if name not in (*VISION_FAMILIES, *HYBRID_FAMILIES, *REFUSED_FAMILIES))
"""Text families that can be patched."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Make a tiny model with random weights, in evaluation mode.

    Args:
        family: One of `FAMILIES`, `VISION_FAMILIES`, `HYBRID_FAMILIES` or `REFUSED_FAMILIES`.
        seed: Seed of the weights; the global random state is left as it was.
        dtype: dtype of the weights.
        **overrides: Fields of the configuration.

    Returns:
        The causal language model: 3 layers, the first of them sliding in families that mix, 6 query heads of 16 over 2
        KV heads (6 in families without grouped queries), vocabulary 128. Heads of Gemma 4 have 8 dimensions.

    Raises:
        ValueError: Not the name of a family.
    """
    if family not in _OWN_FIELDS:
        raise ValueError(f"Expected one of {tuple(_OWN_FIELDS)}, got {family!r}.")
    is_vision = family in VISION_FAMILIES
    fields = ({} if is_vision else _TEXT) | _OWN_FIELDS[family] | overrides
    if family == "falcon":
        del fields["head_dim"]
    return random_model(family, fields, has_images=is_vision, seed=seed, dtype=dtype)
