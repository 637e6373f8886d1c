"""Continuous batching of a model that two processes share: tokens and gates are those of `generate` in each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import of_families
from serving import PROMPTS, alone, counts, finished, policy, running

import patchattn
from patchattn.testing import tiny_model

SERVED = ("llama", "qwen3", "gpt_oss")
REFUSED = ("gpt_neox", "olmo2")
"""Families for which the engine makes pages of other heads than a process holds."""


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
    results = of_families(tmp_path, "test_serving_parallel", "served", (*SERVED, *REFUSED))
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
