"""Logits of some positions at a time, made as the model makes them, with whatever it does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from patchattn.hf.architecture import underlying, without_head


@contextmanager
def head_of(model: Any, output: Any) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Make logits of hidden states without reading the tokens again.

    Within the block the model's decoder answers with the hidden states that are asked about, so that what the model
    does after it (norms, the output matrix, factors, caps) is all in the logits.

    Args:
        model: The model.
        output: What its decoder returned; of it only the hidden states are replaced.

    Yields:
        A function of token ids, [batch, tokens], and their hidden states, [batch, tokens, dim], that returns logits,
        [batch, tokens, vocabulary].
    """
    model = underlying(model)
    given: list[Tensor] = []

    def answer(*_: Any, **__: Any) -> Any:
        return type(output)(**{**output, "last_hidden_state": given[-1]})

    def logits(ids: Tensor, hidden: Tensor) -> Tensor:
        given[:] = [hidden]
        return model(input_ids=ids, use_cache=False).logits

    with replaced_forward(without_head(model), answer):
        yield logits


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let another function answer for a module; its hooks stay in place."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        # Some tools give a module a forward of its own; else the class's comes back.
        del module.forward
        if own is not None:
            module.forward = own
