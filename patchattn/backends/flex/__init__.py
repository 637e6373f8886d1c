"""Gated attention through FlexAttention, always compiled: closed rows cost no bulk keys.

Where the kernel returns the log-sum-exp (CUDA), the call is two passes: local keys for all rows, whose log-sum-exp is
the exact local log mass that the head gate needs, then bulk keys for the open rows, merged in float32. For the second
pass of a prefill the open rows are moved together, so that its work is proportional to the number of open pairs,
however they are scattered. Long prefills go in slabs of queries, which bound the workspace.

Where the kernel does not (CPU through Inductor), a plain computation finds the local log mass and one pass does the
rest.

Lengths: on CPU, lengths are padded to static buckets, because kernels of dynamic length do not compile there (torch
2.13). Queries and keys grow in powers of two, keys from 512 on, so that decoding up to 64k tokens compiles 8 times. On
CUDA lengths are dynamic and nothing is padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchattn.backends.backend import Backend, CallShape, TableBackend
from patchattn.backends.flex.backward import forward_only
from patchattn.backends.flex.call import (
    Call,
    Settings,
    joined,
    one_pass_call,
    places_of,
    slabs_of,
    two_pass_call,
    with_dynamic_lengths,
)
from patchattn.backends.flex.compiled import (
    Compiler,
    attend_at_once,
    attend_call,
    compiled_call,
    compiled_weighed,
    explained,
    kind_of,
    shared_of,
)
from patchattn.backends.flex.table import attend_table, why_not
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import Regions
from patchattn.errors import BackendError
from patchattn.gates.base import HeadGate, Known
from patchattn.gates.moment import MomentGate
from patchattn.moments.prompt import PromptMoments, moments_before
from patchattn.policy import Phase


def attend(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float) -> Attended:
    """Attend to local keys, and to bulk keys where the head gate is open; see `patchattn.backends.reference.attend`.

    Args:
        inputs: The attention call, in float32, float16 or bfloat16.
        bulk_log_mass: [batch, heads, query] nats; +inf opens and -inf closes a pair for certain, NaN opens.
        margin: Margin in nats from which a gate closes.

    Returns:
        Output, decisions, and the scored keys of all visited tiles, in both passes. The output can't be differentiated:
        its backward raises `UnsupportedCallError`.

    Raises:
        BackendError: FlexAttention can't be compiled for this device or dtype, or was compiled for too many shapes.
    """
    return attend_with(inputs, bulk_log_mass, margin, compiler="inductor")


def attend_with(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float, *, compiler: Compiler) -> Attended:
    """Do what `attend` does with a given compiler.

    Args:
        inputs: The attention call.
        bulk_log_mass: [batch, heads, query] nats.
        margin: Margin in nats from which a gate closes.
        compiler: `"aot_eager"` and `"eager"` run the path of CUDA devices, two passes with log-sum-exp, on any device.
            They generate no kernels and make the queries x keys tensor: for tests.
    """
    _refuse_dtype(inputs.query.dtype)
    with torch.no_grad():
        if _takes_two_passes(inputs, compiler):
            found = _in_two_passes(compiler, inputs, bulk_log_mass, margin)
        else:
            found = _at_once(compiler, inputs, bulk_log_mass, margin)
    return _attended(inputs, *found)


def weigh_and_attend_with(
    inputs: AttentionInputs, gate: HeadGate, known: Known, *, compiler: Compiler
) -> tuple[Attended, PromptMoments] | None:
    """Weigh by the moments of the prompt and attend in one compiled function for each slab, where that can be done.

    Args:
        inputs: The attention call.
        gate: The gate.
        known: What the gate may use.
        compiler: As in `attend_with`.

    Returns:
        What attention gives, and the moments after the last query. None for another gate, and where there is no device
        to wait for.
    """
    if torch.compiler.is_compiling() or not _takes_two_passes(inputs, compiler):
        return None
    if not isinstance(gate, MomentGate) or type(gate).weigh is not MomentGate.weigh or not gate.keeps_moments:
        return None
    _refuse_dtype(inputs.query.dtype)
    settings, regions, call = Settings.of(inputs, two_passes=True), inputs.regions, two_pass_call(inputs, None)
    measured = known.measured
    heads = None if measured is None else (measured.margins, measured.probe)
    parts = []
    with torch.no_grad(), explained(call):
        moments = moments_before(inputs, known.moments, reach_query=known.reach_query).parts
        for rows, slab in slabs_of(call):
            shared = shared_of(settings, compiler, slab, regions, rows)
            run = compiled_weighed(settings, compiler, gate.estimate, kind_of(slab, two_passes=True))
            places = regions.once(("places", rows.start), places_of, regions, rows.start)
            more = shared, _at_margin(regions, gate.margin), places, moments, heads, _of_rows(known.hidden, rows)
            *found, moments = run(with_dynamic_lengths(slab), *more)
            parts.append(found)
    return _attended(inputs, *joined(parts)), PromptMoments(*moments)


def weigh_and_attend(inputs: AttentionInputs, gate: HeadGate, known: Known) -> tuple[Attended, PromptMoments] | None:
    """Do what `weigh_and_attend_with` does, through Inductor."""
    return weigh_and_attend_with(inputs, gate, known, compiler="inductor")


def _takes_two_passes(inputs: AttentionInputs, compiler: Compiler) -> bool:
    return compiler != "inductor" or inputs.query.device.type != "cpu"


def _attended(inputs: AttentionInputs, output: Tensor, opened: Tensor, scored: Tensor) -> Attended:
    sources = (inputs.query, inputs.key, inputs.value, inputs.sink_logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources):
        output = forward_only(output, *sources)
    return Attended(output, opened, scored)


def _of_rows(hidden: Tensor | None, rows: slice) -> Tensor | None:
    """Return the hidden state of a slab's queries, with their number marked as dynamic; None for none."""
    if hidden is None:
        return None
    cut = hidden.detach()[:, rows].contiguous()
    if cut.shape[1] > 1:
        torch._dynamo.maybe_mark_dynamic(cut, 1)
    return cut


