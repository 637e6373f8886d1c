"""Policies by short names, and a static choice of heads to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from patchattn.calibration.calibration import Calibration
from patchattn.calibration.price_table import with_prices
from patchattn.errors import PolicyError
from patchattn.evaluation.documents import check_longest
from patchattn.evaluation.drafted import DRAFT
from patchattn.evaluation.tasks import TASKS
from patchattn.gates import ClosedGate, Gate, MomentGate, OracleGate, StaticGate
from patchattn.gates.thresholds import Frozen, KLTarget, OpenFractionTarget, Target
from patchattn.hf.drafting import draft
from patchattn.hf.patching import PatchHandle, patch
from patchattn.hf.weights import input_device
from patchattn.moments.gaussian import Estimate
from patchattn.policy import DEFAULT_WINDOW, Policy

DENSE = "dense"
"""The model as it came; always measured, as what all others are compared with."""

DRAFTS = "drafts"
"""Heads that draft what dense attention verifies: `drafts`, `drafts:0.6`."""


class Drafts(Frozen):
    """Heads draft under a policy, and dense attention verifies: measured with `patchattn.draft`, not `patch`.

    Args:
        policy: What the heads do in a draft.
        tokens: Tokens of each draft. Always so many, so that what is found depends on no clock.
    """

    policy: Policy
    tokens: int = DRAFT


def gated_by(found: Policy | Drafts) -> Policy:
    """Return the policy of the gates."""
    return found.policy if isinstance(found, Drafts) else found


def resolved_by(found: Policy | Drafts, policy: Policy) -> Policy | Drafts:
    """Put a policy whose `"auto"` is resolved in place of the one of the gates."""
    return found.model_copy(update={"policy": policy}) if isinstance(found, Drafts) else policy


def patched_by(
    model: Any, policy: Policy | Drafts, *, calibration: Calibration | None = None, backend: str = "auto"
) -> PatchHandle:
    """Patch a model with a policy, or make it draft."""
    if isinstance(policy, Drafts):
        return draft(model, policy.policy, calibration=calibration, backend=backend, tokens=policy.tokens)
    return patch(model, policy, calibration=calibration, backend=backend)


_KINDS = {gate.model_fields["kind"].default: gate for gate in get_args(get_args(Gate)[0])}
_ESTIMATES = get_args(Estimate)
_GATES: dict[str, Any] = {"default": MomentGate, **dict.fromkeys(_ESTIMATES, MomentGate), **_KINDS}

TRANSFER = "static-transfer"
"""Static heads that were ranked on one task, to be judged on others: `static-transfer:TASK`."""

_TARGETS: dict[str, Callable[[float], Target]] = {
    "kl": lambda number: KLTarget(nats=number),
    "budget": lambda number: OpenFractionTarget(fraction=number),
}
_OF_CALIBRATION = ("static-price", *_TARGETS, "calibrated")

NAMES = (DENSE, *_GATES, TRANSFER, *_OF_CALIBRATION, DRAFTS)
"""Short names; every kind of gate and every estimate is one. docs/how-to/evaluate-your-model.md says what they mean."""

_STATIC_SHARE = 0.25
_WINDOW_SHARE = 4
_LEAST_WINDOW = 64
_RANKING_THRESHOLD = 0.8

RankedHeads = Callable[[str | None], list[tuple[int, int]]]
"""Called with a task, or None for those that are measured, for (layer, query head) pairs, those that need the far keys
most first."""


def fitting_window(length: int) -> int:
    """Return a window for prompts of a length: a quarter of it, at least 64 and at most 2,048 tokens.

    Example:
        >>> fitting_window(2048), fitting_window(131072)
        (512, 2048)
    """
    return min(max(length // _WINDOW_SHARE, _LEAST_WINDOW), DEFAULT_WINDOW)


def transfer_task(name: str) -> str | None:
    """Return the task on which a policy of this short name ranks its heads; None where it names none.

    Example:
        >>> transfer_task("static-transfer:kv:0.3"), transfer_task("static:0.3")
        ('kv', None)
    """
    kind, _, setting = name.partition(":")
    return setting.partition(":")[0] if kind == TRANSFER else None


def named_policy(
    name: str, base: Policy, *, calibration: Calibration | None = None, ranked_heads: RankedHeads | None = None
) -> Policy | Drafts | None:
    """Return the policy that a short name stands for; None for `dense`.

    Args:
        name: One of `NAMES`. A colon and a number in (0, 1) may follow where a gate has a threshold; for `static` it is
            the share of the heads that are open. `static-transfer` needs a task first, as in `static-transfer:kv:0.3`.
            `kl` and `budget` need one: nats per token and the share of open pairs that a calibration is asked for.
            `drafts` are of closed heads, with a number of heads that open at this threshold.
        base: Sink, window, break-even, layers and phases.
        calibration: Brings the policy of `calibrated`, thresholds for `kl` and `budget`, and the ranking of heads for
            `static` and `static-price`.
        ranked_heads: Ranks heads for `static` without a calibration and for `static-transfer`; see `heads_by_oracle`.

    Raises:
        PolicyError: There is no such name, its number is not in (0, 1), or it needs a calibration.
        CalibrationError: The calibration can't carry the target, or has no prices.

    Example:
        >>> named_policy("oracle:0.3", Policy(window_size=64)).gate
        OracleGate(kind='oracle', threshold=0.3)
    """
    kind, _, setting = name.partition(":")
    task = transfer_task(name)
    if task is not None:
        setting = setting.partition(":")[2]
        if task not in TASKS:
            raise PolicyError(
                f"The policy {name!r} names no task to rank heads on.",
                fix=f"Name one, as in {TRANSFER}:kv or {TRANSFER}:kv:0.3; there are {', '.join(TASKS)}.",
            )
    gate = _GATES.get(kind) if task is None else StaticGate
    takes_number = (
        kind in (*_OF_CALIBRATION[:-1], DRAFTS)
        if gate is None
        else gate is StaticGate or "threshold" in gate.model_fields
    )
    if kind not in NAMES or (setting and not takes_number):
        raise PolicyError(
            f"There is no policy {name!r}.",
            fix=f"Choose from {', '.join(NAMES)}, with a number as in default:0.8, or give the path of a policy file.",
        )
    try:
        number = float(setting) if setting else None
    except ValueError:
        number = math.nan
    if (number is None and kind in _TARGETS) or (number is not None and not 0 < number < 1):
        example = f"{kind}:0.01" if kind in _TARGETS else "default:0.8"
        raise PolicyError(f"The policy {name!r} has no number in (0, 1).", fix=f"Give one, as in {example}.")
    if kind == DENSE:
        return None
    if kind == DRAFTS:
        drafting = ClosedGate() if number is None else MomentGate(threshold=number)
        return Drafts(policy=base.model_copy(update={"gate": drafting, "phases": frozenset({"decode"})}))
    if gate is None:
        return _of_calibration(kind, number, base, calibration)
    settings: dict[str, Any] = {} if number is None else {"threshold": number}
    if kind in _ESTIMATES:
        settings["estimate"] = kind
    if gate is StaticGate:
        if task is None and calibration is not None:
            heads = calibration.heads_by_oracle()
        elif ranked_heads is not None:
            heads = ranked_heads(task)
        else:
            raise PolicyError(f"The policy {kind} needs ranked heads.", fix="Pass calibration=... or ranked_heads=...")
        return base.model_copy(update={"gate": _static(heads, number)})
    return base.model_copy(update={"gate": gate(**settings)})


def _static(heads: list[tuple[int, int]], share: float | None) -> StaticGate:
    """Open the first of some ranked heads."""
    return StaticGate(open_heads=tuple(heads[: max(1, round((share or _STATIC_SHARE) * len(heads)))]))


def _of_calibration(kind: str, number: float | None, base: Policy, calibration: Calibration | None) -> Policy:
    """Return a policy that only a calibration can give; see `named_policy`."""
    if calibration is None:
        raise PolicyError(f"The policy {kind} needs a calibration.", fix="Give one, or leave this policy out.")
    if kind == "static-price":
        return base.model_copy(update={"gate": _static(calibration.heads_by_price(), number)})
    if number is None:
        return calibration.policy
    estimate, moments = with_prices(calibration.findings).estimate, calibration.manifest.moments
    gate = MomentGate(threshold=_TARGETS[kind](number), estimate=estimate, moments=moments)
    policy = base.model_copy(update={"gate": gate})
    # A target that can't be carried is refused here, before anything is measured.
    calibration.measured_heads(policy)
    return policy


def heads_by_oracle(model: Any, prompts: Sequence[Sequence[int]], base: Policy) -> list[tuple[int, int]]:
    """Rank (layer, query head) by how often the exact share opens them, most used first.

    Args:
        model: The model, not patched.
        prompts: Token ids to read, other ones than those that the ranking is judged by.
        base: Sink, window and break-even.

    Raises:
        DocumentError: A prompt is longer than the model's context.
        PolicyError: No prompt is long enough for a gate to be asked.
    """
    check_longest(model, *map(len, prompts))
    policy = base.model_copy(update={"gate": OracleGate(threshold=_RANKING_THRESHOLD)})
    with patch(model, policy) as handle, torch.no_grad():
        for tokens in prompts:
            model(input_ids=torch.tensor([list(tokens)], device=input_device(model)), use_cache=False, logits_to_keep=1)
    fractions = handle.report().head_open_fractions("prefill")
    ranked = [(value, layer, head) for layer, heads in fractions.items() for head, value in enumerate(heads)]
    if any(math.isnan(value) for value, _, _ in ranked):
        raise PolicyError(
            "No prompt has keys beyond sink, window and break-even, so heads can't be ranked.",
            fix="Choose a greater length, a smaller window, or min_bulk=0.",
        )
    return [(layer, head) for _, layer, head in sorted(ranked, reverse=True)]
