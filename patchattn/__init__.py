"""Attention heads that decide, query by query, whether they need the long context.

`patchattn.patch(model)` takes over the attention of a Hugging Face causal language model; `patchattn.unpatch(model)`
gives it back. Importing the package has no side effects and does not import transformers.
"""

from patchattn.calibration.calibration import Calibration
from patchattn.errors import (
    BackendError,
    CalibrationError,
    CalibrationFormatError,
    CalibrationHubError,
    CalibrationMismatchError,
    CalibrationNotFoundError,
    PatchAttnError,
    PatchStateError,
    PolicyError,
    ShapeError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from patchattn.gates import ClosedGate, MomentGate, OpenGate, OracleGate, StaticGate
from patchattn.gates.thresholds import KLTarget, OpenFractionTarget, RiskTarget
from patchattn.hf.drafting import draft
from patchattn.hf.patching import PatchHandle, is_patched, patch, unpatch
from patchattn.hf.support import Supported, Unsupported, check_support
from patchattn.measuring.collect import calibrate
from patchattn.policy import MinBulk, Policy
from patchattn.report import GateReport
from patchattn.version import VERSION

__version__ = VERSION

__all__ = [
    "BackendError",
    "Calibration",
    "CalibrationError",
    "CalibrationFormatError",
    "CalibrationHubError",
    "CalibrationMismatchError",
    "CalibrationNotFoundError",
    "ClosedGate",
    "GateReport",
    "KLTarget",
    "MinBulk",
    "MomentGate",
    "OpenFractionTarget",
    "OpenGate",
    "OracleGate",
    "PatchAttnError",
    "PatchHandle",
    "PatchStateError",
    "Policy",
    "PolicyError",
    "RiskTarget",
    "ShapeError",
    "StaticGate",
    "Supported",
    "Unsupported",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "calibrate",
    "check_support",
    "draft",
    "is_patched",
    "patch",
    "unpatch",
]
