"""Every error the library raises: what was expected, what came, and what to do.

Each class carries a stable `code`, listed in `docs/reference/errors.md`, and also inherits the builtin exception a
caller would expect for that kind of mistake.
"""

from __future__ import annotations


class PatchAttnError(Exception):
    """Base of all errors of this library.

    Args:
        message: What was expected and what came.
        fix: What to do about it; printed on a line of its own.
    """

    code = "patchattn"

    def __init__(self, message: str, *, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(message, fix)

    def __str__(self) -> str:
        """Return the message, the fix and the code."""
        fix = f"\n  Fix: {self.fix}" if self.fix else ""
        return f"{self.message}{fix}\n  Code: {self.code}"

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fix when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.message, self.fix))


def _rebuild(kind: type[PatchAttnError], message: str, fix: str) -> PatchAttnError:
    return kind(message, fix=fix)


class PolicyError(PatchAttnError, ValueError):
    """A valid policy that does not fit the model it is applied to."""

    code = "policy"


class UnsupportedModelError(PatchAttnError, TypeError):
    """A model whose attention the library can't take over without being silently wrong."""

    code = "unsupported-model"


class UnsupportedCallError(PatchAttnError, RuntimeError):
    """A call on a patched model that asks for something the gated path can't give."""

    code = "unsupported-call"


class PatchStateError(PatchAttnError, RuntimeError):
    """Patching twice, unpatching what was never patched, or a patch changed behind the library's back."""

    code = "patch-state"


class BackendError(PatchAttnError, RuntimeError):
    """A backend that is not available here, disagrees with the reference, or can't be compiled any further."""

    code = "backend"


class ShapeError(PatchAttnError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""

    code = "shape"


class CalibrationError(PatchAttnError, ValueError):
    """A calibration that can't be measured, read, written or used."""

    code = "calibration"


class CalibrationMismatchError(CalibrationError):
    """A calibration of another model, or of another sink or window."""

    code = "calibration-mismatch"


class CalibrationFormatError(CalibrationError):
    """A file that is not a calibration, or is damaged."""

    code = "calibration-format"


class CalibrationNotFoundError(CalibrationError):
    """A folder, repository, revision or file that does not exist or may not be seen."""

    code = "calibration-not-found"


class CalibrationHubError(CalibrationError):
    """A hub that can't be reached, answers with an error, or breaks off."""

    code = "calibration-hub"


class ReportError(PatchAttnError, ValueError):
    """A report that holds nothing of what is asked of it, a text that does not fit it, or a bad path."""

    code = "report"


class MissingPackageError(PatchAttnError, ImportError):
    """An optional package that is not installed."""

    code = "missing-package"
