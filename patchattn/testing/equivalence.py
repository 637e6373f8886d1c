"""Proof, on a user's own model, that patching changes nothing but what the gates decide."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchattn.gates import ClosedGate, OpenGate
from patchattn.hf.architecture import cache_of, context_of, vocabulary_of, with_cache
from patchattn.hf.observe import observing
from patchattn.hf.patching import PatchHandle, patch
from patchattn.hf.support import attention_modules
from patchattn.hf.weights import input_device, input_dtype
from patchattn.moments.gaussian import CHUNK
from patchattn.policy import Phase, Policy
from patchattn.testing.budget import error_budget
from patchattn.testing.watch import Watch

_TRUTH = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


class ProvesNothingError(AssertionError):
    """A run in which no gate was open, none was closed, or calls went around the gate; says what to change."""


@dataclass(frozen=True)
class Equivalence:
    """What `assert_equivalent` compared. Printing it gives a summary.

    Args:
        policy: The policy, with every `"auto"` resolved.
        backend: The backend that ran.
        tokens: Real tokens of the inputs, and tokens decoded one by one after them, over all sequences.
        layers: Layers whose gates decided.
        calls: Attention calls compared with dense attention, open gates and the policy's gates together.
        open_fraction: Share of the pairs asked that opened, by phase; phases without any are left out.
        layer_error: Largest error of an attention layer as a share of its error budget.
        logit_error: The same for the logits of the model with all gates open, against the stock model.
        decisions_checked: Whether the decisions were compared with float64 too; gates that need a calibration are not.
    """

    policy: Policy
    backend: str
    tokens: int
    layers: tuple[int, ...]
    calls: int
    open_fraction: dict[Phase, float]
    layer_error: float
    logit_error: float
    decisions_checked: bool

    def __str__(self) -> str:
        """Return the summary."""
        shares = ", ".join(f"{100 * share:.1f}% in {phase}" for phase, share in self.open_fraction.items())
        decisions = "equal float64 up to rounding" if self.decisions_checked else "not compared with float64"
        return "\n".join(
            [
                f"Equivalent ({self.backend}, {self.tokens} tokens, layers {', '.join(map(str, self.layers))}):",
                f"  all gates open: logits equal the stock model's, error {self.logit_error:.2f} of the budget",
                f"  gates of the policy: {shares} open; decisions {decisions}",
                f"  {self.calls} attention calls equal dense attention under the token-level mask, "
                f"error {self.layer_error:.2f} of the budget at most",
            ]
        )


def assert_equivalent(
    model: Any,
    policy: Policy | None = None,
    inputs: Tensor | Mapping[str, Tensor] | None = None,
    *,
    length: int | None = None,
    new_tokens: int = 0,
    backend: str = "auto",
    seed: int = 0,
) -> Equivalence:
    """Prove on a model of your own that patching changes nothing but what the gates decide.

    Three runs over the same tokens: the stock model; the patched model with every gate open, whose logits must equal
    the stock model's; and the patched model with the policy's gates. In both patched runs each attention call is
    computed again, from the queries, keys and values that the layer was given, as dense attention in float64 under the
    token-level mask that the recorded decisions amount to, and the decisions are compared with float64 too. Errors may
    reach `2 * (err_of_plain + eps * max|truth|)`, with the plain computation in the model's dtype, over the calls of
    the layer so far; so float32 proves more than bfloat16.

    Slow and hungry: scores are computed densely in float64, and the stock logits are judged by a copy of the model in
    the next wider dtype, which takes two (float32) or two (16 bits) times the memory of the weights. The model itself
    is patched for the runs only and left as it was, also after a failure.

    Args:
        model: A Hugging Face causal language model in evaluation mode, in float32, bfloat16 or float16.
        policy: What to prove; None means `Policy(min_bulk=0)`. With `min_bulk="auto"` inputs have to be long.
        inputs: Token ids [batch, tokens], or a mapping with `input_ids` and optionally `attention_mask` of that shape,
            as a tokenizer returns it. None means random tokens.
        length: Number of random tokens; None means three chunks of bulk keys beyond sink, window and `min_bulk`.
        new_tokens: Number of tokens to decode one by one with a cache after the inputs; the stock model's greedy
            choices.
        backend: As for `patchattn.patch`.
        seed: Seed of the random tokens.

    Returns:
        What was compared, with the open fractions and the largest errors. Print it.

    Raises:
        AssertionError: Something differs; names the first layer, batch row, head and query, with the numbers.
        ProvesNothingError: The run does not show anything; says what to change. A kind of AssertionError.
        ValueError: Inputs, dtype or mode of the model that can't be used.
        PatchAttnError: What `patchattn.patch` raises for this model and policy.

    Example:
        >>> from patchattn import MomentGate, Policy
        >>> from patchattn.testing import assert_equivalent, tiny_model
        >>> policy = Policy(sink_size=4, window_size=32, min_bulk=0, gate=MomentGate(threshold=0.3))
        >>> result = assert_equivalent(tiny_model("llama"), policy, new_tokens=2)
        >>> result.layers
        (0, 1, 2)
    """
    policy = Policy(min_bulk=0) if policy is None else policy
    with patch(model, policy, backend=backend) as handle:
        policy = handle.policy
    wider = _wider_dtype(model)
    text = _Text.of(model, policy, inputs, length, new_tokens, seed)
    with torch.no_grad():
        stock = _run(model, text)
        truth = _truth(model, wider, text)
        every = policy.model_copy(update={"gate": OpenGate(), "min_bulk": 0})
        logits, opened, _ = _patched_run(model, every, text, backend, "With all gates open")
        logit_error = _compare_logits(logits, stock, truth, text)
        _, gated, handle = _patched_run(model, policy, text, backend, "With the policy's gates")
    _check_that_it_proves_something(gated, handle.report().dense_calls, policy, text)
    return Equivalence(
        policy,
        handle.backend,
        int(text.mask.sum()),
        policy.layers or (),
        opened.calls + gated.calls,
        gated.open_fraction(),
        max(opened.worst, gated.worst),
        logit_error,
        gated.decisions_checked,
    )


@dataclass
class _Text:
    """The tokens of all runs: `prompt` of them at once, the rest one by one."""

    ids: Tensor
    mask: Tensor
    prompt: int
    decoded: bool = False
    step: slice = field(default_factory=lambda: slice(0, 0))

    @classmethod
    def of(
        cls,
        model: Any,
        policy: Policy,
        inputs: Tensor | Mapping[str, Tensor] | None,
        length: int | None,
        new_tokens: int,
        seed: int,
    ) -> _Text:
        device = input_device(model)
        local = policy.sink_size + policy.window_size
        break_evens = sorted(map(policy.break_even, policy.phases))
        needed = local + break_evens[0]
        if inputs is None:
            length = local + break_evens[-1] + 3 * CHUNK if length is None else length
            draw = torch.Generator().manual_seed(seed)
            inputs = torch.randint(0, vocabulary_of(model), (1, length), generator=draw)
        elif length is not None:
            raise ValueError("length is the number of random tokens and goes without inputs; drop one of them.")
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        unknown = sorted(set(given) - {"input_ids", "attention_mask"})
        if unknown or "input_ids" not in given:
            raise ValueError(
                f"Expected input_ids and optionally attention_mask, got {sorted(given)}; leave out everything else."
            )
        ids = given["input_ids"].to(device)
        mask = given.get("attention_mask", torch.ones_like(ids)).to(device)
        if ids.dim() != 2 or mask.shape != ids.shape or new_tokens < 0:
            raise ValueError(
                f"Expected ids and mask of one shape [batch, tokens] and new_tokens >= 0, got {tuple(ids.shape)}, "
                f"{tuple(mask.shape)} and {new_tokens}."
            )
        if ids.shape[1] + new_tokens <= needed:
            raise ProvesNothingError(
                f"This proves nothing: {ids.shape[1]} tokens and {new_tokens} new ones don't reach beyond "
                f"sink_size + window_size + min_bulk = {needed}. Use longer inputs, or a smaller window_size or "
                "min_bulk."
            )
        longest = context_of(model)
        if longest is not None and ids.shape[1] + new_tokens > longest:
            raise ValueError(
                f"{ids.shape[1]} tokens and {new_tokens} new ones are more than the {longest} positions of the model. "
                "Use shorter inputs, or a smaller window_size or min_bulk."
            )
        padded = torch.cat([mask, mask.new_ones(mask.shape[0], new_tokens)], dim=1)
        return cls(torch.cat([ids, ids.new_zeros(ids.shape[0], new_tokens)], dim=1), padded, ids.shape[1])

    def steps(self) -> list[slice]:
        """Slots of each forward call."""
        return [slice(0, self.prompt), *(slice(at, at + 1) for at in range(self.prompt, self.ids.shape[1]))]


def _run(model: Any, text: _Text, watch: Watch | None = None) -> list[Tensor]:
    """Run the model over the text, the prompt at once and the rest one by one; returns the logits of each call.

    Tokens to be decoded are the greedy choices of the first run, which writes them into the text.
    """
    cache, logits, first_run = None, [], not text.decoded
    for step in text.steps():
        text.step = step
        if watch is not None:
            watch.begin = step.start
        extra = {} if cache is None else with_cache(model, cache)
        output = model(
            input_ids=text.ids[:, step],
            attention_mask=text.mask[:, : step.stop],
            use_cache=text.prompt < text.ids.shape[1],
            **extra,
        )
        cache = cache_of(output)
        logits.append(output.logits)
        if first_run and step.stop < text.ids.shape[1]:
            text.ids[:, step.stop] = output.logits[:, -1].argmax(-1)
    text.decoded = True
    return logits


def _truth(model: Any, wider: torch.dtype, text: _Text) -> list[Tensor]:
    """Run a copy of the stock model in a wider dtype, which weights that are packed or elsewhere may not allow."""
    try:
        return _run(_without_padding_rows(copy.deepcopy(model).to(wider), text), text)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"Expected a model of which a copy runs in {wider}, to judge the stock logits by; this "
            f"{type(model).__name__} has none ({str(error).strip().splitlines()[0]}). Prove it without quantised or "
            "offloaded weights."
        ) from error


def _without_padding_rows(model: Any, text: _Text) -> Any:
    """Have the attention of a copy give zeros for padding rows, which reach nobody.

    Eager attention of transformers 5.23 gives NaN in float64 for rows that see no key, and as keys and values of the
    next layer they would spoil the real rows too.
    """

    def zeros_for_padding(module: Any, args: Any, output: Any) -> Any:
        real = text.mask[:, text.step].bool()[..., None].to(output[0].device)
        return (torch.where(real, output[0], 0), *output[1:])

    for module in attention_modules(model).values():
        module.register_forward_hook(zeros_for_padding)
    return model


def _patched_run(
    model: Any, policy: Policy, text: _Text, backend: str, when: str
) -> tuple[list[Tensor], Watch, PatchHandle]:
    watch = Watch(policy, when, text.mask)
    with patch(model, policy, backend=backend) as handle, observing(handle, watch.check):
        logits = _run(model, text, watch)
    return logits, watch, handle


def _compare_logits(got: list[Tensor], plain: list[Tensor], truth: list[Tensor], text: _Text) -> float:
    """Compare the logits of all calls at the real tokens; returns the largest error as a share of the budget."""
    worst = budget = 0.0
    for step, *logits in zip(text.steps(), got, plain, truth, strict=True):
        real = text.mask[:, step].bool()
        here, stock, exact = (x[real] for x in logits)
        # As for the layers: one decoded token is too little to tell how far the stock model errs.
        budget = max(budget, error_budget(stock, exact, here.dtype))
        error = (here.double() - exact.double()).abs().amax(-1)
        beyond = ~(error <= budget)
        if beyond.any():
            first = int(beyond.nonzero()[0])
            row, token = real.nonzero()[first].tolist()
            raise AssertionError(
                f"With all gates open, the logits of batch row {row} at token {step.start + token} are off by "
                f"{error[first]:.3e}; the error budget is {budget:.3e}, the stock model's own error at most "
                f"{(stock.double() - exact.double()).abs().max():.3e}. Every patched layer equals dense attention on "
                "its own inputs, so the difference comes from what they are given: scale, mask, positions or cache."
            )
        worst = max(worst, (error.max() / budget).item()) if budget else worst
    return worst


def _check_that_it_proves_something(
    watch: Watch, dense_calls: dict[int, dict[str, int]], policy: Policy, text: _Text
) -> None:
    expected = {"layer", "phase"}
    around = {
        layer: {reason: calls for reason, calls in dense_calls.get(layer, {}).items() if reason not in expected}
        for layer in policy.layers or ()
    }
    around = {layer: reasons for layer, reasons in around.items() if reasons}
    if around:
        raise ProvesNothingError(
            f"This proves nothing: calls went around the gate (calls by layer and reason: {around}). Against 'short', "
            "use longer inputs, or a smaller window_size or min_bulk; 'mask' means that the model brings a mask of its "
            "own, for which patched attention is the stock one."
        )
    asked = {phase: pairs[1] for phase, pairs in watch.pairs.items()}
    steps = {"prefill": 1, "decode": len(text.steps()) - 1}
    for phase in sorted(policy.phases):
        if steps[phase] and not asked[phase]:
            fewest = policy.sink_size + policy.window_size + policy.break_even(phase)
            raise ProvesNothingError(
                f"This proves nothing about {phase}: no query has more than sink_size + window_size + min_bulk = "
                f"{fewest} keys. Use longer inputs, or a smaller window_size or min_bulk."
            )
    opened = sum(pairs[0] for pairs in watch.pairs.values())
    total = sum(asked.values())
    if not total:
        raise ProvesNothingError(
            f"This proves nothing: no gate was asked, for the policy's phases are {sorted(policy.phases)}. Set "
            "new_tokens to decode, or name both phases."
        )
    if opened in (0, total) and not isinstance(policy.gate, OpenGate | ClosedGate):
        state, change = ("closed", "raise") if opened == 0 else ("open", "lower")
        raise ProvesNothingError(
            f"This proves nothing: all {total} pairs that were asked are {state}. {change.capitalize()} the gate's "
            "threshold, change window_size, or use inputs on which the heads differ."
        )


def _wider_dtype(model: Any) -> torch.dtype:
    if model.training:
        raise ValueError("Expected a model in evaluation mode, got one in training mode; call model.eval() first.")
    found = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} or {input_dtype(model)}
    if found - set(_TRUTH):
        raise ValueError(
            f"Expected weights in {', '.join(map(str, _TRUTH))}, got {', '.join(sorted(map(str, found)))}; "
            "load the model in one of these."
        )
    return max((_TRUTH[dtype] for dtype in found), key=lambda dtype: dtype.itemsize)
