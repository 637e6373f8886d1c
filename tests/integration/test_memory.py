"""Peak memory of a patched one-layer model grows linearly with the prompt."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch, patchattn
from patchattn.testing import tiny_model
length, backend = int(sys.argv[1]), sys.argv[2]
model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=32768)
policy = patchattn.Policy(sink_size=4, window_size=128, min_bulk=0, gate=patchattn.MomentGate(threshold=0.3))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

with torch.no_grad(), patchattn.patch(model, policy, backend=backend) as handle:
    model.model(torch.ones(1, 600, dtype=torch.long))
    before = peak()
    ids = torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(0))
    model.model(ids, use_cache=True)
fraction = handle.report().open_fraction()
assert 0.0 < fraction < 1.0, fraction
print(peak() - before)
"""


def growth(length, backend):
    """Growth of the peak resident memory in MiB, in a process of its own with few allocator arenas."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(length), backend],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_of_blockwise_is_linear():
    short, long = growth(4096, "blockwise"), growth(16384, "blockwise")
    # The scores of one layer alone would take 6 * 16384^2 * 4 bytes = 6 GiB.
    assert long < 512
    # Four times the tokens: linear growth, with half as much again for what the allocator keeps.
    assert long <= 6 * max(short, 16)
