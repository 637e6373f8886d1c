"""What a compilation leaves behind: its graphs, kernels and launches."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import torch
from faked import SHARED_MEMORY, fake_mode

_HOST_READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique", "is_nonzero")


@dataclass(frozen=True)
class Kernel:
    """A compiled Triton kernel, in one of its configurations: what a block and a thread need."""

    shared: int  # bytes
    registers: int
    spilled: int  # bytes

    def __str__(self) -> str:
        return f"{self.shared / 1024:.1f} KiB, {self.registers} registers, {self.spilled} bytes spilled"


@dataclass(frozen=True)
class Graph:
    """A graph of Inductor: what its code launches and allocates."""

    kernels: Counter[str]
    operators: Counter[str]  # that Inductor calls as they are
    waits: list[str]  # operators that wait for the device, symbols that only the device knows
    buffers: dict[str, int]  # numbers of elements, with the sizes of the example

    @property
    def n_pins(self) -> int:
        """Copies that hold a layout."""
        return self.operators["patchattn.flex_pinned"]

    @property
    def n_launches(self) -> int:
        """Launches apart from the pins, a kernel for each operator."""
        return self.kernels.total() + self.operators.total() - self.n_pins


@dataclass
class Compiled:
    """What one case compiled, in how many seconds."""

    graphs: list[Graph] = field(default_factory=list)
    kernels: dict[str, list[Kernel]] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"compiled in {self.seconds:.0f} s"]
        for graph in self.graphs:
            lines.append(f"  {graph.n_launches} launches and {graph.n_pins} pins")
            lines += [f"    {times} x {name}" for name, times in graph.operators.items()]
            for name, times in graph.kernels.items():
                lines.append(f"    {times} x {name}: {' | '.join(map(str, self.kernels.get(name, [])))}")
            largest = sorted(graph.buffers.items(), key=lambda item: -item[1])[:4]
            lines += [f"    {size:,} elements in {name}" for name, size in largest]
        return "\n".join(lines)


@contextlib.contextmanager
def compiling() -> Iterator[Compiled]:
    """Record what is compiled, under a fake mode; the compiled functions return fake tensors."""
    import triton
    from torch._inductor import compile_fx as inductor
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.virtualized import V

    compiled, names = Compiled(), []
    compile_fx, compile_triton, precompile = inductor.compile_fx, triton.compile, CachingAutotuner._precompile_config

    def compile_named(autotuner: Any, config: Any) -> Any:
        names.append(autotuner.inductor_meta.get("kernel_name") or autotuner.fn.__name__)
        try:
            return precompile(autotuner, config)
        finally:
            names.pop()

    def compile_kernel(source: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            binary = compile_triton(source, *args, **kwargs)
        name = names[-1] if names else source.name
        compiled.kernels.setdefault(name, []).append(_kernel(name, binary.metadata.shared, said.getvalue()))
        return binary

    def compile_graph(module: torch.fx.GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        uncompiled = copy.deepcopy(module)
        compile_fx(module, inputs, *args, **kwargs)
        return uncompiled.forward  # under the fake mode: only shapes are computed

    torch.compiler.reset()
    begin = time.perf_counter()
    with (
        mock.patch.object(triton, "compile", compile_kernel),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(CachingAutotuner, "_precompile_config", compile_named),
        mock.patch.object(inductor, "compile_fx", compile_graph),
        mock.patch.object(
            GraphLowering, "save_output_code", staticmethod(lambda code: compiled.graphs.append(_graph(code, V.graph)))
        ),
        fake_mode(),
    ):
        yield compiled
    compiled.seconds = time.perf_counter() - begin


class Expected(Protocol):
    """What a layer's graph launches, and what its kernels may spill."""

    @property
    def launches(self) -> int: ...

    @property
    def pins(self) -> int: ...

    @property
    def most_spilled(self) -> int: ...


def problems(found: Compiled, case: Expected, *, largest: int, once: int) -> list[str]:
    """Say what must not be.

    Args:
        found: A graph for all layers, and one for each.
        case: What the second must be like.
        largest: Elements that no buffer may have.
        once: Launches and pins that the first may have.
    """
    said = [] if len(found.graphs) == 2 else [f"{len(found.graphs)} graphs, not one and one for all layers"]
    *shared, layer = found.graphs
    for graph in found.graphs:
        said += [f"waits for the device: {what}" for what in graph.waits]
        said += [f"as large as queries x keys: {name}" for name, size in graph.buffers.items() if size >= largest]
        said += [f"{name} was not compiled" for name in graph.kernels if name not in found.kernels]
    for_all = sum(graph.n_launches + graph.n_pins for graph in shared)
    said += [f"{for_all} launches and pins for all layers, over {once}"] if for_all > once else []
    if (layer.n_launches, layer.n_pins) != (case.launches, case.pins):
        said.append(f"{layer.n_launches} launches and {layer.n_pins} pins, not {case.launches} and {case.pins}")
    for name, configurations in found.kernels.items():
        # Where there are several, autotuning takes one that fits.
        memory, spilled = (min(getattr(c, what) for c in configurations) for what in ("shared", "spilled"))
        if memory > SHARED_MEMORY:
            said.append(f"{memory} bytes of shared memory in {name}")
        if spilled > case.most_spilled:
            said.append(f"{spilled} bytes spilled in {name}")
    return said


def _kernel(name: str, shared: int, ptxas: str) -> Kernel:
    """Read what ptxas says of a kernel."""
    registers = re.search(r"Used (\d+) registers", ptxas)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    assert registers, f"ptxas says nothing of {name}: {ptxas}"
    assert spilled, f"ptxas says nothing of {name}: {ptxas}"
    return Kernel(shared, int(registers[1]), max(int(spilled[1]), int(spilled[2])))


def _graph(code: str, graph: Any) -> Graph:
    body = code.partition("def call(")[2].partition("\ndef get_args")[0]
    body = body.partition("\ndef benchmark_compiled_module")[0]
    kernels = re.findall(r"(\w+)\.run\(", body)
    operators = re.findall(r"(?:torch\.ops\.|(?=extern_kernels))([\w.]+?)(?:\.default)?\(", body)
    waits = [str(node.target) for node in graph.orig_gm.graph.nodes if _waits(node)]
    buffers = {
        f"{buffer.get_name()}, {buffer.get_layout()}": _n_elements(graph, buffer)
        for buffer in graph.buffers
        if buffer.get_name() not in graph.removed_buffers and buffer.maybe_get_layout() is not None
    }
    waits += sorted(set(re.findall(r"\bu\d+\b", body)))
    return Graph(Counter(kernels), Counter(operators), waits, buffers)


def _n_elements(graph: Any, buffer: Any) -> int:
    hint = getattr(graph.sizevars, "optimization_hint", None) or graph.sizevars.size_hint  # torch 2.11 has the second
    try:
        return int(hint(buffer.get_numel()))
    except NotImplementedError:  # no tensor
        return 0


def _waits(node: torch.fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    leaves = torch.device("cpu") in (*node.args, *node.kwargs.values()) and bool(node.all_input_nodes)
    return leaves or name in _HOST_READS
