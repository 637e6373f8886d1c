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

from patchattn.backends.backend import Backend, CallShape
from patchattn.backends.flex.backward import forward_only
from patchattn.backends.flex.call import Settings, joined, one_pass_call, slabs_of, two_pass_call, with_dynamic_lengths
from patchattn.backends.flex.compiled import Compiler, attend_call, run_or_explain
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.errors import BackendError
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
        two_passes = compiler != "inductor" or inputs.query.device.type != "cpu"
        call = two_pass_call(inputs, bulk_log_mass) if two_passes else one_pass_call(inputs, bulk_log_mass, margin)
        margin_tensor = torch.full((), margin, device=inputs.query.device, dtype=torch.float32)
        settings = Settings.of(inputs, two_passes=two_passes)
        queries = inputs.query.shape[2]
        if torch.compiler.is_compiling():
            # A loop over slabs would make a graph for each length.
            output, opened, scored = attend_call(settings, call, margin_tensor)
        elif two_passes:
            output, opened, scored = joined(
                run_or_explain(settings, compiler, with_dynamic_lengths(slab), margin_tensor) for slab in slabs_of(call)
            )
        else:
            output, opened, scored = run_or_explain(settings, compiler, call, margin_tensor)
        output, opened = output[:, :, :queries], opened[:, :, :queries]
    sources = (inputs.query, inputs.key, inputs.value, inputs.sink_logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources):
        output = forward_only(output, *sources)
    return Attended(output, opened, scored)


def _refuse_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BackendError(
            f"FlexAttention computes float32, float16 and bfloat16; got {dtype}.",
            fix='Use backend="blockwise" or backend="reference".',
        )


def break_even(shape: CallShape, phase: Phase) -> int:
    """Say from how many bulk keys on a query is asked: a guess, for no GPU was measured."""
    return 4096


BACKEND = Backend(attend, break_even=break_even)
