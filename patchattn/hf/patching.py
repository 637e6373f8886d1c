"""`patch` and `unpatch`: take over a model's attention in place, and give it back exactly."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

from torch import nn

from patchattn.backends import BackendName, load, resolve
from patchattn.backends.self_check import self_check
from patchattn.calibration.calibration import Calibration
from patchattn.errors import CalibrationMismatchError, PatchStateError, PolicyError, UnsupportedModelError
from patchattn.gates.measured import MeasuredHeads
from patchattn.hf.architecture import (
    ORIGINAL_OF,
    ORIGINALS,
    arguments_with_effect,
    cache_layer,
    group_size,
    has_sink_logits,
    head_sizes,
    head_slices,
    hidden_size,
    implementation_of,
    is_local,
    original_attention,
    query_heads,
    set_implementation,
    softcap_of,
    underlying,
)
from patchattn.hf.attention import register
from patchattn.hf.engine import Batching
from patchattn.hf.fingerprint import fingerprint_of
from patchattn.hf.hooks import STATE, install_cache_hook, install_mask_hook, remove_mask_hook
from patchattn.hf.reporting import report_of
from patchattn.hf.state import LayerState, is_in_use
from patchattn.hf.support import Supported, attention_modules, check_support, decoder_of
from patchattn.hf.weights import compute_device, compute_dtype
from patchattn.policy import Policy
from patchattn.report import GateReport

Record = Literal["summary", "timeline"] | None


class PatchHandle:
    """A patched model: undo it, or ask what its gates did. Also a context manager that undoes on exit.

    Args:
        model: The patched model.
        policy: The policy in force, with every `"auto"` resolved.
        backend: The backend in use.
        expected_kl: KL to dense that a calibration expects of the policy, nats per token; None where it says nothing.

    `states` holds what each patched layer keeps, by its index: for the library's own tools.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, backend: BackendName, expected_kl: float | None = None
    ) -> None:
        self.model = model
        self.expected_kl = expected_kl
        self.policy = policy
        self.backend = backend
        self.states = _states(model)

    def unpatch(self) -> None:
        """Give the model back exactly as it was; does nothing the second time."""
        if _states(self.model) == self.states and self.states:
            unpatch(self.model)

    def report(self) -> GateReport:
        """Report what the gates did so far; also after the model was unpatched."""
        return report_of(self.model, self.states, self.policy, self.backend, self.expected_kl)

    def reset_report(self) -> None:
        """Set every counter of the report back to zero."""
        for state in self.states.values():
            state.reset_report()
            if state.drafting is not None:
                state.drafting.reset_report()

    def __enter__(self) -> PatchHandle:
        """Return the handle."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Undo the patch, also after an exception."""
        self.unpatch()


