"""Measured thresholds with a guarantee: measure a model once, publish the file, ask it for a risk or a budget.

`collect` runs the model; everything else knows only the file.
"""

from patchattn.calibration.calibration import Calibration, Expected
from patchattn.calibration.manifest import Corpus, Fingerprint, Manifest, Rotary

__all__ = ["Calibration", "Corpus", "Expected", "Fingerprint", "Manifest", "Rotary"]
