"""Two processes of one program that know of each other, for tests of tensor parallelism."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from patchattn.testing import tiny_model

RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from {module} import {see}

transformers.utils.logging.disable_progress_bar()
for family in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32, tp_plan="auto").eval()
    # One write: lines of ranks must not mix.
    os.write(1, f"RESULT {{family}} {{os.environ['RANK']}} {{json.dumps({see}(model))}}\\n".encode())
# On a CPU this stops no thread of gloo's, and one that still held a tensor when Python ends would abort the process.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_on_two(folder: Path, *arguments: str, timeout: int = 280) -> list[str]:
    """Run `rank.py` of a folder, in it, in two processes; returns the lines that begin with RESULT, without that."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "rank.py", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def of_families(folder: Path, module: str, see: str, families: tuple[str, ...]) -> dict[tuple[str, int], Any]:
    """Return what a function of a test module sees of a tiny model of each family that two processes share.

    Args:
        folder: An empty folder.
        module: Name of the test module, beside this one.
        see: Name of the function; it takes the model and returns what can be written as JSON.
        families: The families.

    Returns:
        By family and rank.
    """
    for family in families:
        tiny_model(family).save_pretrained(folder / family)
    (folder / "rank.py").write_text(RANK.format(module=module, see=see))
    lines = run_on_two(folder, str(Path(__file__).parent), *families)
    parts = (line.split(" ", 2) for line in lines)
    return {(family, int(rank)): json.loads(result) for family, rank, result in parts}
