"""Assisted generation with a model as its own assistant; what transformers calls things there is known here only.

`generate` of transformers verifies drafts, samples, stops, streams and processes logits. A drafting model hands itself
to it as the assistant and makes the candidates: steps of decode that go through the gates, on the cache of the call
itself, which are taken out of the cache again before the dense call that checks them writes the same tokens anew.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchattn.errors import UnsupportedCallError
from patchattn.hf.answering import Answering
from patchattn.hf.architecture import cache_among
from patchattn.hf.cache import key_bytes
from patchattn.hf.draft_length import DraftLength
from patchattn.report.drafts import DraftCounts

Prefill = Literal["dense", "gated"]

_UNPATCH = "call patchattn.unpatch(model) first; patchattn.patch(model) has no such limit"
_DYNAMIC = "leave cache_implementation out for a dynamic cache"
_ALONE = "generate one text at a time, or call patchattn.unpatch(model) first"


class Drafting(Answering):
    """Makes a model draft in its own `generate`; also the switch that its layers look at.

    Layers attend densely while `is_on` is False.

    Args:
        model: The model; None if there is none any more.
        tokens: Tokens of each draft; None adapts.
        prefill: Whether the first call of a text is dense or goes through the gates.
    """

    def __init__(self, model: nn.Module | None, tokens: int | None, prefill: Prefill) -> None:
        super().__init__(
            model,
            generate=self.generate,
            _get_candidate_generator=self._candidates,
            _get_stopping_criteria=self._stopping_criteria,
            prepare_inputs_for_generation=self._inputs,
        )
        self.tokens = tokens
        self.prefill: Prefill = prefill
        self.is_on = self.keeps_moments = False
        self.length = DraftLength(tokens)
        self._criteria: Any = None
        # Another text at the same time would be verified while the first one drafts.
        self._one_at_a_time = threading.RLock()

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a copy is made with, beside its model."""
        return self.tokens, self.prefill

    @property
    def counts(self) -> DraftCounts:
        """What was drafted so far."""
        return self.length.counts

    def reset_report(self) -> None:
        """Forget what was counted; what was learned about lengths stays."""
        self.length.counts = DraftCounts()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Let calls go through the gates."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Do what `generate` of the model does, with drafts.

        Raises:
            UnsupportedCallError: Drafts can't be had in this way of generating; says why.
        """
        model = self.model
        stock = type(model).generate
        given = inspect.signature(stock).bind(model, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        _check(model, given)
        with self._one_at_a_time:
            self.length.begin()
            try:
                return stock(model, *args, **{**kwargs, "assistant_model": model})
            finally:
                self.is_on, self._criteria = False, None

    def _stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        self._criteria = type(self.model)._get_stopping_criteria(self.model, *args, **kwargs)
        return self._criteria

    def _candidates(
        self, generation_config: Any, input_ids: Tensor, model_kwargs: dict[str, Any], logits_processor: Any, **_: Any
    ) -> Candidates:
        if input_ids.shape[0] > 1:
            raise _refused(
                f"Assisted generation of transformers takes one text, and these are {len(input_ids)}.", _ALONE
            )
        cache = cache_among(model_kwargs.values())
        if cache is not None and not cache.is_croppable:
            raise _refused("Its cache can't be cropped; static caches can't where layers slide.", _DYNAMIC)
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if cache is not None and int(cache.get_seq_length()) and length not in (None, input_ids.shape[1]):
            raise _refused(
                f"The call continues a text of {length} tokens and brings only {input_ids.shape[1]} of them.",
                "pass the whole text with its cache; only what is new is read",
            )
        forward = self.model
        if forward._valid_auto_compile_criteria(model_kwargs, generation_config):
            forward = forward.get_compiled_call(generation_config.compile_config)
        return Candidates(self, generation_config, logits_processor, self._criteria, forward)

    def _inputs(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Prepare a call; assisted generation of transformers reads all of a text again whose cache is filled."""
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None:
            cache = cache_among(kwargs.values())
            known = 0 if cache is None else int(cache.get_seq_length())
            kwargs["next_sequence_length"] = input_ids.shape[1] - known if known else None
        return type(self.model).prepare_inputs_for_generation(self.model, input_ids, **kwargs)


