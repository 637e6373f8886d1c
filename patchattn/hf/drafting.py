"""`draft`: closed heads draft, dense attention verifies."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch

from patchattn.calibration.calibration import Calibration
from patchattn.errors import PolicyError, UnsupportedModelError
from patchattn.gates import ClosedGate
from patchattn.hf.architecture import text_config, underlying, with_cache
from patchattn.hf.candidates import Drafting, Prefill
from patchattn.hf.patching import PatchHandle, patch
from patchattn.hf.weights import input_device
from patchattn.policy import Policy

_MOST_TOKENS = 64
# Half of a policy's own window: of real texts the same share of tokens is kept, and a step reads less.
_WINDOW = 1024


def draft(
    model: Any,
    policy: Policy | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    backend: str = "auto",
    tokens: Any = "auto",
    prefill: Prefill = "dense",
) -> PatchHandle:
    """Make a model write the text of dense attention in fewer dense steps: its heads draft, dense attention verifies.

    In place, and undone like `patch`. Ordinary calls of the model are dense. `model.generate(...)`, greedy or sampling,
    drafts some tokens through the gates and checks them in one dense call, which keeps those that dense attention would
    have written: the text is that of the model without the patch, up to rounding where two tokens are level, and a
    sampled one has its distribution. Nothing is copied: drafts use the cache of the call, and what they wrote there is
    taken out before the dense call.

    Args:
        model: A model that `patch` takes, with a `generate`.
        policy: Which heads read the far keys in a draft; None means the policy of the calibration, or without one that
            all heads are closed, with a window of 1,024. No policy changes the text, only how fast it comes.
        calibration: See `patch`.
        backend: See `patch`.
        tokens: Tokens of a draft, 1 to 64. `"auto"` adapts the number to what was accepted and to the time it took, and
            drafts nothing where that does not pay.
        prefill: `"dense"`, or `"gated"` to read the prompt through the gates. The text is then that of a model that
            read its prompt so, not that of the dense model.

    Returns:
        The handle to undo the patch and to read the report, which says what was accepted.

    Raises:
        UnsupportedModelError: `patch` refuses the model, or its cache can't be cropped, or it can't generate.
        PolicyError: `patch` refuses the policy, or the policy leaves out a phase that is asked for.
        PatchAttnError: Other errors of `patch`.

    Example:
        >>> import patchattn, torch
        >>> from patchattn.testing import tiny_model
        >>> model, text = tiny_model("llama"), torch.arange(1, 100)[None]
        >>> dense = model.generate(text, max_new_tokens=8)
        >>> with patchattn.draft(model, patchattn.Policy(window_size=32, min_bulk=0), tokens=3) as handle:
        ...     drafted = model.generate(text, max_new_tokens=8)
        >>> torch.equal(dense, drafted)
        True
        >>> handle.report().drafts.drafted > 0
        True
    """
    if tokens != "auto" and (
        not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= _MOST_TOKENS
    ):
        raise PolicyError(
            f'Expected tokens="auto" or a number from 1 to {_MOST_TOKENS}, got {tokens!r}.', fix='use tokens="auto"'
        )
    if prefill not in ("dense", "gated"):
        raise PolicyError(f"Unknown prefill {prefill!r}.", fix='use "dense" or "gated"')
    if policy is None and calibration is None:
        policy = Policy(gate=ClosedGate(), phases=frozenset({"decode"}), min_bulk=0, window_size=_WINDOW)
    handle = patch(model, policy, calibration=calibration, backend=backend)
    try:
        _check(handle, prefill)
        drafting = Drafting(underlying(model), None if tokens == "auto" else tokens, prefill)
    except BaseException:
        handle.unpatch()
        raise
    for state in handle.states.values():
        state.drafting = drafting
    return handle


def generate_plainly(
    model: Any, tokens: Sequence[int], cache: Any, count: int, *, stop: Collection[int] = ()
) -> list[int]:
    """Write greedily with the `generate` of a model, and with none of its generation settings.

    Args:
        model: A causal language model, drafting or not.
        tokens: The whole text so far.
        cache: The cache of some first tokens of it; it is filled. None for a new one.
        count: Most tokens to write; at least 1.
        stop: Token ids after which to stop.

    Returns:
        What was written.
    """
    from transformers import GenerationConfig

    ids, model = torch.tensor([list(tokens)], device=input_device(model)), underlying(model)
    settings = model.generation_config
    ends = sorted(stop)
    # What a configuration leaves open, `generate` takes from the one of the model.
    model.generation_config = GenerationConfig(
        max_new_tokens=count, eos_token_id=ends or None, pad_token_id=ends[0] if ends else None
    )
    try:
        asked = {} if cache is None else with_cache(model, cache)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0, ids.shape[1] :].tolist()
    finally:
        model.generation_config = settings


def _check(handle: PatchHandle, prefill: Prefill) -> None:
    """Refuse what `patch` takes and drafting can't have."""
    wanted = {"decode"} | ({"prefill"} if prefill == "gated" else set())
    missing = sorted(wanted - handle.policy.phases)
    if missing:
        raise PolicyError(
            f"Drafting goes through the gates in {' and '.join(sorted(wanted))}; the policy leaves out "
            f"{' and '.join(missing)}.",
            fix="name these in Policy.phases, or leave it as it is"
            + (', or use prefill="dense"' if "prefill" in missing else ""),
        )
    model = underlying(handle.model)
    name = type(model).__name__
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has no generate to draft in.", fix="draft with the model that has the head"
        )
    reason = _why_not_cropped(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason[0]}", fix=reason[1])


def _why_not_cropped(model: Any) -> tuple[str, str] | None:
    """Say why a draft can't be taken out of the model's cache again, and what to do; None if it can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

    layers = DynamicCache(config=text_config(model)).layers
    if getattr(model, "_is_stateful", False) or any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers):
        reason = "has recurrent layers, whose states can't be taken back when a draft is refused."
        return reason, "use patchattn.patch(model)"
    if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers) and not _slides_between_crops():
        reason = "has sliding layers, which this version of transformers can't call twice before a draft is taken back."
        return reason, 'pip install "transformers>=5.23"'
    return None


def _slides_between_crops() -> bool:
    """Say whether a sliding layer that can be cropped still shows a call no more than its window (5.17 shows all)."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer, key = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 1, 1)
    layer.activate_past_recording()
    return max(layer.update(key, key)[0].shape[2] for _ in range(4)) <= 2
