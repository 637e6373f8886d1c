"""Measured thresholds with a guarantee: measure a model once, publish the file, ask it for a risk or a budget.

Nothing here runs a model: `patchattn.measuring` does.
"""

from patchattn.calibration.calibration import Calibration
from patchattn.calibration.findings import Expected
from patchattn.calibration.manifest import Corpus, Fingerprint, Manifest, Rotary

__all__ = ["Calibration", "Corpus", "Expected", "Fingerprint", "Manifest", "Rotary"]