def patch(
    model: Any,
    policy: Policy | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    backend: str = "auto",
    record: Record = "summary",
) -> PatchHandle:
    """Make a model's heads decide, query by query, whether they need the long context.

    In place. Everything that can be refused is refused before the model is touched.

    Args:
        model: A Hugging Face causal language model that goes through transformers' attention interface; of a
            vision-language model the text tower is patched, of a PEFT wrapper the model inside.
        policy: What to do; None means the policy of the calibration, or `Policy()` without one.
        calibration: What was measured about this model: a `Calibration`, its folder, or its repository on the Hub.
            Only gates with a target for a threshold, or with moments from the calibration, use it.
        backend: `"auto"` (`"flex"` on CUDA, `"blockwise"` elsewhere), `"flex"`, `"blockwise"` or `"reference"`.
        record: What the report needs: `"summary"` counts, `"timeline"` keeps every decision too, None keeps nothing.

    Returns:
        The handle to undo the patch and to read the report.

    Raises:
        UnsupportedModelError: The model's attention can't be taken over; says why.
        PolicyError: The policy names layers or heads that the model does not have, or needs a calibration.
        CalibrationMismatchError: The calibration is of another model, or of another sink or window than the policy's.
        CalibrationError: The calibration can't be found or read, or can't carry what the policy asks of it.
        pydantic.ValidationError: The policy is a `model_copy` with a value that its field refuses.
        PatchStateError: The model is patched already.
        BackendError: The backend does not run here or disagrees with the reference.

    Example:
        >>> import patchattn
        >>> from patchattn.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with patchattn.patch(model, patchattn.Policy(window_size=64)) as handle:
        ...     handle.backend
        'blockwise'
        >>> patchattn.is_patched(model)
        False
    """
    if record not in ("summary", "timeline", None):
        raise PolicyError(f"Unknown record {record!r}.", fix='use "summary", "timeline" or None')
    if isinstance(calibration, str | os.PathLike):
        calibration = Calibration.from_pretrained(calibration)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise PolicyError(
            f"Expected a patchattn.Calibration, a folder or a repository, got {type(calibration).__name__}.",
            fix="pass what patchattn.calibrate returned, or the name of a folder or repository",
        )
    if policy is None:
        policy = Policy() if calibration is None else calibration.policy
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"Expected a patchattn.Policy, got {type(policy).__name__}.", fix="pass patchattn.Policy(...)"
        )
    # A copy made with model_copy(update=...) is not validated by pydantic.
    policy = Policy.model_validate(policy.model_dump(warnings=False))
    if is_patched(model):
        raise PatchStateError("The model is patched already.", fix="call patchattn.unpatch(model) first")
    support = check_support(model)
    if not isinstance(support, Supported):
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be patched: {' '.join(support.reasons)}",
            fix="patchattn.check_support(model) lists the reasons; docs/reference/models.md lists what is supported",
        )
    modules = attention_modules(model)
    layers = _layers(policy, support)
    heads = {index: query_heads(module) for index, module in modules.items()}
    _check_heads(policy, {layer: heads[layer] for layer in layers})
    measured = _measured(policy.model_copy(update={"layers": layers}), calibration, model)
    chosen = _check_backend(model, backend, modules, heads, layers)
    is_auto = policy.min_bulk == "auto"
    least = load(chosen).least_asked(policy.sink_size, policy.window_size) if is_auto else policy.min_bulk
    policy = policy.model_copy(update={"layers": layers, "min_bulk": least})
    expected_kl = None if calibration is None else calibration.expected_kl(policy)
    register()
    try:
        _apply(model, modules, heads, policy, chosen, record, measured, judges_calls=is_auto)
    except BaseException:
        _undo(modules.values(), decoder_of(model))
        raise
    return PatchHandle(model, policy, chosen, expected_kl)


def unpatch(model: Any) -> None:
    """Give a model back exactly as it was before `patch`.

    Args:
        model: A patched model.

    Raises:
        PatchStateError: The model is not patched, is only a part of one that is, or is serving requests.
    """
    if not is_patched(model):
        raise PatchStateError(f"This {type(model).__name__} is not patched.", fix="patch it first, or drop the unpatch")
    decoder = decoder_of(model)
    if decoder is None:
        raise PatchStateError(
            f"This {type(model).__name__} is only a part of a patched model.",
            fix="unpatch the model that was patched, or the decoder inside it",
        )
    for state in _states(model).values():
        state.batching.check_idle()
    _undo(attention_modules(model).values(), decoder)


def _undo(modules: Iterable[Any], decoder: nn.Module | None) -> None:
    """Give modules back as they were; leaves alone those that are not patched."""
    states = [(module, module._modules.pop(STATE)) for module in modules if STATE in module._modules]
    for _, state in states:
        state.batching.undo()
        if state.drafting is not None:
            state.drafting.undo()
    for module, state in states:
        if implementation_of(module.config) == ORIGINALS[state.original] and not is_in_use(module.config):
            set_implementation(module.config, state.original)
        module._forward_pre_hooks.pop(state.hook_id)
        module._forward_pre_hooks_with_kwargs.pop(state.hook_id)
    if decoder is not None:
        remove_mask_hook(decoder)


def is_patched(model: Any) -> bool:
    """Say whether a model is patched; what is not a model is not."""
    return isinstance(model, nn.Module) and bool(_states(model))


def _states(model: nn.Module) -> dict[int, LayerState]:
    states = {index: module._modules.get(STATE) for index, module in attention_modules(model).items()}
    return {index: state for index, state in states.items() if isinstance(state, LayerState)}


