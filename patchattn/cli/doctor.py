"""`patchattn doctor`: what is installed, what it runs on, and which backends give the right numbers here."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from json import dumps
from typing import get_args

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from patchattn import backends
from patchattn.backends import BackendName
from patchattn.backends.self_check import self_check
from patchattn.cli.gpus import Machine
from patchattn.cli.options import Json
from patchattn.errors import BackendError
from patchattn.version import VERSION

_PACKAGES = ("patchattn", "torch", "transformers", "safetensors", "huggingface-hub", "pydantic")
_OPTIONAL_PACKAGES = ("typer", "rich", "matplotlib")
_DTYPES = (torch.float32, torch.bfloat16)
# Head dimension, and query heads to a KV head: what most models of today have, then others.
_HEADS = (64, 4)
_OTHER_HEADS = ((128, 8), (256, 2), (80, 1), (96, 7))


@dataclass(frozen=True)
class Check:
    """The self-check of one backend for one dtype on one device.

    Args:
        device: The device.
        backend: The backend.
        dtype: The dtype, without `torch.`.
        head_dim: Dimension of queries, keys and values.
        group_size: Query heads to a KV head.
        chosen: Whether `auto` means this backend on this device.
        error_share: Largest error as a share of the error budget; None if the check failed.
        problem: Why the check failed; None if it did not.
    """

    device: str
    backend: str
    dtype: str
    head_dim: int
    group_size: int
    chosen: bool
    error_share: float | None
    problem: str | None

    @property
    def matters(self) -> bool:
        """Whether most models would be refused if it failed."""
        common = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
        return self.chosen and (self.head_dim, self.group_size) == _HEADS and self.dtype in common


def doctor(*, json: Json = False) -> None:
    """Say what works on this machine: versions, devices, and every backend checked against the reference.

    The exit code is 0 if the backend that `auto` chooses on every device gives the right numbers, and 1 if not. A
    backend that is not chosen may fail without harm. Compiling `flex` can take a minute.

    **Examples**

    - `patchattn doctor`: tables for reading
    - `patchattn doctor --json`: the same for a bug report
    """
    console = Console()
    versions = {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL_PACKAGES)}
    devices, hints = _devices(), list(Machine.found().hints())
    with Console(stderr=True).status("checking backends; compiling can take a minute"):
        checks = [check for device in devices for check in checks_of(device)]
    healthy = all(versions[name] for name in _PACKAGES) and not any(c.matters and c.problem for c in checks)
    if json:
        found = {"healthy": healthy, "python": platform.python_version(), "versions": versions, "devices": devices}
        found["hints"] = hints
        console.print_json(dumps({**found, "checks": [asdict(check) for check in checks]}))
    else:
        _print(console, versions, devices, checks, healthy=healthy)
        for hint in hints:
            console.print(hint, markup=False)
    raise typer.Exit(0 if healthy else 1)


def _version(package: str) -> str | None:
    if package == "patchattn":
        return VERSION
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    """Return each device torch can use and what it is."""
    threads = torch.get_num_threads()
    found = {"cpu": f"{threads} {'thread' if threads == 1 else 'threads'}, {torch.backends.cpu.get_cpu_capability()}"}
    found |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def checks_of(device: str) -> Iterator[Check]:
    """Check every backend on common heads, and the one that `auto` chooses on others too."""
    chosen = backends.resolve("auto", torch.device(device))
    for backend in get_args(BackendName):
        for dtype in _DTYPES:
            yield _check(device, backend, dtype, _HEADS, chosen=backend == chosen)
    yield _check(device, chosen, torch.float16, _HEADS, chosen=True)
    for heads in _OTHER_HEADS:
        yield _check(device, chosen, torch.bfloat16, heads, chosen=True)


def _check(device: str, backend: BackendName, dtype: torch.dtype, heads: tuple[int, int], *, chosen: bool) -> Check:
    share, problem = None, None
    dim, group = heads
    try:
        share = self_check(backend, dtype=dtype, head_dim=dim, group_size=group, device=torch.device(device))
    except BackendError as error:
        problem = error.message
    return Check(device, backend, str(dtype).removeprefix("torch."), dim, group, chosen, share, problem)


def _print(
    console: Console, versions: dict[str, str | None], devices: dict[str, str], checks: list[Check], *, healthy: bool
) -> None:
    packages = Table("package", "version", box=box.SIMPLE_HEAD, pad_edge=False)
    packages.add_row("python", platform.python_version())
    for name, version in versions.items():
        missing = "[red]missing[/]" if name in _PACKAGES else "not installed (optional)"
        packages.add_row(name, version or missing)
    hardware = Table("device", "what it is", "auto chooses", box=box.SIMPLE_HEAD, pad_edge=False)
    for device, description in devices.items():
        hardware.add_row(device, description, backends.resolve("auto", torch.device(device)))
    table = Table("device", "backend", "dtype", "heads", "self-check", box=box.SIMPLE_HEAD, pad_edge=False)
    for check in checks:
        name = f"{check.backend} [dim](auto)[/]" if check.chosen else check.backend
        result = "[red]failed[/]" if check.problem else "[green]ok[/]"
        if check.error_share:
            result += f", error {check.error_share:.0%} of budget"
        table.add_row(check.device, name, check.dtype, f"{check.group_size} of {check.head_dim}", result)
    for part in (packages, hardware, table):
        console.print(part)
    console.print(
        "Heads: query heads that share a KV head, and their dimension. A model whose dtype or heads fail is refused "
        'by patchattn.patch, with the reason; nothing is swapped in silence. backend="reference" takes any.',
        style="dim",
        highlight=False,
    )
    for check in checks:
        if check.problem:
            console.print(f"{check.backend} on {check.device}, {check.dtype}: {check.problem}", markup=False)
    if healthy:
        console.print("[bold green]Healthy:[/] what auto chooses works on every device.")
    else:
        console.print("[bold red]Not healthy:[/] a package is missing, or a backend that auto chooses does not work.")
