"""Candidates in a patched model: what its layers then decide on gated activations, beside the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from context import POLICY, Context, Job, Measurement
from studies.towards_the_oracle.estimates import Basis
from studies.towards_the_oracle.judging import DIMENSIONS, rankers
from studies.towards_the_oracle.ranking import Ranker, candidates, price_for
from studies.towards_the_oracle.reading import JUDGED, REAL, SHIPPED, One, bases, documents, model_of, probe_of
from studies.towards_the_oracle.seeing import rows_of, seen_of
from torch import Tensor

from patchattn import patch
from patchattn.backends.blockwise import closed_attention, dense
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.hf.architecture import without_head
from patchattn.hf.logits import head_of
from patchattn.hf.observe import observing
from patchattn.measuring.prices import given_to
from patchattn.moments.prompt import bulk_log_mass_from_prompt

CONFIRMED = {
    "probe": (),
    "probe, ajar by bounds": (),
    "exact change": ("exact",),
}
"""Candidates that are put into the model, and how each looks at the far keys."""

DOCUMENTS = {REAL: 6, SHIPPED: 9}
"""Of those that are judged, the first so many."""

READ = (0.17,)
"""Shares of the bulk keys, on the documents that were priced."""

EVERY = 4
"""The KL is the mean over one token in so many, and that of answers over all of theirs."""

_AT_ONCE = 256


@dataclass(frozen=True)
class Patched:
    """One candidate at one price on one document; KL to the dense model in nats per token, open pairs, keys read."""

    model: str
    candidate: str
    target: float
    document: int
    kind: str
    open: float
    ajar: float
    read: float
    kl: float
    agrees: float
    kl_answers: float
    right: int
    right_dense: int
    asked: int


class Gated:
    """Decides in the layers of a model, and counts.

    Args:
        ranker: What ranks pairs, of all layers.
        at: Price at which pairs open, nats per token.
        looks: How it looks at the far keys.
        ajar: How blocks are chosen; None for two states.
        basis: By layer, for the sketches.
        margin: Of the probe, see `Pass`.
        hidden: By layer, what the attention module was given.
    """

    def __init__(
        self,
        ranker: Ranker,
        at: float,
        looks: tuple[str, ...],
        ajar: tuple[str, ...],
        basis: dict[int, Basis],
        margin: Callable[..., Tensor],
        hidden: dict[int, Tensor],
    ) -> None:
        self._ranker, self._at, self._looks, self._ajar = ranker, at, looks, ajar
        self._basis, self._margin, self._hidden = basis, margin, hidden
        self.counts = torch.zeros(4, dtype=torch.float64)

    def __call__(self, layer: int, inputs: AttentionInputs, _: Callable[[], Attended]) -> Attended:
        """Attend."""
        output, (closed, local), rows = dense(inputs).clone(), closed_attention(inputs), rows_of(inputs, 1)
        heads, n = inputs.query.shape[1], inputs.regions.n_bulk[0, rows]
        looks = {"looks": self._looks, "ranked_by": self._ajar}
        found, partly = seen_of(inputs, rows, closed, local, basis=self._basis[layer], **looks)
        estimate, _ = bulk_log_mass_from_prompt(inputs)
        found["margin"] = (estimate - local)[0][:, rows].clamp(-40, 40)
        found["probe"] = -self._margin(layer, inputs, self._hidden[layer], local)[0][:, rows].clamp(-40, 40)
        ranker = self._ranker.of_heads(slice(layer * heads, (layer + 1) * heads))
        is_open, is_ajar, reads = ranker.decide({**found, "n": n}, self._at)
        chosen = torch.where(is_open[..., None], output[0][:, rows], closed[0][:, rows])
        for values in partly.values():
            chosen = torch.where(is_ajar[..., None], values.to(chosen.dtype), chosen)
        output[0][:, rows] = chosen
        self.counts += torch.stack(
            [is_open.double().mean(), is_ajar.double().mean(), (reads * n).mean(), n.double().mean()]
        )
        return Attended(output, inputs.regions.asked[:, None].expand(inputs.query.shape[:3]), 0)


def measure(context: Context, name: str, candidate: str, target: float, index: int) -> Patched:
    """Put one candidate into a model and read one document."""
    model, tokenizer = model_of(name, context.options["real_model"])
    one, known = documents(name, JUDGED, tokenizer)[index], rankers(context, name)
    probe, fitted = probe_of(context, name)
    ajar = (candidate.rpartition(" by ")[2],) if "ajar" in candidate else ()
    with torch.no_grad():
        plain = without_head(model)(input_ids=one.ids[None], use_cache=False)
        hidden: dict[int, Tensor] = {}
        # What is exact is there to judge others by, as if it were known for nothing.
        by, free = ("open", candidates(DIMENSIONS[name])[candidate].cost) if "exact" in candidate else ("read", 0.0)
        at, margin = price_for(known.on_priced(candidate), by, target), partial(probe.margin, fitted)
        gated = Gated(known[candidate], at, CONFIRMED[candidate], ajar, bases(context, name), margin, hidden)
        with patch(model, POLICY, record=None) as handle, observing(handle, gated), given_to(model, hidden):
            other = without_head(model)(input_ids=one.ids[None], use_cache=False)
        opened, is_ajar, reads, keys = gated.counts.tolist()
        layers = model.config.num_hidden_layers
        shares = opened / layers, is_ajar / layers, reads / keys - free
        return Patched(name, candidate, target, index, one.kind, *shares, *compared(model, one, plain, other))


def compared(model: Any, one: One, plain: Any, other: Any) -> tuple[float, float, float, int, int, int]:
    """Compare what two decoders' states predict: the last fields of a row."""
    answers = [at for answer in one.answers for at in range(answer.start - 1, answer.stop - 1)]
    text = list(range(EVERY - 1, len(one.ids), EVERY))
    kls, tops = [], []
    rows = torch.tensor(text + answers)
    with head_of(model, plain) as logits_of:
        for part in rows.split(_AT_ONCE):
            ids = one.ids[None, part]
            logs = [logits_of(ids, x.last_hidden_state[:, part])[0].double().log_softmax(-1) for x in (plain, other)]
            kls.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
            tops.append(torch.stack([log.argmax(-1) for log in logs]))
    kl, top = torch.cat(kls), torch.cat(tops, 1)
    agrees = (top[0] == top[1])[: len(text)].double().mean()
    at, right = len(text), [0, 0]
    for answer in one.answers:
        size = answer.stop - answer.start
        for which in range(2):
            right[which] += int((top[which, at : at + size] == one.ids[answer]).all())
        at += size
    of_answers = float(kl[len(text) :].mean()) if answers else float("nan")
    return float(kl[: len(text)].mean()), float(agrees), of_answers, right[1], right[0], len(one.answers)


def _jobs(_: Context) -> list[Job]:
    return [
        (name, candidate, target, at)
        for name, count in DOCUMENTS.items()
        for at in range(count)
        for target in READ
        for candidate in CONFIRMED
    ]


PATCHED = Measurement(
    "towards_the_oracle.patched", Patched, ("model", "candidate", "target", "document"), _jobs, measure
)
