"""Continuous batching of a model that two processes share: tokens and gates are those of `generate` in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import PROMPTS, alone, counts, finished, policy, running

import patchattn
from patchattn.testing import tiny_model

SERVED = ("llama", "qwen3", "gpt_oss")
REFUSED = ("gpt_neox", "olmo2")
"""Families for which the engine makes pages of other heads than a process holds."""

RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from test_serving_parallel import REFUSED, SERVED, served

transformers.utils.logging.disable_progress_bar()
for family in (*SERVED, *REFUSED):
    model = transformers.AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32, tp_plan="auto").eval()
    # One write: lines of ranks must not mix.
    os.write(1, f"RESULT {family} {os.environ['RANK']} {json.dumps(served(model))}\\n".encode())
torch.distributed.destroy_process_group()
"""


def served(model):
    """What a process sees of served requests: tokens, if it gets any, and whether gates are those of `generate`."""
    with patchattn.patch(model, policy(), backend="blockwise") as handle:
        want = [alone(model, each) for each in PROMPTS]
        wanted, got = counts(handle), None
        handle.reset_report()
        try:
            with running(model, hard_stop=False) as manager:
                names = [manager.add_request(each) for each in PROMPTS]
                if manager.is_tp_driver:
                    found = finished(manager, set(names))
                    got = [found[name].generated_tokens for name in names]
        except patchattn.UnsupportedCallError as error:
            return {"refused": str(error)}
        opened = handle.report().open_fraction()
        return {"want": want, "got": got, "same gates": counts(handle) == wanted, "open": opened}


@pytest.mark.slow
def test_two_processes_serve_the_tokens_of_one(tmp_path):
    for family in (*SERVED, *REFUSED):
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
    for family in SERVED:
        first, second = results[family, 0], results[family, 1]
        model = tiny_model(family)
        with patchattn.patch(model, policy(), backend="blockwise"):
            assert first["want"] == second["want"] == [alone(model, each) for each in PROMPTS]
        assert first["got"] == first["want"]
        assert second["got"] is None  # requests go in and come out at the first process
        for each in (first, second):
            assert each["same gates"]
            assert 0.05 < each["open"] < 0.95
    for family in REFUSED:
        for rank in range(2):
            assert "tensor parallelism cuts those of this model" in results[family, rank]["refused"]
