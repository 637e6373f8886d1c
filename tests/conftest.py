"""What holds for all tests: hypothesis profiles, and which markers run where.

`pytest` uses the hypothesis profile `fixed`, the same examples each time; `--hypothesis-profile=seeded
--hypothesis-seed=1` uses others, and `--hypothesis-profile=deep` ten times as many. The files of tests are shared out
over a process for each core; `-n0` runs all in one.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator

# Before torch is imported: the models are tiny, and several processes run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

_common = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", _common, derandomize=True, max_examples=50)
settings.register_profile("seeded", _common, max_examples=50)
settings.register_profile("deep", _common, max_examples=500)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let processes share the tests without a plugin; `recipes/benchmarks/gpu.py` does."""
    parser.addoption("--part", default="1/1", metavar="K/N", help="run each N-th of the chosen tests, from the K-th on")


def pytest_collectstart() -> None:
    """Import what all tests need. The process that only shares out the tests collects none and so starts at once."""
    with warnings.catch_warnings():
        # Where hqq is installed this imports it, and hqq 0.2.8 compiles a function, at which torch 2.13 warns about
        # itself.
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        importlib.import_module("transformers.cache_utils")


@pytest.fixture(scope="session", autouse=True)
def _one_self_check() -> Iterator[None]:
    """Let `patch` try each backend once for each shape in a process: tests patch some thousand models of few shapes.

    Another backend in the place of one is another key; what a check raises is not kept.
    """
    from patchattn.backends import load
    from patchattn.hf import patching

    check = patching.self_check

    @functools.cache
    def once(backend: object, name: str, **shape: object) -> float:
        return check(name, **shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching, "self_check", lambda name, **shape: once(load(name), name, **shape))
        yield


@pytest.fixture
def quick_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out most of what takes longest in a demo: its text, which is tokenised, and rounds of timing."""
    from patchattn import demo
    from patchattn.demo import timing

    for name in ("sample_text", "prose"):
        text = getattr(demo, name)()[:80_000]
        monkeypatch.setattr(demo, name, lambda text=text: text)
    monkeypatch.setattr(timing, "_ENOUGH_SECONDS", 0)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without a CUDA device and `cuda` or `real` where not asked for; keep one part of all."""
    import torch

    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if "cuda" not in config.option.markexpr:
        reasons["cuda"] = "only with -m cuda: makes torch believe in a GPU, for the rest of the process"
    if "real" not in config.option.markexpr:
        reasons["real"] = "only with -m real: needs the real model, which `python recipes/real_model.py` fetches"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # Tests that -m and -k leave out are gone by now.
    part, parts = map(int, config.option.part.split("/"))
    config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % parts != part - 1])
    items[:] = items[part - 1 :: parts]
