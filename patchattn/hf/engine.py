"""Continuous batching: the engine of transformers, run on a patched model; what it calls things is known here.

All ways in - `generate_batch`, the context manager, the manager itself, `transformers serve` - go through
`model.init_continuous_batching`, which a patched model answers with a manager of its own. That one differs in three
things: it does not switch the attention implementation, so that no mask is made; it lets attention modules know which
rows and pages are whose; and it refuses a request that the model can't read or its cache never hold, which would end
all others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from patchattn.call.paged import PagedStore, Scratch
from patchattn.errors import PatchStateError
from patchattn.hf.answering import Answering
from patchattn.hf.pages import LayerPages, RequestMemory, Sequence, Step
from patchattn.hf.servable import check_config, check_heads, check_servable, manager_class

_CACHED = "_cached_continuous_batching_manager"
_MEMORY = "patchattn"


ENGINE_ARGUMENTS = frozenset(
    {
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "read_index",
        "write_index",
        "logits_indices",
        "block_table",
        "logits_processor_args",
        "is_causal",
    }
)
"""What the engine gives every attention module; the pages say the same."""


class Batching(Answering):
    """Makes a model start managers that know its patch.

    Args:
        model: The model; one that knows no continuous batching is left as it is. None if there is none any more.
    """

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__(model, init_continuous_batching=self.start)
        self._managers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.serves = False

    def start(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """Do what `init_continuous_batching` of the model does, with a manager that knows the patch.

        Raises:
            UnsupportedCallError: The model, its patch or the configuration can't be served; says why.
            PatchStateError: A manager from before the patch is kept with the model.
        """
        model, base = self.model, manager_class()
        generation_config = generation_config or model.generation_config
        # The engine's own method looks there too.
        config = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
        check_servable(model, config)
        kept = getattr(model, _CACHED, None)
        if kept is not None and kept not in self._managers:
            raise PatchStateError(
                "The model keeps a manager of continuous batching from before it was patched.",
                fix="call model.destroy_cached_continuous_batching_manager() first",
            )
        if kept is not None:
            return kept
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # as the model's own method does
        manager = _patched_class(base)(
            self,
            model=model,
            generation_config=generation_config,
            continuous_batching_config=config or ContinuousBatchingConfig(),
            workload_hints=workload_hints,
        )
        self._managers.add(manager)
        self.serves = True
        return manager

    def check_idle(self) -> None:
        """Refuse to go on while requests are served.

        Raises:
            PatchStateError: A manager runs.
        """
        if any(manager.is_running() for manager in self._managers):
            raise PatchStateError(
                "The model is serving requests, which need its patch to the end.",
                fix="stop the manager first: manager.stop(block=True)",
            )

    def undo(self) -> None:
        """Give the model its method back, and end what it keeps of this patch; does nothing the second time."""
        super().undo()
        if getattr(self.model, _CACHED, None) in self._managers:
            self.model.destroy_cached_continuous_batching_manager()


class StepPages:
    """Gives attention modules the pages of the step that the engine is at.

    Args:
        processor: The engine's processor of batches.
        memories: What is kept of each request, by its id; forgotten with the engine's own state of it.
    """

    def __init__(self, processor: Any, memories: weakref.WeakValueDictionary[str, RequestMemory]) -> None:
        # Weak, for the processor holds its cache, which holds this.
        self._processor, self._memories = weakref.proxy(processor), memories
        self._listed: Any = None
        self._step = Step([])
        self._stacked: dict[int, Any] = {}
        self._scratch = Scratch()
        self._stores: dict[int, PagedStore] = {}

    def settle_after(self, processor: Any) -> None:
        """Count what the gates of each step did once the engine has waited for its tokens."""
        retrieve = processor.inputs_and_outputs.retrieve_device_outputs

        def retrieve_device_outputs() -> None:
            retrieve()
            self._step.settle()

        processor.inputs_and_outputs.retrieve_device_outputs = retrieve_device_outputs

    def step(self) -> Step:
        """Return the sequences of this step."""
        listed = self._processor.inputs_and_outputs.requests_in_batch
        if listed is not self._listed:
            self._listed, self._step = listed, Step(list(self._sequences(listed)))
        return self._step

    def _sequences(self, listed: list[Any]) -> Iterator[Sequence]:
        begin = first_key = 0
        layers = len(self._processor.cache.layer_to_allocator)
        for future in listed:
            # The engine has counted the rows of this step already.
            state, queries, keys = future.state, future.query_length, future.state.position_offset
            memory = vars(state).get(_MEMORY) or RequestMemory(layers)
            vars(state)[_MEMORY] = self._memories[state.request_id] = memory
            yield Sequence(begin, queries, keys, first_key, memory)
            begin, first_key = begin + queries, first_key + keys

    def of_layer(self, layer: int, arguments: Mapping[str, Any]) -> LayerPages:
        """Return the pages of a full layer, from the arguments that the engine gives its attention module."""
        allocator = self._processor.cache.layer_to_allocator[layer]
        index, size, stride = allocator.index, allocator.tokens_per_page, allocator.block_physical_stride
        if layer not in self._stores:
            # Each layer's begins where its first page does. As long as that of the last one, they have one shape.
            length = (2 * len(allocator.cache_tensor) // stride - 1) * stride + size
            key, value = (x[:length] for x in allocator._kv_token_views[layer])
            self._stores[layer] = PagedStore(key, value, self._scratch)
        places, write_to = arguments["read_index"][index], arguments["write_index"][index]
        return LayerPages(self.step(), self._stores[layer], places, write_to, self._stacked, size, stride)

    def window_of(self, layer: int) -> int:
        """Return the window of a sliding layer, tokens."""
        return self._processor.cache.layer_to_allocator[layer].sliding_window


@functools.cache
def _patched_class(base: type) -> Any:
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    class Router(OutputRouter):
        """Puts what the gates did for a request on each of its outputs, as `gates`."""

        def __init__(self, memories: weakref.WeakValueDictionary[str, RequestMemory]) -> None:
            super().__init__()
            self.memories = memories

        def deliver(self, output: Any) -> None:
            super().deliver(self._with_gates(output))

        def deliver_batch(self, outputs: list[Any]) -> None:
            super().deliver_batch([self._with_gates(output) for output in outputs])

        def _with_gates(self, output: Any) -> Any:
            memory = self.memories.get(output.request_id)
            output.gates = (memory or RequestMemory(0)).gates()
            return output

    class PatchedManager(base):
        def __init__(self, batching: Batching, **given: Any) -> None:
            super().__init__(**given)
            # What was left open has been decided by now.
            check_config(self.continuous_batching_config)
            check_heads(self.model, self.distributed_helper)
            self.patchattn_batching = batching
            self.patchattn_memories: weakref.WeakValueDictionary[str, RequestMemory] = weakref.WeakValueDictionary()
            self.output_router = Router(self.patchattn_memories)

        def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:  # noqa: FBT001, FBT002
            """Leave the attention as it is: that of a patched model reads pages."""

        def start(self) -> None:
            if self.patchattn_batching.is_undone:
                raise PatchStateError(
                    "The patch that this manager was made for is undone.",
                    fix="make a manager anew: model.init_continuous_batching(...)",
                )
            super().start()

        def _create_batch_processor(self) -> Any:
            processor = super()._create_batch_processor()
            processor.cache.patchattn_pages = pages = StepPages(processor, self.patchattn_memories)
            pages.settle_after(processor)
            _guard(processor, self.model.get_input_embeddings().num_embeddings)
            _forget_cancelled(processor.scheduler, self.output_router)
            return processor

    PatchedManager.__name__ = PatchedManager.__qualname__ = base.__name__
    return PatchedManager


def _guard(processor: Any, vocabulary: int) -> None:
    """Make the engine fail a request that it can't read or hold; it would end all requests when it comes to that.

    Args:
        processor: The engine's processor of batches.
        vocabulary: How many tokens the model knows.
    """
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

    scheduler = processor.scheduler
    if "add_waiting_request" in vars(scheduler):
        return  # a manager that was kept; its cache is not empty, from which the room is seen
    room = infer_max_single_request_tokens(processor.cache)
    add = type(scheduler).add_waiting_request

    def add_waiting_request(state: Any) -> None:
        prompt, new = len(state.initial_tokens), state._new_tokens_limit
        if not prompt:
            raise ValueError("The prompt is empty. Give it at least one token.")
        least, largest = min(state.initial_tokens), max(state.initial_tokens)
        if least < 0 or largest >= vocabulary:
            raise ValueError(
                f"The prompt's tokens go from {least:,} to {largest:,}; the model knows 0 to {vocabulary - 1:,}. Make "
                "them with the model's own tokenizer."
            )
        most = 1 if state.max_new_tokens is None else new
        # The last token is never read.
        if prompt + most - 1 > room:
            raise ValueError(
                f"The request needs {prompt + most - 1:,} tokens of cache for a prompt of {prompt:,} and {most:,} new "
                f"ones; the cache holds {room:,}. Shorten it, ask for fewer new tokens, or serve with more blocks."
            )
        # Without a limit of its own a request ends where the cache does.
        state._new_tokens_limit = min(new, room - prompt + 1)
        add(scheduler, state)

    scheduler.add_waiting_request = add_waiting_request


def _forget_cancelled(scheduler: Any, router: Any) -> None:
    """Make the engine forget who waits for a cancelled request, which it tells nobody about and keeps for ever."""
    clear = type(scheduler).clear_cancelled_requests

    def clear_cancelled_requests() -> Any:
        states = clear(scheduler)
        with router._lock:
            for state in states:
                router.result_handlers.pop(state.request_id, None)
        return states

    scheduler.clear_cancelled_requests = clear_cancelled_requests
