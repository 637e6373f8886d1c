"""Reading tokens with a patched model whose attention calls are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.gates import OpenGate
from patchattn.gates.moment import with_offsets
from patchattn.hf.architecture import without_head
from patchattn.hf.observe import Observer, observing
from patchattn.hf.patching import patch
from patchattn.hf.weights import input_device
from patchattn.measuring.statistics import Document, Settings
from patchattn.moments.gaussian import DEFAULT_ESTIMATE, Estimate
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.policy import Policy


@contextmanager
def seen_by(observer: Observer, model: Any, layers: tuple[int, ...], *, local: tuple[int, int]) -> Iterator[None]:
    """Show the attention calls of some layers to an observer; the model is patched within the block, all gates open.

    Args:
        observer: See `patchattn.hf.observe.observing`.
        model: The model.
        layers: Indices of the layers.
        local: Sink and window, tokens.
    """
    policy = Policy(sink_size=local[0], window_size=local[1], gate=OpenGate(), layers=layers, min_bulk=0)
    with patch(model, policy, backend="reference", record=None) as handle, observing(handle, observer):
        yield


class Collecting:
    """Let the layers of a model add to documents; undone on exit.

    Args:
        model: The model.
        policy: Sink and window.
        settings: What is measured.
        margins: By layer the margin in nats from which each head closes, [heads], to measure on gated activations;
            None measures on dense ones.
        estimate: Whose margins they are.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        settings: Settings,
        *,
        margins: Mapping[int, Tensor] | None = None,
        estimate: Estimate = DEFAULT_ESTIMATE,
    ) -> None:
        local = (policy.sink_size, policy.window_size)
        self._seen: AbstractContextManager[None] = seen_by(self._attend, model, settings.layers, local=local)
        self._margins = margins or {}
        self._estimate: Estimate = estimate

    def __enter__(self) -> Collecting:
        """Patch the model."""
        self._seen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Give the model back."""
        self._seen.__exit__(*error)

    def start(self, document: Document) -> None:
        """Let the calls that follow add to a document."""
        self._document = document

    def _attend(self, layer: int, inputs: AttentionInputs, _: Callable[[], Attended]) -> Attended:
        dense = self._document.attend(layer, inputs)
        if layer not in self._margins:
            return dense
        mass, _state = bulk_log_mass_from_prompt(inputs, estimate=self._estimate)
        return blockwise_attend(inputs, with_offsets(mass, self._margins[layer][:, None]), 0.0)


@torch.no_grad()
def read_document(model: Any, ids: Tensor) -> None:
    """Read a document, [tokens] ids, without making logits: those of every position can take more than all else."""
    without_head(model)(input_ids=ids[None].to(input_device(model)), use_cache=False)
