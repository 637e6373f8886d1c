"""Help for tests, the library's own and its users': tiny models, the error budget, recording and replaying gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchattn.hf.patching import PatchHandle

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


def assert_within_budget(got: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """Compare with a float64 truth, allowing twice the error of the plain computation in the same dtype.

    The budget is `2 * (err_of_plain + eps * max|truth|)`, with eps that of `got`'s dtype.

    Args:
        got: What is tested.
        plain: The plain computation in the same dtype.
        truth: The float64 reference.
        what: Name for the message.

    Raises:
        AssertionError: Not finite, or beyond the budget.
    """
    if not torch.isfinite(got).all():
        raise AssertionError(f"{what} is not finite")
    error = (got.double() - truth.double()).abs().max().item()
    plain_error = (plain.double() - truth.double()).abs().max().item()
    budget = 2 * (plain_error + torch.finfo(got.dtype).eps * truth.abs().max().item())
    if error > budget:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain {plain_error:.3e})")


def recorded_gates(handle: PatchHandle) -> dict[int, list[Tensor]]:
    """Return the decisions of a model patched with `record="timeline"`: by layer, [batch, heads, query] per call."""
    return {layer: [opened for _, opened in calls] for layer, calls in handle.report().timeline.items()}


def replay_gates(handle: PatchHandle, gates: dict[int, list[Tensor]]) -> None:
    """Make a patched model repeat recorded decisions, call by call, instead of deciding.

    Args:
        handle: The handle of the patched model; its next gated calls must match the recorded ones.
        gates: As `recorded_gates` returns them.
    """
    for layer, state in handle._states.items():
        state.replay = list(gates[layer])


def gates_of_chunks(gates: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Cut the decisions of one long call into those of consecutive calls of the given lengths."""
    return list(torch.cat(gates, dim=2).split(lengths, dim=2))
