"""What commands say about policies."""

from __future__ import annotations

from patchattn.policy import Policy


def in_words(policy: Policy) -> str:
    """Return a line about a policy."""
    gate = ", ".join(f"{key} {value}" for key, value in policy.gate.model_dump().items() if key != "open_heads")
    return f"Policy: sink {policy.sink_size}, window {policy.window_size}, gate {gate.removeprefix('kind ')}."
