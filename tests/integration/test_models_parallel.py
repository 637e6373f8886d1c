"""Tensor parallel families: two processes write the tokens of one, and each holds the heads that are its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from matrix import MIXED, TENSOR_PARALLEL, policy

import patchattn
from patchattn import StaticGate
from patchattn.testing import tiny_model

STATIC = StaticGate(open_heads=((2, 1), (2, 4)))
GATHERED = ("olmo2", "gpt_oss", "deepseek_v3")
"""Families whose plan in transformers gives every process all heads."""

RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from test_models_parallel import TENSOR_PARALLEL, runs

transformers.utils.logging.disable_progress_bar()
for family in TENSOR_PARALLEL:
    model = transformers.AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32, tp_plan="auto").eval()
    # One write: lines of ranks must not mix.
    os.write(1, f"RESULT {family} {os.environ['RANK']} {json.dumps(runs(model))}\\n".encode())
torch.distributed.destroy_process_group()
"""


def runs(model):
    """Tokens and open fractions of the last layer's heads, for a gate that decides and one that names its heads."""
    ids = torch.randint(2, 120, (1, 200), generator=torch.Generator().manual_seed(0))
    results = []
    for gate in (MIXED, STATIC):
        with patchattn.patch(model, policy(gate)) as handle:
            tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        results.append((tokens.tolist(), handle.report().head_open_fractions("prefill")[2]))
    return results


@pytest.mark.slow
def test_two_processes_write_the_tokens_of_one(tmp_path):
    for family in TENSOR_PARALLEL:
        tiny_model(family).save_pretrained(tmp_path / family)
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "rank.py", str(Path(__file__).parent)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = {}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            _, family, rank, result = line.split(" ", 3)
            results[family, int(rank)] = json.loads(result)
    for family in TENSOR_PARALLEL:
        for number, (tokens, heads) in enumerate(json.loads(json.dumps(runs(tiny_model(family))))):
            (first, here), (second, there) = results[family, 0][number], results[family, 1][number]
            assert first == second == tokens
            assert heads == (here if family in GATHERED else here + there)
            assert 0 < sum(heads) < len(heads)
