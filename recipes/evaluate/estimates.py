"""Judge estimates of the bulk log mass at equal open fraction, learned ones among them, on the shipped model.

python recipes/evaluate/estimates.py --out docs/results/estimates
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]

from estimates_candidates import (
    Call,
    Candidate,
    boxes,
    cost,
    exact,
    expected_bulk,
    gaussian,
    low_rank,
    mixture,
    prefix_moments,
)
from estimates_learned import Probe, common_threshold, thresholds_by_head
from estimates_page import GUARD_ONLY, Fit, Row, load, save, write_page

from patchattn import OpenGate, Policy, demo, patch
from patchattn.backends.blockwise import attend as blockwise_attend
from patchattn.backends.blockwise.prefill import attend_local
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.evaluation.answers import teacher_forced
from patchattn.evaluation.documents import Document, Kind, TokenizedText, make_document, tokenize_text
from patchattn.gates.decision import decide, forced

LENGTH = 4096
FACTS: tuple[Kind, ...] = ("fact",) * 36
OTHERS: tuple[Kind, ...] = ("chain", "list", "note") * 4
POLICY = Policy(sink_size=16, window_size=256, min_bulk=0, gate=OpenGate())
FRACTIONS = (0.1, 0.2, 0.3)
DEFAULT_MARGIN = math.log(0.6 / 0.4)

PLAIN: dict[str, tuple[Candidate, str]] = {
    "oracle": (exact, "exact"),
    "saturating": (gaussian("saturating"), "moments"),
    "log-normal": (gaussian("lognormal"), "moments"),
    "guarded": (gaussian("guarded"), "moments"),
    "guarded, from half the freezing point": (gaussian("guarded", 0.5), "moments"),
    "guarded, from 1.5 times the freezing point": (gaussian("guarded", 1.5), "moments"),
    "mixture, chunks of 128": (mixture(128, diagonal=False), "mixture 128"),
    "mixture, chunks of 64": (mixture(64, diagonal=False), "mixture 64"),
    "mixture, chunks of 32, diagonal": (mixture(32, diagonal=True), "diagonal 32"),
    "boxes of 64 keys": (boxes(64), "boxes 64"),
    "boxes of 16 keys": (boxes(16), "boxes 16"),
    "8 directions of 32, every key": (low_rank(8), "rank 8"),
}
"""What each candidate is, and what it costs."""

TRANSFERRED = "probe, quadratic, fitted on other tasks"
LEARNED = {"probe, linear": "linear", "probe, quadratic": "moments", TRANSFERRED: "moments"}

HAS_THRESHOLDS_BY_HEAD = ("saturating", "guarded")
"""Candidates that are also given a threshold for each head."""

BY_HEAD = ", threshold by head"

EXPECTED = ", expected value added"

RUNS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("saturating", FRACTIONS),
    ("probe, quadratic", FRACTIONS),
    ("guarded" + BY_HEAD, FRACTIONS),
    ("oracle", FRACTIONS),
    ("guarded", (0.3,)),
    ("saturating" + BY_HEAD, (0.2,)),
    ("boxes of 64 keys", (0.2,)),
    (TRANSFERRED, (0.2,)),
    ("mixture, chunks of 128", (0.2,)),
    ("mixture, chunks of 32, diagonal", (0.2,)),
    ("saturating" + EXPECTED, (0.2,)),
    ("guarded, from 1.5 times the freezing point", (0.2,)),
    ("log-normal", (0.2,)),
    ("probe, linear", (0.1, 0.2)),
    ("8 directions of 32, every key", (0.2,)),
    ("mixture, chunks of 64", (0.2,)),
    ("boxes of 16 keys", (0.2,)),
)
"""Rows measured on the model, and the open fractions that thresholds are chosen for; what matters most comes first."""


def texts() -> tuple[TokenizedText, TokenizedText, Any]:
    """Cut the held-out text in two: to choose thresholds on, and to judge on."""
    _, tokenizer = demo.load()
    text = tokenize_text(demo.sample_text(), tokenizer)
    cut = int(0.4 * len(text.lines))
    return (
        TokenizedText(text.lines[:cut], text.tokens[:cut]),
        TokenizedText(text.lines[cut:], text.tokens[cut:]),
        tokenizer,
    )


@contextmanager
def attending(model: Any, attend: Any) -> Iterator[Any]:
    """Patch a model so that its layers call `attend(layer, inputs)`."""
    with patch(model, POLICY, backend="blockwise") as handle:
        for layer, state in handle.states.items():
            state.attend = lambda inputs, _mass, _threshold, layer=layer: attend(layer, inputs)
        yield handle


def call_of(inputs: AttentionInputs, *, with_bulk: bool) -> Call:
    """Take the pairs that are asked out of a call, with the exact local log mass."""
    local = attend_local(inputs, slice(0, inputs.query.shape[2]))[0].log_mass
    return Call.of(inputs, local, exact_masses(inputs)[0].bulk if with_bulk else None)


@torch.no_grad()
def record(model: Any, documents: list[Document]) -> list[list[Call]]:
    """Read documents with dense attention; returns the calls by layer."""
    calls: list[list[Call]] = [[] for _ in range(model.config.num_hidden_layers)]

    def attend(layer: int, inputs: AttentionInputs) -> Attended:
        calls[layer].append(call_of(inputs, with_bulk=True))
        opened = torch.ones(inputs.query.shape[:3], dtype=torch.bool)
        return blockwise_attend(inputs, forced(opened, inputs), 0.0)

    with attending(model, attend):
        for document in documents:
            model.base_model(torch.tensor(document.token_ids)[None], use_cache=False)
    return calls


def margins(candidates: list[Candidate], calls: list[list[Call]]) -> Tensor:
    """Margins of recorded calls, [layers * heads, documents * pairs] nats; one candidate for each layer."""
    layers = [
        torch.cat([(call.local - candidate(call)).flatten(0, 1) for call in of_layer], 1)
        for candidate, of_layer in zip(candidates, calls, strict=True)
    ]
    return torch.cat(layers)


def judge(name: str, price: float, found: Tensor, true: Tensor, threshold: Tensor) -> Fit:
    """Compare margins with the true ones, both [heads, pairs]; thresholds are [fractions, heads]."""
    share = torch.sigmoid(-true)
    known = found.isfinite() & true.isfinite()
    pairs = [torch.stack([found[head, at], true[head, at]]) for head, at in enumerate(known) if int(at.sum()) > 1]
    correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean().item()
    spread = torch.stack([(pair[0] - pair[1]).std() for pair in pairs]).mean().item()
    found = torch.where(found.isnan(), -torch.inf, found)
    closed = (found >= threshold[..., None]) & (threshold[..., None] != torch.inf)
    missed = torch.where(closed, share, 0).mean((1, 2))
    missed = torch.where(threshold.isnan().any(1), torch.nan, missed)
    return Fit(name, price, correlation, spread, tuple(missed.tolist()))


@dataclass
class Fitted:
    """What the documents for fitting gave.

    Args:
        probes: By name, one for each layer.
        thresholds: By candidate and open fraction, [layers, heads] nats; NaN where no threshold opens that few.
        fits: The candidates, judged on dense activations.
    """

    probes: dict[str, list[Probe]]
    thresholds: dict[tuple[str, float], Tensor]
    fits: list[Fit]

    def candidates(self, name: str, layers: int) -> list[Candidate]:
        """Return a candidate for each layer."""
        name = name.removesuffix(EXPECTED).removesuffix(BY_HEAD)
        return list(self.probes[name]) if name in self.probes else [PLAIN[name][0]] * layers


def fit_all(model: Any, tokenizer: Any, text: TokenizedText, held: list[Document], count: int) -> Fitted:
    """Fit probes, choose thresholds, and judge every candidate on the dense activations of held-out documents."""
    make = partial(make_document, text, tokenizer, length=LENGTH)
    facts = record(model, [make(kinds=FACTS, seed=f"estimates/fit/{at}") for at in range(count)])
    others = record(model, [make(kinds=OTHERS, seed=f"estimates/others/{at}") for at in range(count)])
    judged = record(model, held)
    layers = len(facts)
    probes = {
        "probe, linear": [Probe.fit(layer, quadratic=False) for layer in facts],
        "probe, quadratic": [Probe.fit(layer, quadratic=True) for layer in facts],
        TRANSFERRED: [Probe.fit(layer, quadratic=True) for layer in others],
    }
    fitted = Fitted(probes, {}, [])
    true = {id(calls): margins([exact] * layers, calls) for calls in (facts, others, judged)}
    for name in [*PLAIN, *probes]:
        of_layers = fitted.candidates(name, layers)
        calls = others if name == TRANSFERRED else facts
        found, held_out = margins(of_layers, calls), margins(of_layers, judged)
        price = cost(PLAIN[name][1] if name in PLAIN else LEARNED[name], LENGTH - 272, model.config.head_dim)
        chosen = {name: [common_threshold(found, fraction) for fraction in FRACTIONS]}
        if name in HAS_THRESHOLDS_BY_HEAD:
            share = torch.sigmoid(-true[id(calls)])
            chosen[name + BY_HEAD] = [thresholds_by_head(found, share, fraction) for fraction in FRACTIONS]
        for full_name, thresholds in chosen.items():
            fitted.fits.append(judge(full_name, price, held_out, true[id(judged)], torch.stack(thresholds)))
            print(fitted.fits[-1], flush=True)
            for fraction, threshold in zip(FRACTIONS, thresholds, strict=True):
                fitted.thresholds[full_name, fraction] = threshold.view(layers, -1)
    return fitted


@torch.no_grad()
def measure(
    model: Any, documents: list[Document], name: str, target: float, candidates: list[Candidate], threshold: Tensor
) -> Row:
    """Let a candidate decide on the model, every layer on what gated layers below made of the text."""
    threshold = threshold[..., None]

    def attend(layer: int, inputs: AttentionInputs) -> Attended:
        call = call_of(inputs, with_bulk=candidates[layer] is exact)
        asked = inputs.regions.asked
        mass = candidates[layer](call).flatten(0, 1)
        # A threshold of -inf closes a head for good, whatever is known of its mass.
        mass = torch.where(threshold[layer] == -torch.inf, -torch.inf, mass + threshold[layer])
        opened = torch.zeros(inputs.query.shape[:3], dtype=torch.bool)
        opened[..., asked[0]] = decide(call.local.flatten(0, 1)[None], mass[None], asked[:, asked[0]], 0.0)
        attended = blockwise_attend(inputs, forced(opened, inputs), 0.0)
        return with_expected_bulk(attended, call, inputs) if name.endswith(EXPECTED) else attended

    with attending(model, attend) as handle:
        found = [teacher_forced(model, [document]) for document in documents]
    return Row(
        name,
        target,
        handle.report().open_fraction("prefill"),
        sum(each.right["fact"] for each in found),
        sum(each.asked["fact"] for each in found),
        tuple(each.text_loss for each in found),
    )


def with_expected_bulk(attended: Attended, call: Call, inputs: AttentionInputs) -> Attended:
    """Merge what one Gaussian of keys and values expects of the bulk into the output of closed pairs."""
    mass, expected = expected_bulk(call, *prefix_moments(call))
    asked = inputs.regions.asked[0]
    share = torch.sigmoid(mass - call.local).flatten(0, 1)
    share = torch.where(attended.open[0][:, asked], 0, share)[..., None]
    output = attended.output.clone()
    output[0, :, asked] = output[0, :, asked].lerp(expected.flatten(0, 1).to(output.dtype), share.to(output.dtype))
    return Attended(output, attended.open, attended.scored_keys)


def main() -> None:
    """Fit, then measure row by row; rows that the CSV file has already are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=4, help="held-out documents; 36 facts are asked in each")
    parser.add_argument("--fit-documents", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/estimates"), help="without suffix")
    arguments = parser.parse_args()
    fit_on, judge_on, tokenizer = texts()
    model = demo.load()[0].float()  # so that differences come from the estimates, not from rounding
    held = [
        make_document(judge_on, tokenizer, length=LENGTH, kinds=FACTS, seed=f"estimates/{at}")
        for at in range(arguments.documents)
    ]
    kept = arguments.out.with_suffix(".fit.pt")
    if not kept.exists():
        torch.save(fit_all(model, tokenizer, fit_on, held[:1], arguments.fit_documents), kept)
    fitted: Fitted = torch.load(kept, weights_only=False)
    path = arguments.out.with_suffix(".csv")
    rows: list[Row] = load(Row, path) if path.exists() else []
    done = {(row.candidate, row.target) for row in rows}
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    same = torch.ones(layers, heads)
    fixed = {
        "dense": same * torch.inf,
        "closed": same * -torch.inf,
        "guarded, threshold 0.6": same * DEFAULT_MARGIN,
        GUARD_ONLY: same * -1e6,
    }
    planned = [(name, 0.0, fitted.candidates("guarded", layers), threshold) for name, threshold in fixed.items()]
    for name, fractions in RUNS:
        candidates, chosen = fitted.candidates(name, layers), name.removesuffix(EXPECTED)
        planned += [(name, fraction, candidates, fitted.thresholds[chosen, fraction]) for fraction in fractions]
    for plan in planned:
        if plan[:2] not in done:
            rows.append(measure(model, held, *plan))
            print(*plan[:2], f"{rows[-1].open:.3f}", rows[-1].right / rows[-1].asked, flush=True)
            save(rows, path)
    save(fitted.fits, arguments.out.with_suffix(".dense.csv"))
    write_page(rows, fitted.fits, arguments.out, length=LENGTH, fitted=arguments.fit_documents)
    kept.unlink()


if __name__ == "__main__":
    main()
