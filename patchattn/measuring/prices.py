"""What closing a pair does to the model's output, found for every pair of a document with one backward pass.

Let `o` be a head's output for one query, `delta` its change when the pair is closed, and `g` the gradient, with respect
to `o`, of the summed log-probabilities of labels that are drawn at every position from the model's own prediction. To
second order, closing this pair alone costs `E[(g . delta)^2] / 2` nats of KL(dense || gated), summed over all tokens
that it reaches, for `E[g g^T]` is the Fisher information. Costs of many pairs are added up as if they were independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from patchattn.backends.blockwise import closed_attention
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.with_graph import dense_with_graph
from patchattn.errors import CalibrationError, PatchAttnError
from patchattn.hf.architecture import hidden_of, vocabulary_of, without_head
from patchattn.hf.loading import first_line
from patchattn.hf.logits import head_of, replaced_forward
from patchattn.hf.support import attention_modules
from patchattn.hf.weights import input_device
from patchattn.measuring.reading import seen_by


@dataclass(frozen=True)
class Priced:
    """What one layer's pairs of a document would cost.

    Args:
        inputs: The attention call, without a graph.
        hidden: [1, query, hidden]; what the attention module was given.
        local: [1, heads, query] nats; exact log mass of the local keys.
        cost: [1, heads, query] float64; nats of KL, summed over tokens, that closing the pair alone brings. Zero where
            a query has no bulk keys.
    """

    inputs: AttentionInputs
    hidden: Tensor
    local: Tensor
    cost: Tensor


Visit = Callable[[int, Priced], None]
"""Called with the index of a layer."""

Loss = Callable[[Callable[[Tensor, Tensor], Tensor], slice, Tensor], Tensor]
"""What is differentiated: of a function that makes logits (see `head_of`), some positions, and their logits,
[tokens, vocabulary], it returns the sum over these positions."""

_KEPT = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)
"""What is not computed twice: of all that a layer does it takes longest for its size."""

# Logits of one call, in numbers; with their gradients they take about a gibibyte.
_MOST_LOGITS = 2**25


class Backward:
    """One backward pass of a document that tells about every pair. Subclasses say of what, and attend.

    Activations between layers and the outputs of attention kernels are kept, the others inside are computed twice, for
    the layer whose turn it is.

    Args:
        model: The model, in evaluation mode and not patched.
        layers: Indices of the layers.
        local: Sink and window, tokens.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], local: tuple[int, int]) -> None:
        self.model, self._layers, self._local = model, layers, local
        self._hidden: dict[int, Tensor] = {}
        self._given: dict[int, Any] = {}
        self._is_first, self._computes_twice = True, False

    def run(self, ids: Tensor, loss: Loss) -> Tensor:
        """Read a document and differentiate; returns the decoder's hidden states, [1, tokens, dim].

        Args:
            ids: [1, tokens] ids, on the model's device.
            loss: What is differentiated, in parts.

        Raises:
            CalibrationError: The model can't run backward, or its gradients are not finite.
        """
        seen = seen_by(self._attend, self.model, self._layers, local=self._local)
        with seen, given_to(self.model, self._hidden), ready(self.model) as self._computes_twice:
            try:
                self._is_first = True
                output = without_head(self.model)(input_ids=ids, use_cache=False)
                self._is_first = False
                output.last_hidden_state.backward(gradient_of_loss(self.model, output, ids, loss))
            except (PatchAttnError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                raise CalibrationError(
                    f"{type(self.model).__name__} can't run backward, which prices need: {first_line(error)}.",
                    fix="measure without prices, or load the weights in a dtype that has gradients",
                ) from error
        return output.last_hidden_state.detach()

    def _attend(self, layer: int, inputs: AttentionInputs, _: Callable[[], Attended]) -> Attended:
        output, given = self.attend(layer, inputs, without_graph(inputs), self._hidden[layer])
        if not output.requires_grad:
            # Nothing before the first layer needs a graph.
            output.requires_grad_()
        if not (self._is_first and self._computes_twice):
            self._given[layer] = given
        output.register_hook(partial(self._visit, layer))
        return all_attended(inputs, output)

    @torch.no_grad()
    def _visit(self, layer: int, gradient: Tensor) -> None:
        given = self._given.pop(layer)
        if not gradient.isfinite().all():
            raise CalibrationError(
                f"The gradients of layer {layer} are not finite.",
                fix="load the model in float32 or bfloat16, or measure without prices",
            )
        self.visit(layer, given, gradient)

    def attend(self, layer: int, inputs: AttentionInputs, bare: AttentionInputs, hidden: Tensor) -> tuple[Tensor, Any]:
        """Return the layer's output, with a graph, and what `visit` is to be given.

        Args:
            layer: Index of the layer.
            inputs: The attention call.
            bare: The same without a graph.
            hidden: [1, query, hidden]; what the attention module was given.
        """
        raise NotImplementedError

    def visit(self, layer: int, given: Any, gradient: Tensor) -> None:
        """Take the gradient of a layer's output, [1, heads, query, value_dim]; called for the last layer first."""
        raise NotImplementedError


class Pricing(Backward):
    """Find what closing each pair of a document would cost, alone and in the dense model.

    Args:
        model: The model, in evaluation mode and not patched.
        layers: Indices of the layers to price.
        local: Sink and window, tokens.
        show: Called once for each layer and document.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], local: tuple[int, int], show: Visit) -> None:
        super().__init__(model, layers, local)
        self._show = show

    def price(self, ids: Tensor, seed: int) -> Tensor:
        """Price one document.

        Args:
            ids: [tokens] ids.
            seed: Of the labels that are drawn.

        Returns:
            The dense decoder's hidden states, [1, tokens, dim].

        Raises:
            CalibrationError: See `run`.
        """
        generator = torch.Generator().manual_seed(seed)

        def loss(_: Any, __: slice, logits: Tensor) -> Tensor:
            labels = drawn(logits.detach(), generator)
            return exactly(logits).log_softmax(-1).gather(1, labels[:, None]).sum()

        return self.run(ids[None].to(input_device(self.model)), loss)

    def attend(self, layer: int, inputs: AttentionInputs, bare: AttentionInputs, hidden: Tensor) -> tuple[Tensor, Any]:
        """Attend densely."""
        output = dense_with_graph(inputs)
        return output, (bare, hidden, output.detach())

    def visit(self, layer: int, given: Any, gradient: Tensor) -> None:
        """Price the pairs of a layer."""
        inputs, hidden, dense = given
        closed, local = closed_attention(inputs)
        along = (gradient.double() * (closed.double() - dense.double())).sum(-1)
        cost = torch.where(inputs.regions.asked[:, None], along.square() / 2, 0)
        self._show(layer, Priced(inputs, hidden, local, cost))


def all_attended(inputs: AttentionInputs, output: Tensor) -> Attended:
    """Return what is made of an output that is taken as if every pair were open."""
    opened = inputs.regions.asked[:, None].expand(inputs.query.shape[:3])
    return Attended(output, opened, inputs.regions.n_causal.sum() * inputs.query.shape[1])


def without_graph(inputs: AttentionInputs) -> AttentionInputs:
    """Return an attention call that can't be differentiated."""
    return replace(inputs, query=inputs.query.detach(), key=inputs.key.detach(), value=inputs.value.detach())


def exactly(logits: Tensor) -> Tensor:
    """Return logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def gradient_of_loss(model: Any, output: Any, ids: Tensor, loss: Loss) -> Tensor:
    """Differentiate a sum over positions of what the model's logits give, some positions at a time.

    Args:
        model: The model.
        output: What its decoder returned for the tokens.
        ids: [1, tokens] the tokens.
        loss: See `Loss`.

    Returns:
        Gradient with respect to the decoder's hidden states, [1, tokens, dim].
    """
    hidden = output.last_hidden_state.detach()
    found = torch.empty_like(hidden)
    size = max(_MOST_LOGITS // vocabulary_of(model), 1)
    with head_of(model, output) as logits_of:
        for begin in range(0, ids.shape[1], size):
            rows = slice(begin, begin + size)
            part = hidden[:, rows].clone().requires_grad_()
            (found[:, rows],) = torch.autograd.grad(loss(logits_of, rows, logits_of(ids[:, rows], part)[0]), part)
    return found


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from each row of logits, [tokens, vocabulary]; on every device the same for the same generator."""
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    share = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(share, uniform * share[:, -1:])[:, 0].clamp(max=logits.shape[1] - 1)


@contextmanager
def given_to(model: nn.Module, hidden: dict[int, Tensor]) -> Iterator[None]:
    """Keep the hidden state that each attention module is given, [batch, query, hidden], by layer."""

    def keep(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[layer] = hidden_of(args, kwargs).detach()

    hooks = [
        module.register_forward_pre_hook(partial(keep, layer), with_kwargs=True)
        for layer, module in attention_modules(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        hidden.clear()


@contextmanager
def ready(model: Any) -> Iterator[bool]:
    """Let a model be differentiated by what its layers compute: weights are constants, layers are checkpointed.

    Everything is as it was on exit.

    Yields:
        Whether all layers are checkpointed, so that each is computed again before its gradient comes.
    """
    layers = _layers_around(model)
    checkpointed = [module for layer in layers for module in layer.modules()]
    is_whole = all(any(one is module for one in checkpointed) for module in attention_modules(model).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            kept = partial(create_selective_checkpoint_contexts, _is_kept)
            twice = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=kept)
            stack.enter_context(replaced_forward(layer, twice))
        try:
            for parameter in trained:
                parameter.requires_grad_(requires_grad=False)
            yield is_whole
        finally:
            for parameter in trained:
                parameter.requires_grad_(requires_grad=True)


def _is_kept(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # What needs no gradient may be changed in place.
    is_kept = operator in _KEPT and torch.is_grad_enabled()
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _layers_around(model: nn.Module) -> list[nn.Module]:
    """Return the modules of lists that hold the attention modules: the decoder's layers."""
    held = {id(module) for module in attention_modules(model).values()}
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part if any(id(inner) in held for inner in layer.modules())]
    # The innermost list: layers may stand in blocks of layers.
    return [layer for layer in layers if not any(other is not layer and _holds(layer, other) for other in layers)]


def _holds(module: nn.Module, other: nn.Module) -> bool:
    return any(inner is other for inner in module.modules())
