"""Peak memory of a patched one-layer model grows linearly with the prompt."""

import os
import subprocess
import sys

import pytest
import torch

SETUP = """
import resource, sys, torch, patchattn
from patchattn.testing import assert_within_budget, recorded_gates, replay_gates, tiny_model

backend, lengths = sys.argv[1], [int(length) for length in sys.argv[2:]]
model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=32768)
policy = patchattn.Policy(sink_size=4, window_size=128, min_bulk=0, gate=patchattn.MomentGate(threshold=0.3))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def tokens(length):
    return torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(0))

def run(length):
    with torch.no_grad():
        return model.model(tokens(length), use_cache=True).last_hidden_state
"""

GROWTH = """
with patchattn.patch(model, policy, backend=backend) as handle:
    run(600)
    before = peak()
    for length in lengths:
        run(length)
        print(peak() - before)
fraction = handle.report().open_fraction()
assert 0.0 < fraction < 1.0, fraction
"""

EQUAL = """
with patchattn.patch(model, policy, backend=backend, record="timeline") as handle:
    got = run(1000)
gates, report = recorded_gates(handle), handle.report()
assert report.backend == backend and not any(report.dense_calls.values())
assert 0.0 < report.open_fraction() < 1.0
results = []
for dtype in (torch.float32, torch.float64):
    with patchattn.patch(model.to(dtype), policy, backend="reference") as handle:
        replay_gates(handle, gates)
        results.append(run(1000))
assert_within_budget(got, *results)
"""


CALL = """
from patchattn.backends.blockwise import attend
from patchattn.gates.decision import forced
from patchattn.call.inputs import AttentionInputs
from patchattn.call.regions import Regions

softcap, (length,) = {"softcap": 30.0, "holes": None}[backend], lengths
valid = torch.ones(1, length, dtype=torch.bool)
if backend == "holes":
    valid[:, 600:650] = False
query, key = torch.randn(1, 4, length, 16), torch.randn(1, 1, length, 16)
regions = Regions.of(valid, query_length=length, sink_size=4, window_size=128)
inputs = AttentionInputs(query, key, key, regions, 0.25, softcap)
mass = forced(torch.rand(1, 4, length) < 0.5, inputs)
with torch.no_grad():
    before = peak()
    attend(inputs, mass, 0.0)
    print(peak() - before)
"""


def run_alone(code, backend, *lengths):
    """Run in a process with few allocator arenas; returns the numbers it printed."""
    environment = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, backend, *map(str, lengths)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow
def test_memory_of_blockwise_is_linear():
    (short,), (long,) = (run_alone(SETUP + GROWTH, "blockwise", length) for length in (4096, 16384))
    # The scores of one layer alone would take 6 * 16384^2 * 4 bytes = 6 GiB.
    assert long < 512
    # Four times the tokens: linear growth, with half as much again for what the allocator keeps.
    assert long <= 6 * max(short, 16)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["softcap", "holes"])
def test_memory_of_calls_with_masks_and_products_is_linear(case):
    (grown,) = run_alone(SETUP + CALL, case, 16384)
    # A slab of open rows times their keys would take 8192 * 12288 * 4 bytes = 384 MiB.
    assert grown < 160


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="CPU FlexAttention crashed in this test with torch 2.11")
def test_memory_of_flex_is_linear_and_its_answers_equal_the_reference():
    # One process, because compiling takes longest. The memory of the compiler is counted too.
    short, long = run_alone(SETUP + GROWTH + EQUAL, "flex", 4096, 16384)
    assert long < 512
    assert long <= 6 * max(short, 16)
