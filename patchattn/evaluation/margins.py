"""What the gates of a model weigh up: exact and estimated log masses of every pair, on dense activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import attention_scores
from patchattn.call.regions import Regions
from patchattn.evaluation.tasks.sample import DocumentError
from patchattn.gates.gate import Measured, bulk_log_mass_from_calibration
from patchattn.hf.context import check_context
from patchattn.hf.hooks import STATE
from patchattn.hf.patching import patch
from patchattn.hf.support import attention_modules
from patchattn.hf.weights import input_device
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.policy import Estimate, OpenGate, Policy

ESTIMATES: tuple[Estimate, ...] = ("guarded", "saturating", "lognormal")

# Slabs that fit a processor's cache take half of the time of large ones.
_SCORES_PER_SLAB = {"cpu": 1 << 20}
_SCORES_PER_SLAB_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Margins:
    """The masses that the gates of one layer compare while a model reads one document densely.

    Args:
        positions: [queries] int64; positions of the queries that have bulk keys.
        local: [heads, queries] nats; exact log mass of the local keys.
        bulk: [heads, queries] nats; exact log mass of the bulk keys.
        top: [heads, queries] nats; the largest score of a bulk key.
        estimates: Estimated log mass of the bulk keys, [heads, queries] nats, by source of the moments and name of the
            estimate. +inf where the gate opens whatever its threshold.
    """

    positions: Tensor
    local: Tensor
    bulk: Tensor
    top: Tensor
    estimates: dict[tuple[str, Estimate], Tensor]

    @property
    def bulk_share(self) -> Tensor:
        """Share of each query's attention that lies on bulk keys, [heads, queries]."""
        return torch.sigmoid(self.bulk - self.local)

    def opens(self, threshold: float, estimate: tuple[str, Estimate] | None = None) -> Tensor:
        """Say which pairs a gate opens, [heads, queries] bool.

        Args:
            threshold: Local share in (0, 1).
            estimate: Source of the moments and name of the estimate; None for the exact mass, as the oracle.
        """
        mass = self.bulk if estimate is None else self.estimates[estimate]
        return ~(self.local - mass >= math.log(threshold) - math.log1p(-threshold))


def record_margins(
    model: Any,
    token_ids: Sequence[int],
    *,
    sink_size: int = 16,
    windows: Sequence[int] = (1024,),
    estimates: Sequence[Estimate] = ESTIMATES,
    calibration: Any = None,
) -> dict[int, dict[int, Margins]]:
    """Read one document with dense attention and compute what every gate would compare.

    Takes about as long as dense attention in plain PyTorch; memory is linear in the document's length.

    Args:
        model: A causal language model that can be patched, not patched now.
        token_ids: The document.
        sink_size: Tokens in the sink.
        windows: Window sizes, all measured in one reading.
        estimates: Which estimates to compute.
        calibration: A `patchattn.Calibration`; for its own window, estimates from its key moments are computed too.

    Returns:
        By window and layer. Windows that the document does not outgrow are left out.

    Raises:
        DocumentError: The document is longer than the model's context.

    Example:
        >>> found = record_margins(model, document.token_ids, windows=(256,))  # doctest: +SKIP
        >>> found[256][0].opens(0.6).float().mean(1)  # open fraction of each head of layer 0  # doctest: +SKIP
    """
    check_context(model, [len(token_ids)], DocumentError)
    sizes = [window for window in windows if len(token_ids) > sink_size + window]
    found: dict[int, dict[int, Margins]] = {window: {} for window in sizes}

    def visit(layer: int, inputs: AttentionInputs) -> None:
        exact = exact_masses(inputs, sizes)
        for window, (local, bulk, top) in zip(sizes, exact, strict=True):
            at_window = with_window(inputs, window)
            asked = at_window.regions.asked[0]
            guesses: dict[tuple[str, Estimate], Tensor] = {
                ("prompt", name): _from_prompt(at_window, name)[:, asked] for name in estimates
            }
            if calibration is not None and calibration.manifest.window_size == window:
                measured = Measured(moments=calibration.key_moments(layer))
                for name in estimates:
                    mass = bulk_log_mass_from_calibration(at_window, measured, estimate=name)
                    guesses["calibration", name] = mass[0][:, asked]
            positions = at_window.regions.positions[0, asked]
            found[window][layer] = Margins(positions, local[:, asked], bulk[:, asked], top[:, asked], guesses)

    if sizes:
        with watching(model, visit, sink_size=sink_size):
            read(model, token_ids)
    return found


