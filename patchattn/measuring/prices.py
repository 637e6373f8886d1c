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
from torch.utils.checkpoint import checkpoint

from patchattn.backends.blockwise import closed_attention
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import attention_with_graph
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

# Logits of one call, in numbers; with their gradients they take about a gibibyte.
_MOST_LOGITS = 2**25


class Pricing:
    """Find what closing each pair of a document would cost.

    Args:
        model: The model, in evaluation mode and not patched.
        layers: Indices of the layers to price.
        local: Sink and window, tokens.
        visit: Called once for each layer and document, last layer first.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], local: tuple[int, int], visit: Visit) -> None:
        self._model, self._layers, self._local, self._visit = model, layers, local, visit
        self._hidden: dict[int, Tensor] = {}

    def price(self, ids: Tensor, seed: int) -> None:
        """Price one document. Activations between layers are kept, those inside are computed twice.

        Args:
            ids: [tokens] ids.
            seed: Of the labels that are drawn.

        Raises:
            CalibrationError: The model can't run backward, or its gradients are not finite.
        """
        ids = ids[None].to(input_device(self._model))
        seen = seen_by(self._attend, self._model, self._layers, local=self._local)
        with seen, given_to(self._model, self._hidden), ready(self._model):
            try:
                output = without_head(self._model)(input_ids=ids, use_cache=False)
                hidden = output.last_hidden_state
                hidden.backward(gradient_of_labels(self._model, output, ids, seed))
            except (PatchAttnError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                raise CalibrationError(
                    f"{type(self._model).__name__} can't run backward, which prices need: {first_line(error)}.",
                    fix="measure without prices, or load the weights in a dtype that has gradients",
                ) from error

    def _attend(self, layer: int, inputs: AttentionInputs, _: Callable[[], Attended]) -> Attended:
        output = attention_with_graph(inputs)
        if not output.requires_grad:
            # Nothing before the first priced layer needs a graph.
            output.requires_grad_()
        dense = output.detach()
        given = replace(inputs, query=inputs.query.detach(), key=inputs.key.detach(), value=inputs.value.detach())
        output.register_hook(partial(self._priced, layer, given, self._hidden[layer], dense))
        opened = inputs.regions.asked[:, None].expand(inputs.query.shape[:3])
        return Attended(output, opened, inputs.regions.n_causal.sum() * inputs.query.shape[1])

    @torch.no_grad()
    def _priced(self, layer: int, inputs: AttentionInputs, hidden: Tensor, dense: Tensor, gradient: Tensor) -> None:
        closed, local = closed_attention(inputs)
        along = (gradient.double() * (closed.double() - dense.double())).sum(-1)
        cost = torch.where(inputs.regions.asked[:, None], along.square() / 2, 0)
        if not cost.isfinite().all():
            raise CalibrationError(
                f"The gradients of layer {layer} are not finite.",
                fix="load the model in float32 or bfloat16, or measure without prices",
            )
        self._visit(layer, Priced(inputs, hidden, local, cost))


def gradient_of_labels(model: Any, output: Any, ids: Tensor, seed: int) -> Tensor:
    """Draw a label at every position from the model's own prediction, and differentiate their summed log-probability.

    Args:
        model: The model.
        output: What its decoder returned for the tokens.
        ids: [1, tokens] the tokens.
        seed: Of the labels.

    Returns:
        Gradient with respect to the decoder's hidden states, [1, tokens, dim].
    """
    hidden = output.last_hidden_state.detach()
    found = torch.empty_like(hidden)
    size = max(_MOST_LOGITS // vocabulary_of(model), 1)
    generator = torch.Generator().manual_seed(seed)
    with head_of(model, output) as logits_of:
        for begin in range(0, ids.shape[1], size):
            part = hidden[:, begin : begin + size].clone().requires_grad_()
            logits = logits_of(ids[:, begin : begin + size], part)[0]
            labels = drawn(logits.detach(), generator)
            log_probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            (of_part,) = torch.autograd.grad(log_probability.gather(1, labels[:, None]).sum(), part)
            found[:, begin : begin + size] = of_part
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
def ready(model: Any) -> Iterator[None]:
    """Let a model be differentiated by what its layers compute: weights are constants, layers are checkpointed.

    Everything is as it was on exit.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        for layer in _layers_around(model):
            stack.enter_context(replaced_forward(layer, partial(checkpoint, layer.forward, use_reentrant=False)))
        try:
            for parameter in trained:
                parameter.requires_grad_(requires_grad=False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(requires_grad=True)


def _layers_around(model: nn.Module) -> list[nn.Module]:
    """Return the modules of lists that hold the attention modules: the decoder's layers."""
    held = {id(module) for module in attention_modules(model).values()}
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part if any(id(inner) in held for inner in layer.modules())]
    # The innermost list: layers may stand in blocks of layers.
    return [layer for layer in layers if not any(other is not layer and _holds(layer, other) for other in layers)]


def _holds(module: nn.Module, other: nn.Module) -> bool:
    return any(inner is other for inner in module.modules())
