"""Long-range tasks, scores, and tables made from them: `evaluate` measures a model on all of it."""

from patchattn.evaluation.cells import Cell
from patchattn.evaluation.documents import DocumentError
from patchattn.evaluation.material import Material
from patchattn.evaluation.policies import Drafts, named_policy
from patchattn.evaluation.results import Evaluation
from patchattn.evaluation.runner import evaluate
from patchattn.evaluation.sample import Sample
from patchattn.evaluation.tasks import GROUPS, TASKS, make_sample

__all__ = [
    "GROUPS",
    "TASKS",
    "Cell",
    "DocumentError",
    "Drafts",
    "Evaluation",
    "Material",
    "Sample",
    "evaluate",
    "make_sample",
    "named_policy",
]
