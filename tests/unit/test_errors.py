"""Tests of `patchattn.errors`."""

from __future__ import annotations

import pickle

import pytest

from patchattn import errors
from patchattn.errors import PatchAttnError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PatchAttnError)]
BUILTINS = {
    "PolicyError": ValueError,
    "UnsupportedModelError": TypeError,
    "UnsupportedCallError": RuntimeError,
    "PatchStateError": RuntimeError,
    "BackendError": RuntimeError,
    "ShapeError": ValueError,
    "CalibrationError": ValueError,
    "CalibrationMismatchError": ValueError,
    "CalibrationFormatError": ValueError,
    "CalibrationNotFoundError": ValueError,
    "CalibrationHubError": ValueError,
    "ReportError": ValueError,
    "MissingPackageError": ImportError,
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_message_fix_and_code(kind: type[PatchAttnError]) -> None:
    error = kind("Expected 3, got 4.", fix="pass 3")
    assert str(error).splitlines() == ["Expected 3, got 4.", "  Fix: pass 3", f"  Code: {kind.code}"]
    assert "Fix" not in str(kind("Expected 3, got 4."))


@pytest.mark.parametrize("kind", KINDS)
def test_survives_a_process_boundary(kind: type[PatchAttnError]) -> None:
    error = pickle.loads(pickle.dumps(kind("message", fix="fix")))
    assert (type(error), error.message, error.fix) == (kind, "message", "fix")


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_is_the_builtin_error_one_would_expect(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


def test_every_kind_has_its_builtin_listed_here() -> None:
    assert {kind.__name__ for kind in KINDS} - {"PatchAttnError"} == set(BUILTINS)
