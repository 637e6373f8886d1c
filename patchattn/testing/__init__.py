"""Help for tests, the library's own and its users': tiny models, the error budget, recording and replaying gates."""

from patchattn.testing.budget import assert_within_budget
from patchattn.testing.models import FAMILIES, tiny_model
from patchattn.testing.replay import gates_of_chunks, recorded_gates, replay_gates

__all__ = [
    "FAMILIES",
    "assert_within_budget",
    "gates_of_chunks",
    "recorded_gates",
    "replay_gates",
    "tiny_model",
]
