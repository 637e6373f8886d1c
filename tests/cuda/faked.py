"""A machine that looks as if it had an H100: enough for Dynamo, Inductor and Triton to compile for one.

Real are tracing, lowering, scheduling with the configurations of an H100, and Triton down to machine code for sm_90a.
Nothing is loaded, launched or timed: tensors are fake, with shape, dtype and the device "cuda", but no data. The CPU
build of torch and the wheel of triton are enough.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

SHARED_MEMORY = 227 * 1024  # bytes that a block may have on sm_90
_MULTIPROCESSORS = 132
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=_MULTIPROCESSORS,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=SHARED_MEMORY,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
_CUDA: dict[str, Callable[..., Any]] = {  # of torch.cuda
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: _PROPERTIES.name,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "_lazy_init": lambda: None,
}
# Indexing and copying set the device, which the CPU build can't and the CUDA build does not without a driver.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &guard);
"""


class _Driver:
    """A driver of Triton that only knows its target."""

    def __init__(self) -> None:
        facts = {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": _MULTIPROCESSORS, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device=0: facts)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def fake_mode() -> FakeTensorMode:
    """Tensors made under it are fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def pretend_h100() -> None:
    """Let torch, Inductor and Triton believe in an H100, for the rest of the process."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._subclasses import fake_tensor

    _trace_patterns()
    _load_guard()
    for name, answer in _CUDA.items():
        setattr(torch.cuda, name, answer)
        if hasattr(device_interface.CudaInterface, name):  # it keeps the functions it was made with
            setattr(device_interface.CudaInterface, name, staticmethod(answer))
    torch.version.cuda = torch.version.cuda or "13.0"
    torch._C._cuda_getCurrentRawStream = lambda device=0: 0
    torch._C._cuda_cudaCachingAllocator_is_enabled = lambda: True
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: False
    torch.accelerator.is_available = lambda: False  # else Dynamo asks for the current stream
    fake_tensor.init_gpu_context = lambda *device: None
    triton.runtime.driver.set_active(_Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    # Kernels are compiled, never loaded.
    triton_heuristics.CachingAutotuner._make_launchers = lambda self: None
    triton_heuristics.CachingAutotuner._dynamic_scale_rblock = lambda self: None

    config = torch._inductor.config
    config.compile_threads = 1
    config.force_disable_caches = True  # a warm cache would hide what does not compile any more
    config.joint_graph_constant_folding = False  # it computes the constants on their device
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if name in config._config:
            setattr(config, name, False)


def _load_guard() -> None:
    """Give CUDA a device guard that does nothing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        command = [get_cpp_compiler(), "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))


def _trace_patterns() -> None:
    """Let Inductor trace its patterns on the CPU: on a CUDA device it would make real tensors for that."""
    from torch._inductor.fx_passes import fuse_attention, joint_graph, post_grad
    from torch.utils import _triton

    fuse_attention._sfdp_init = lambda input_device=None: None  # 12 s for what the backend does not contain
    for module in (joint_graph, post_grad):
        module.lazy_init(torch.device("cpu"))
        module.lazy_init = lambda input_device=None: None
    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
