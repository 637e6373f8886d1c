"""Where gates are compared: models with their tasks, lengths and windows."""

from __future__ import annotations

from typing import NamedTuple

from studies.quality.cases import DRAWN
from studies.quality.documents import OF_REAL, OF_SHIPPED

DRAWN_BY = {"SmolLM2-135M": OF_REAL, "shipped": OF_SHIPPED}
TASKS = {name: tuple(tasks) for name, tasks in DRAWN_BY.items()}
DOCUMENTS = {"SmolLM2-135M": 2, "shipped": 4}
"""Documents of each task."""


class Place(NamedTuple):
    """A model at a length, of context and what is appended together, and a window; tokens."""

    model: str
    length: int
    window: int


PLACES = [
    Place("SmolLM2-135M", 8192, 2048),
    Place("SmolLM2-135M", 8192, 1024),
    Place("SmolLM2-135M", 4096, 256),
    Place("shipped", 4096, 256),
    Place("SmolLM2-135M", 4096, 1024),
    Place("SmolLM2-135M", 4096, 2048),
    Place("shipped", 4096, 1024),
    Place("SmolLM2-135M", 8192, 256),
]
WHOLE = PLACES[1:4]
"""Where every gate is measured; elsewhere those of `SHORT` are, which say what the window and the length change."""

SHORT = (
    ("all closed", ""),
    ("guarded", "0.6"),
    ("log-normal", "0.6"),
    ("log-normal", "0.7"),
    ("log-normal", "0.8"),
    ("static, answering", "30% of heads"),
    ("risk, each head", "0.05"),
    ("budget", "20%"),
)
AT_DEFAULT = (
    ("static, answering", "15% of heads"),
    ("static, by mass", "30% of heads"),
    ("static, other task", "30% of heads"),
    (DRAWN, "30% of heads"),
)
"""What is measured with the default window besides `SHORT`, for what it says of static heads is another thing."""
