"""What keeps `patchattn` from using a GPU, and what to do about it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

LEAST_CAPABILITY = (8, 0)
"""From which on a card has bfloat16 matrix units, which the kernels of FlexAttention need."""
_LEAST_FREE = 2 * 2**30


@dataclass(frozen=True)
class Gpu:
    """A card that torch can use.

    Args:
        name: What it calls itself.
        capability: Its compute capability.
        free: Bytes of its memory that are free.
        total: Bytes of its memory.
    """

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True)
class Machine:
    """What there is to run on a GPU with.

    Args:
        gpus: The cards that torch can use.
        built_for: Version of CUDA that torch is built for; None for a build without.
        has_card: Whether the system has an NVIDIA card, whatever torch says.
        has_triton: Whether Triton is installed.
        refusal: What torch says where it is built for CUDA and finds no card; empty otherwise.
    """

    gpus: list[Gpu]
    built_for: str | None
    has_card: bool
    has_triton: bool
    refusal: str = ""

    @classmethod
    def found(cls) -> Machine:
        """Look at this one."""
        built_for = None if torch.version.hip else torch.version.cuda
        gpus, refusal = [], ""
        if built_for is not None:
            try:
                torch.cuda.init()
                gpus = [_look_at(device) for device in range(torch.cuda.device_count())]
            except (RuntimeError, AssertionError) as error:
                refusal = str(error).strip().split("\n", 1)[0]
        has_card = shutil.which("nvidia-smi") is not None
        return cls(gpus, built_for, has_card, find_spec("triton") is not None, refusal)

    def hints(self) -> Iterator[str]:
        """Say what is in the way of GPUs, and what to do; nothing where there is no card."""
        if self.has_card and self.built_for is None:
            yield (
                "This machine has an NVIDIA card, but torch is built without CUDA, so that everything runs on the CPU: "
                "install torch as https://pytorch.org/get-started/locally says."
            )
        elif self.has_card and not self.gpus:
            reason = f" ({self.refusal})" if self.refusal else ""
            yield (
                f"torch is built for CUDA {self.built_for} and finds no card{reason}: unless CUDA_VISIBLE_DEVICES "
                "hides it, update the driver, or install a torch that is built for an older CUDA."
            )
        if self.gpus and not self.has_triton:
            yield 'Triton is missing, with which flex is compiled: pip install triton, or use backend="blockwise".'
        for at, gpu in enumerate(self.gpus):
            if gpu.capability < LEAST_CAPABILITY:
                have, least = (".".join(map(str, numbers)) for numbers in (gpu.capability, LEAST_CAPABILITY))
                yield (
                    f"cuda:{at}, {gpu.name}, has compute capability {have}, and flex is made for {least} and later: "
                    'patch with backend="blockwise", which any card runs.'
                )
            if gpu.free < _LEAST_FREE:
                free, total = (f"{size / 2**30:.1f}" for size in (gpu.free, gpu.total))
                yield (
                    f"cuda:{at}, {gpu.name}, has {free} of {total} GiB free: end what else uses it (nvidia-smi lists "
                    "that), or take another card with CUDA_VISIBLE_DEVICES."
                )


def _look_at(device: int) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    try:
        free = torch.cuda.mem_get_info(device)[0]
    except RuntimeError:  # so full that there is no room to ask
        free = 0
    return Gpu(properties.name, (properties.major, properties.minor), free, properties.total_memory)