def _layers(policy: Policy, support: Supported) -> tuple[int, ...]:
    if policy.layers is None:
        return support.layers
    wrong = sorted(set(policy.layers) - set(support.layers))
    if wrong:
        local = sorted(set(wrong) & set(support.local_layers))
        hint = f" Layers {local} are sliding and local already." if local else ""
        raise PolicyError(
            f"The policy names layers {wrong}; the layers that can be patched are {list(support.layers)}.{hint}",
            fix="correct Policy.layers, or leave it None for every layer that can be patched",
        )
    return policy.layers


def _check_heads(policy: Policy, heads: dict[int, int]) -> None:
    wrong = policy.gate.unknown_heads(heads)
    if wrong:
        raise PolicyError(
            f"{type(policy.gate).__name__} names {wrong}; patched layers are {list(heads)}, with query heads 0 to "
            f"{max(heads.values()) - 1}.",
            fix="use pairs of (layer, query head), both counted from 0",
        )


def _measured(policy: Policy, calibration: Calibration | None, model: Any) -> dict[int, MeasuredHeads]:
    """Return what a calibration says about each layer; empty where the gate has no use for it."""
    if calibration is not None:
        calibration.check_fingerprint(fingerprint_of(underlying(model)))
        prices, hidden = calibration.manifest.prices, hidden_size(underlying(model))
        if prices is not None and prices.hidden != hidden:
            raise CalibrationMismatchError(
                f"The calibration's prices are of hidden states of size {prices.hidden}; this model has {hidden}.",
                fix="use the calibration of this model, or measure one with patchattn.calibrate",
            )
        return calibration.measured_heads(policy)
    if policy.gate.needs_calibration:
        raise PolicyError(
            f"The policy's gate needs a calibration: {policy.gate.of_calibration()}.",
            fix="pass calibration=..., or use a threshold that is a number with prompt moments",
        )
    return {}


def _check_backend(
    model: Any, backend: str, modules: dict[int, Any], heads: dict[int, int], layers: tuple[int, ...]
) -> BackendName:
    index = layers[0] if layers else next(iter(modules))
    module = modules[index]
    device = compute_device(module, underlying(model))
    chosen = resolve(backend, device)
    dim, value_dim = head_sizes(module)
    self_check(
        chosen,
        dtype=compute_dtype(module, underlying(model)),
        head_dim=dim,
        value_dim=value_dim,
        group_size=group_size(module),
        device=device,
        softcap=softcap_of(module),
        sink_logits=has_sink_logits(module),
    )
    return chosen


def _apply(
    model: Any,
    modules: dict[int, Any],
    heads: dict[int, int],
    policy: Policy,
    backend: BackendName,
    record: Record,
    measured: dict[int, MeasuredHeads],
    *,
    judges_calls: bool,
) -> None:
    # A configuration that is shared with a patched model names that model's implementation.
    named = {index: implementation_of(module.config) for index, module in modules.items()}
    originals = {index: ORIGINAL_OF.get(name, name) for index, name in named.items()}
    gated = set(policy.layers or ())
    slices, rank = head_slices(underlying(model))
    batching = Batching(underlying(model))
    for index, module in modules.items():
        here = heads[index] // slices
        kv_here = max(here // group_size(module), 1)
        of_layer = measured.get(index)
        state = LayerState(
            policy.model_copy(update={"gate": policy.gate.of_heads(range(rank * here, (rank + 1) * here))}),
            index,
            here,
            backend,
            originals[index],
            attend_originally=original_attention(module, originals[index]),
            effects=arguments_with_effect(module),
            has_softcap=softcap_of(module) is not None,
            has_sinks=has_sink_logits(module),
            is_local=is_local(module),
            cache_layer=cache_layer(module, modules),
            gated=index in gated,
            register=register,
            record=record,
            judges_calls=judges_calls,
            measured=None if of_layer is None else of_layer.of_heads(_slice(rank, here), _slice(rank, kv_here)),
        ).to(compute_device(module, underlying(model)))
        state.train(module.training)
        state.batching, state.config = batching, module.config
        state.hook_id = install_cache_hook(module).id
        module._modules[STATE] = state
        set_implementation(module.config, ORIGINALS[originals[index]])
    decoder = decoder_of(model)
    if decoder is not None:
        install_mask_hook(decoder)


def _slice(rank: int, size: int) -> slice:
    return slice(rank * size, (rank + 1) * size)
