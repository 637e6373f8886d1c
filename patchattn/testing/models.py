"""Tiny models with random weights, one per family."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model families of which `tiny_model` can make a random one."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Make a tiny model with random weights, in evaluation mode.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights; the global random state is left as it was.
        dtype: dtype of the weights.
        **overrides: Fields of the configuration.

    Returns:
        The causal language model: 3 layers, 6 query heads over 2 KV heads of 16, vocabulary 128.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"Expected one of {FAMILIES}, got {family!r}.")
    fields = {
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
    config = AutoConfig.for_model(family, **(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
