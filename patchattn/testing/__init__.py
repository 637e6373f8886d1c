"""Help for tests, the library's own and its users'.

Prove your own model with `assert_equivalent`; compare within the error budget; record and replay gates; make tiny
models. The hypothesis strategies are in `patchattn.testing.strategies`, the only part that needs hypothesis.
"""

from patchattn.testing.budget import assert_within_budget, error_budget
from patchattn.testing.equivalence import Equivalence, ProvesNothingError, assert_equivalent
from patchattn.testing.models import FAMILIES, tiny_model
from patchattn.testing.replay import gates_of_chunks, recorded_gates, replay_gates

__all__ = [
    "FAMILIES",
    "Equivalence",
    "ProvesNothingError",
    "assert_equivalent",
    "assert_within_budget",
    "error_budget",
    "gates_of_chunks",
    "recorded_gates",
    "replay_gates",
    "tiny_model",
]
