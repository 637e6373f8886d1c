"""The processes that `torchrun` started for one command: which one this is, and which device is its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from patchattn.cli.problems import stop


@dataclass(frozen=True)
class Process:
    """One of the processes of a command.

    Args:
        rank: Its number; 0 prints and saves.
        device: Where its copy of the model belongs.
    """

    rank: int
    device: str


def rank() -> int:
    """Return the number of this process before the others are joined; 0 without `torchrun`."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the other processes where `torchrun` started several; they part again at the end.

    Args:
        device: What the user asked for; `cuda` means one GPU for each process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Process(0, device)
        return
    kind, _, index = device.partition(":")
    if index:
        raise stop(
            f"{world} processes were started, and --device {device} would put all of them on one device.",
            fix=f"Use --device {kind}, which gives each process its own.",
        )
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "accelerate":
            raise
        raise stop(
            f"{world} processes were started, and sharing the work needs the package accelerate.",
            fix='pip install "patchattn[parallel]"',
        ) from None
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if kind == "cuda" and gpus and local >= gpus:
        raise stop(
            f"Process {local} of this machine has no GPU of its own: there are {gpus}.",
            fix=f"Start at most {gpus} processes: torchrun --nproc-per-node {gpus}.",
        )
    state = PartialState(cpu=kind == "cpu")
    own = state.device or torch.device("cpu")
    # Without any GPU the state is on the CPU; what was asked for is then refused where the model is moved.
    yield Process(state.process_index, str(own) if own.type == kind else device)
    # Not after a failure: the others may wait for this process, and `torchrun` ends them. Threads of gloo go on after
    # this, and one that holds a tensor when Python ends aborts the process: so none ends while another is at work.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
