"""The real model, for all tests marked `real`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from real_model import default_folder, is_there


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The folder of the real model. Its tests were asked for by name, so a missing model is an error and not a skip."""
    folder = default_folder()
    if not is_there(folder):
        pytest.fail(f"-m real asks for the real model, and {folder} has none: python recipes/real_model.py fetches it")
    return folder


@pytest.fixture(scope="session")
def real_model(real_folder: Path) -> tuple[Any, Any]:
    """Model in float32, and tokenizer. Tests share them: patch in a `with` block."""
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(real_folder)