@torch.no_grad()
def read(model: Any, token_ids: Sequence[int]) -> None:
    """Read a document in one forward pass without making logits."""
    tokens = torch.tensor([list(token_ids)], device=input_device(model))
    getattr(model, "base_model", model)(input_ids=tokens, use_cache=False)


@contextmanager
def watching(model: Any, visit: Callable[[int, AttentionInputs], None], *, sink_size: int = 16) -> Iterator[None]:
    """Show the inputs of every attention call of a model, which attends densely meanwhile; undone on exit.

    Args:
        model: A causal language model that can be patched, not patched now.
        visit: Called with the index of the layer and the inputs of the call. Their regions have a window of one token;
            `with_window` gives them another.
        sink_size: Tokens in the sink.
    """
    policy = Policy(sink_size=sink_size, window_size=1, min_bulk=0, gate=OpenGate())
    with patch(model, policy, record=None):
        for layer, module in attention_modules(model).items():
            state = module._modules.get(STATE)
            if state is not None and state.gated:
                state.attend = _shown(visit, layer, state.attend)
        yield


def _shown(visit: Callable[[int, AttentionInputs], None], layer: int, attend: Callable[..., Attended]) -> Any:
    def shown(inputs: AttentionInputs, mass: Tensor, threshold: float) -> Attended:
        visit(layer, inputs)
        return attend(inputs, mass, threshold)

    return shown


def with_window(inputs: AttentionInputs, window: int) -> AttentionInputs:
    """Return the same call under another window."""
    return replace(inputs, regions=replace(inputs.regions, window_size=window))


def _from_prompt(inputs: AttentionInputs, estimate: Estimate) -> Tensor:
    scale, softcap = inputs.scale, inputs.softcap
    mass, _ = bulk_log_mass_from_prompt(
        inputs.query, inputs.key, inputs.regions, scale=scale, softcap=softcap, estimate=estimate
    )
    return mass[0]


def exact_masses(inputs: AttentionInputs, windows: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Compute exact log masses of one document's call for several windows.

    Args:
        inputs: A call over all tokens of one document without padding, [1, heads, tokens, dim].
        windows: Window sizes in tokens.

    Returns:
        For each window: log mass of the local keys, log mass of the bulk keys, and the largest score of a bulk key,
        each [heads, tokens] nats; -inf where there are none.
    """
    _, heads, length, _ = inputs.query.shape
    rows = max(_SCORES_PER_SLAB.get(inputs.query.device.type, _SCORES_PER_SLAB_ELSEWHERE) // (heads * length), 16)
    slabs = [_masses_of_rows(inputs, begin, min(begin + rows, length), windows) for begin in range(0, length, rows)]
    found = []
    for of_window in zip(*slabs, strict=True):
        local, bulk, top = (torch.cat(parts, dim=1) for parts in zip(*of_window, strict=True))
        found.append((local, bulk, top))
    return found


def _masses_of_rows(
    inputs: AttentionInputs, begin: int, end: int, windows: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    sink = inputs.regions.sink_size
    slab = AttentionInputs(
        inputs.query[:, :, begin:end],
        inputs.key[:, :, :end],
        inputs.value[:, :, :end],
        Regions.plain(sink, 1, end - begin, 1, end, inputs.query.device),
        inputs.scale,
        inputs.softcap,
    )
    scores = attention_scores(slab)[0].masked_fill_(~slab.regions.causal_mask(), -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    terms = (scores - largest).exp_()
    largest = largest[..., 0]
    found = []
    for window in windows:
        # Keys that are bulk for every row need no mask; those after them are bulk for some.
        certain, last = max(begin - window + 1, sink), max(end - window, sink)
        some = replace(slab.regions, window_size=window).bulk_mask()[..., certain:last]
        bulk = terms[..., sink:certain].sum(-1) + (terms[..., certain:last] * some).sum(-1)
        local = terms[..., :sink].sum(-1) + (terms[..., certain:last] * ~some).sum(-1) + terms[..., last:].sum(-1)
        nothing = torch.full_like(terms[..., :1], -torch.inf)
        beyond = scores[..., certain:last].masked_fill(~some, -torch.inf)
        top = torch.cat([nothing, scores[..., sink:certain], beyond], dim=-1).amax(-1)
        local = local.log() + largest
        if inputs.sink_logits is not None:
            local = torch.logaddexp(local, inputs.sink_logits.to(local.dtype)[:, None])
        found.append((local, bulk.log() + largest, top))
    return found
