"""A faked H100, for all tests marked `cuda`."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def h100(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fake an H100 for the rest of the process. The tests were asked for, so that a missing Triton is an error."""
    if importlib.util.find_spec("triton") is None:
        pytest.fail("-m cuda compiles with Triton: pip install -c tests/constraints.txt triton")
    folder = tmp_path_factory.mktemp("kernels")
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = str(folder), str(folder / "triton")
    with warnings.catch_warnings():
        # Importing Inductor compiles a function, at which torch 2.13 warns about itself.
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        from faked import pretend_h100

        pretend_h100()
    logging.getLogger("torch.__trace").disabled = True  # pytest would format and keep every line