def _at_margin(regions: Regions, margin: float) -> Tensor:
    """Return the margin in a tensor, so that another one is not another graph; all layers share it."""
    device = regions.valid.device
    return regions.once(("margin", margin), lambda: torch.full((), margin, device=device, dtype=torch.float32))


def _in_two_passes(
    compiler: Compiler, inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    settings, regions = Settings.of(inputs, two_passes=True), inputs.regions
    call, at_margin = two_pass_call(inputs, bulk_log_mass), _at_margin(regions, margin)
    if torch.compiler.is_compiling():
        # A loop over slabs would make a graph for each length.
        shared = shared_of(settings, compiler, call, regions, slice(0, inputs.query.shape[2]))
        return attend_call(settings, call, shared, at_margin)

    def attended(rows: slice, slab: Call) -> tuple[Tensor, Tensor, Tensor]:
        shared = shared_of(settings, compiler, slab, regions, rows)
        run = compiled_call(settings, compiler, kind_of(slab, two_passes=True))
        return run(with_dynamic_lengths(slab), shared, at_margin)

    with explained(call):
        return joined(attended(*slab) for slab in slabs_of(call))


def _at_once(
    compiler: Compiler, inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    settings, call = Settings.of(inputs, two_passes=False), one_pass_call(inputs, bulk_log_mass, margin)
    if torch.compiler.is_compiling():
        output, opened, scored = attend_at_once(settings, call)
    else:
        with explained(call):
            output, opened, scored = compiled_call(settings, compiler, kind_of(call, two_passes=False))(call)
    queries = inputs.query.shape[2]
    return output[:, :, :queries], opened[:, :, :queries], scored


def _refuse_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BackendError(
            f"FlexAttention computes float32, float16 and bfloat16; got {dtype}.",
            fix='Use backend="blockwise" or backend="reference".',
        )


def break_even(shape: CallShape, phase: Phase) -> int:
    """Say from how many bulk keys on a query is asked: a guess, for no GPU was measured."""
    return 4096


BY_TABLE = TableBackend(attend_table, why_not)
BACKEND = Backend(attend, break_even=break_even, own_weighed=weigh_and_attend, by_table=BY_TABLE)
