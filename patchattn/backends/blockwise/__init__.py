"""Gated attention in plain PyTorch: no compiler, memory linear in the length. The backend of choice on CPU.

Pass 1 attends every query to its local keys; its log mass decides the gates. Pass 2 attends the open pairs to the bulk
keys. Both results are merged by log-sum-exp. `prefill` does this for many queries, `decode` for
one query per sequence, both by means of `softmax`.

On CPU the parts go through the fused attention kernel, elsewhere and with a softcap through two matrix products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from patchattn.backends.backend import Backend, PagedBackend
from patchattn.backends.blockwise.cost import break_even
from patchattn.backends.blockwise.decode import attend_decode, is_plain_decode
from patchattn.backends.blockwise.dense import attend_densely, dense_rows, is_eager, is_plain, n_dense_rows
from patchattn.backends.blockwise.paged import attend_paged, attend_paged_densely
from patchattn.backends.blockwise.prefill import SLAB, add_bulk, attend_local
from patchattn.backends.blockwise.softmax import Softmax, with_sink_logits, with_unit_stride
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.regions import Regions
from patchattn.errors import UnsupportedCallError
from patchattn.gates.decision import all_open, decide


def attend(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float) -> Attended:
    """Attend to local keys, and to bulk keys where the head gate is open.

    Computes what `patchattn.backends.reference.attend` defines, with memory linear in the number of keys. Forward
    only. One opaque operator, so that `torch.compile(fullgraph=True)` of a caller works; on an accelerator it
    synchronises with the host.

    Args:
        inputs: The attention call.
        bulk_log_mass: [batch, heads, query] nats, as a gate weighs it; +inf opens and -inf
            closes a pair for certain.
        margin: Margin in nats from which a gate closes.

    Returns:
        Output, decisions and the number of keys in the chunks handed to the kernels.

    Raises:
        UnsupportedCallError: In the backward pass. Run under `torch.no_grad()`, or call `patchattn.unpatch(model)`
            before training.
    """
    regions = inputs.regions
    if is_eager(inputs.query, inputs.key, inputs.value):
        # The operator is for compilers and for the refusal of a backward pass; it costs more than a short decode step.
        return _attend(inputs, bulk_log_mass, margin)
    return Attended(
        *_blockwise(
            inputs.query,
            inputs.key,
            inputs.value,
            regions.valid,
            regions.first,
            regions.query_slot,
            bulk_log_mass,
            inputs.sink_logits,
            inputs.scale,
            inputs.softcap,
            margin,
            regions.sink_size,
            regions.window_size,
            regions.break_even,
            whole_groups=inputs.whole_groups,
        )
    )


def dense(inputs: AttentionInputs) -> Tensor:
    """Attend to every causal key, with nothing computed for a gate.

    Args:
        inputs: The attention call.

    Returns:
        [batch, heads, query, value_dim] in the query's dtype; zeros for rows that see no key.
    """
    if is_eager(inputs.query, inputs.key, inputs.value) and is_plain(inputs):
        return attend_densely(_with_unit_strides(inputs))
    return attend(inputs, all_open(inputs), 0.0).output


@torch.library.custom_op("patchattn::blockwise", mutates_args=())
def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    first: Tensor,
    query_slot: Tensor,
    bulk_log_mass: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    margin: float,
    sink_size: int,
    window_size: int,
    break_even: int,
    *,
    whole_groups: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    regions = Regions(sink_size, window_size, query.shape[2], valid, first, query_slot, break_even)
    inputs = AttentionInputs(query, key, value, regions, scale, softcap, sink_logits, whole_groups)
    attended = _attend(inputs, bulk_log_mass, margin)
    # An operator may not return views of one another or of other strides than its fake implementation says.
    scored = torch.as_tensor(attended.scored_keys, device=query.device)
    return attended.output.contiguous(), attended.open.contiguous(), scored


@torch.library.register_fake("patchattn::blockwise")
def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: object,
    whole_groups: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty(rows, dtype=torch.bool),
        query.new_empty((), dtype=torch.int64),
    )


def _refuse_backward(ctx: object, *gradients: object) -> NoReturn:
    raise UnsupportedCallError(
        "The blockwise backend of patchattn has no backward pass.",
        fix="Run the model under torch.no_grad(), or call patchattn.unpatch(model) before training.",
    )


torch.library.register_autograd("patchattn::blockwise", _refuse_backward)


def _attend(inputs: AttentionInputs, bulk_log_mass: Tensor, margin: float) -> Attended:
    inputs = _with_unit_strides(_within_the_keys(inputs))
    if is_plain_decode(inputs):
        return attend_decode(inputs, bulk_log_mass, margin)
    length = inputs.query.shape[2]
    n_dense = n_dense_rows(inputs, bulk_log_mass)
    leading = dense_rows(inputs, n_dense) if n_dense else None
    if leading is not None and n_dense == length:
        return leading
    batch, heads, _, _ = inputs.query.shape
    output = inputs.query.new_empty(batch, length, heads, inputs.value.shape[3])
    begin, decisions, scored = 0, [], 0
    if leading is not None:
        begin, decisions, scored = n_dense, [leading.open], leading.scored_keys
        output[:, :begin] = leading.output.transpose(1, 2)
    for start in range(begin, length, SLAB):
        rows = slice(start, min(start + SLAB, length))
        local, triples = _local(inputs, rows, output)
        of_rows = bulk_log_mass[:, :, rows], inputs.regions.asked[:, rows]
        opened = decide(local.log_mass, *of_rows, margin, inputs.opens_groups)
        scored += triples
        reads_bulk = opened | inputs.regions.unasked[:, None, rows]
        if reads_bulk.any():
            scored += add_bulk(inputs, rows, reads_bulk, local)
        decisions.append(opened)
    return Attended(output.transpose(1, 2), torch.cat(decisions, 2), scored)


def _local(inputs: AttentionInputs, rows: slice, output: Tensor) -> tuple[Softmax, int]:
    """Attend rows to their local keys and sink logits, into `output`, [batch, query, heads, value_dim]."""
    local, triples = attend_local(inputs, rows, output[:, rows])
    if inputs.sink_logits is not None:
        local = with_sink_logits(local, inputs.sink_logits[:, None])
        output[:, rows] = local.output.transpose(1, 2)
        local = Softmax(output[:, rows].transpose(1, 2), local.log_mass)
    return local, triples


def closed_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Attend every query of a prefill to its local keys only.

    Args:
        inputs: The attention call, on tensors that the host may read.

    Returns:
        Output [batch, heads, query, value_dim], and the exact local log mass, [batch, heads, query] nats, sink logits
        included.
    """
    inputs = _with_unit_strides(_within_the_keys(inputs))
    batch, heads, length, _ = inputs.query.shape
    output = inputs.query.new_empty(batch, length, heads, inputs.value.shape[3])
    slabs = [slice(start, min(start + SLAB, length)) for start in range(0, length, SLAB)]
    return output.transpose(1, 2), torch.cat([_local(inputs, rows, output)[0].log_mass for rows in slabs], dim=2)


def _within_the_keys(inputs: AttentionInputs) -> AttentionInputs:
    """Cut sink and window down to the number of keys, which changes nothing: chunks of keys are as long as both."""
    regions = inputs.regions
    most = max(regions.key_length, 1)
    if max(regions.sink_size, regions.window_size) <= most:
        return inputs
    sink_size, window_size = min(regions.sink_size, most), min(regions.window_size, most)
    return replace(inputs, regions=replace(regions, sink_size=sink_size, window_size=window_size))


def _with_unit_strides(inputs: AttentionInputs) -> AttentionInputs:
    tensors = (inputs.query, inputs.key, inputs.value)
    if all(x.stride(-1) == 1 for x in tensors):
        return inputs
    query, key, value = (with_unit_stride(x) for x in tensors)
    return replace(inputs, query=query, key=key, value=value)


PAGED = PagedBackend(attend_paged, attend_paged_densely)
BACKEND = Backend(attend, break_even=break_even, own_dense=dense, paged=PAGED)
