"""Tensor parallel families: two processes write the tokens of one, and each holds the heads that are its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from matrix import MIXED, TENSOR_PARALLEL, policy
from ranks import of_families

import patchattn
from patchattn import StaticGate
from patchattn.testing import tiny_model

STATIC = StaticGate(open_heads=((2, 1), (2, 4)))
GATHERED = ("olmo2", "gpt_oss", "deepseek_v3")
"""Families whose plan in transformers gives every process all heads."""


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
    results = of_families(tmp_path, "test_models_parallel", "runs", TENSOR_PARALLEL)
    for family in TENSOR_PARALLEL:
        for number, (tokens, heads) in enumerate(json.loads(json.dumps(runs(tiny_model(family))))):
            (first, here), (second, there) = results[family, 0][number], results[family, 1][number]
            assert first == second == tokens
            assert heads == (here if family in GATHERED else here + there)
            assert 0 < sum(heads) < len(heads)