class Candidates:
    """Makes the candidates of one text: what transformers calls a candidate generator.

    Args:
        drafting: The switch, and the length of drafts.
        config: The generation configuration.
        processors: Logits processors.
        criteria: Stopping criteria of the text.
        forward: The model, or its compiled call.
    """

    requires_model_outputs = True

    def __init__(self, drafting: Drafting, config: Any, processors: Any, criteria: Any, forward: Any) -> None:
        self.model_kwargs_overrides: dict[str, Any] = {}
        self._drafting, self._config = drafting, config
        self._processors, self._criteria, self._forward = processors, criteria, forward
        self._states = [state for state in drafting.model.modules() if getattr(state, "drafting", None) is drafting]
        self._fixed: float | None = None
        self._drafted, self._why, self._began, self._took = 0, "", 0.0, 0.0
        self._is_prefill = True

    def get_candidates(
        self, input_ids: Tensor, *, model_kwargs: dict[str, Any], is_first_iteration: bool, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Draft tokens that may follow.

        Args:
            input_ids: [1, tokens]; the text so far.
            model_kwargs: What the model is called with, the cache among it: that of all tokens but the last.
            is_first_iteration: Whether the prompt is still to be read.

        Returns:
            The text with the draft, [1, tokens + drafted], and for sampling the processed logits of the drafted tokens,
            [1, drafted, vocabulary] float32.
        """
        self._is_prefill = is_first_iteration
        if is_first_iteration:
            self._drafting.is_on, self._drafting.keeps_moments = self._drafting.prefill == "gated", True
            return input_ids, None
        self._drafting.is_on = False
        began = time.perf_counter()
        length, self._why = self._length(input_ids, model_kwargs)
        ids, logits = self._draft(input_ids, model_kwargs, length) if length else (input_ids, [])
        self._drafted = len(logits)
        if not self._drafted:
            self._why = self._why or "last token"  # the first one drafted would end the text
        self._began = time.perf_counter()
        self._took = self._began - began
        return ids, torch.stack(logits, 1) if logits and self._config.do_sample else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: Any) -> None:
        """Learn how many of the drafted tokens were kept.

        Args:
            input_ids: The text with what was kept.
            scores: The processed logits of the dense call.
            num_matches: The number of drafted tokens that were kept.
        """
        if not self._is_prefill:
            verifying = time.perf_counter() - self._began
            self._drafting.length.saw(self._drafted, int(num_matches), self._took, verifying, self._why)

    def _length(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[int, str]:
        """Say how many tokens to draft, or why none."""
        room = self._config.max_length - input_ids.shape[1] - 1
        if room < 1:
            return 0, "last token"
        cache = cache_among(model_kwargs.values())
        keys = int(cache.get_seq_length()) + 1
        with self._drafting.on():
            if all(state.why_dense(keys, "decode") is not None for state in self._states):
                return 0, "short"
        length, why = self._drafting.length.choose(self._least(cache, keys))
        return min(length, room), why

    def _least(self, cache: Any, keys: int) -> float:
        """Say what a step reads whose heads are all closed, of what a dense one does: weights, keys and values."""
        gated = [state for state in self._states if state.gated]
        if self._fixed is None:
            # In keys: as many take as many bytes as all weights do.
            weights = sum(weight.nbytes for weight in self._drafting.model.parameters())
            self._fixed = weights / sum(key_bytes(cache, state.cache_layer) for state in gated)
        local = gated[0].policy.sink_size + gated[0].policy.window_size
        return (self._fixed + min(local, keys)) / (self._fixed + keys)

    def _draft(self, input_ids: Tensor, model_kwargs: dict[str, Any], length: int) -> tuple[Tensor, list[Tensor]]:
        drafting, ids, logits, steps = self._drafting, input_ids, [], 0
        with drafting.on(), self._decoding():
            for steps in range(1, length + 1):
                drafting.keeps_moments = steps == 1
                found = self._step(ids, model_kwargs, steps - 1)
                found = self._processors(ids, found)
                token = found.softmax(-1).multinomial(1) if self._config.do_sample else found.argmax(-1, keepdim=True)
                longer = torch.cat([ids, token], 1)
                # The last token of a text comes from the dense call, for nothing looks at tokens before the last one.
                if bool(self._criteria(longer, None).all()):
                    break
                ids = longer
                logits.append(found)
        cache_among(model_kwargs.values()).crop(-steps)
        return ids, logits

    def _step(self, ids: Tensor, model_kwargs: dict[str, Any], drafted: int) -> Tensor:
        """Read the last token through the gates; returns the logits of the next, [1, vocabulary] float32."""
        from transformers.generation import candidate_generator as made

        model, length = self._drafting.model, ids.shape[1]
        kwargs = made._prepare_attention_mask(copy.copy(model_kwargs), length, False)  # noqa: FBT003
        kwargs = made._prepare_token_type_ids(kwargs, length)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs = made._prepare_position_ids(kwargs, positions.shape[-1] + drafted, False)  # noqa: FBT003
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, is_first_iteration=False, **kwargs)
        # A copy: what a compiled call returns may be overwritten by the next.
        return self._forward(**inputs).logits[:, -1].to(torch.float32, copy=True)

    def _decoding(self) -> Any:
        optimised = getattr(self._drafting.model, "_optimize_model_for_decode", None)
        return contextlib.nullcontext() if optimised is None else optimised()


def _check(model: Any, given: dict[str, Any]) -> None:
    """Refuse ways of generating that know no drafts, and drafts of others.

    Raises:
        UnsupportedCallError: Says what and why.
    """
    if given.get("assistant_model") is not None:
        raise _refused("It makes the drafts itself, and an assistant_model is given beside it.", "drop assistant_model")
    if given.get("inputs_embeds") is not None:
        raise _refused(
            "Assisted generation of transformers counts tokens, and inputs_embeds has none.", "pass input_ids"
        )
    if given.get("custom_generate") is not None:
        raise _refused("custom_generate replaces the loop that verifies drafts.", "drop custom_generate")
    options = {name: value for name, value in given.items() if name not in ("self", "generation_config")}
    config = model._prepare_generation_config(given.get("generation_config"), **options)[0]
    mode = config.get_generation_mode(None)
    if mode == "assisted_generation":
        raise _refused(
            "It makes the drafts itself, and others are asked for beside it (prompt_lookup_num_tokens, "
            "assistant_early_exit or use_mtp).",
            "leave these out",
        )
    if mode not in ("greedy_search", "sample"):
        raise _refused(
            f"This is {mode.replace('_', ' ')}, and drafts are verified in greedy search and sampling only.", _UNPATCH
        )
    if config.num_return_sequences and config.num_return_sequences > 1:
        raise _refused(
            f"Assisted generation of transformers writes one text, and num_return_sequences is "
            f"{config.num_return_sequences}.",
            _ALONE,
        )
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        raise _refused("assistant_ensemble_weight keeps tokens that dense attention would not.", "leave it out")
    if config.use_cache is False:
        raise _refused("Drafts are written to the cache, and use_cache is False.", "leave use_cache as it is")
    _check_cache(cache_among(given.values()), config.cache_implementation)


def _check_cache(cache: Any, kind: str | None) -> None:
    """Refuse caches that can't be cropped, as far as it is known before they are filled."""
    from transformers.cache_utils import QuantizedCache, StaticCache, StaticLayer

    is_static = isinstance(cache, StaticCache) or kind in ("static", "offloaded_static", "hybrid", "sliding_window")
    if is_static and not hasattr(StaticLayer, "crop"):
        raise _refused(
            "Static caches can be cropped from transformers 5.24 on.",
            f'pip install "transformers>=5.24", or {_DYNAMIC}',
        )
    # Up to 5.23 they say of themselves that they can be cropped, and lose what is not quantised yet.
    if isinstance(cache, QuantizedCache) or kind == "quantized":
        raise _refused("Quantised caches can't be cropped.", _DYNAMIC)
    if kind == "paged":
        raise _refused("Continuous batching verifies no drafts.", _DYNAMIC)


def _refused(reason: str, fix: str) -> UnsupportedCallError:
    return UnsupportedCallError(f"A drafting model can't generate like this. {reason}", fix=fix)
