"""How good is the Gaussian estimate of the bulk mass, head by head, and what do the worst heads have in common?

python recipes/evaluate/gaussian.py --out docs/results/gaussian
"""

from __future__ import annotations

import csv
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent)]

from classification import DEFAULT, PLACE, Recorded
from gaussian_page import draw, page
from recording import THRESHOLDS, recorded
from shipped import SINK, TASKS, command_line, document, load
from store import Row, kept

from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores
from patchattn.evaluation.margins import with_window
from patchattn.gates import OpenGate
from patchattn.hf.observe import observing
from patchattn.hf.patching import patch
from patchattn.measuring.collect import read_document
from patchattn.moments.gaussian import CHUNK, KeyMoments
from patchattn.policy import Policy

SAMPLED_DOCUMENTS = 4
QUERIES_PER_CHUNK = 3
GRID = torch.arange(-8, 60.01, 0.1)
"""Whitened scores that are counted between."""


def sample_scores() -> Row:
    """Whiten scores of sampled queries by the mean and variance that the moments predict, and count them.

    Returns:
        `counts`: [layers][heads][grid] whitened scores up to each edge of the grid and beyond the last; `moments`:
        [layers][heads] skewness and excess kurtosis of a query's bulk scores, its largest whitened score, and the
        share of queries above the freezing point, all means over queries.
    """
    model, *_ = load()
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    counts = torch.zeros(layers, heads, len(GRID) + 1, dtype=torch.double)
    sums = torch.zeros(layers, heads, 4, dtype=torch.double)
    n_queries = torch.zeros(layers)
    for index in range(SAMPLED_DOCUMENTS):
        rng = random.Random(f"gaussian/{index}")

        def visit(layer: int, inputs: AttentionInputs, attend: Any, rng: random.Random = rng) -> Any:
            for rows, whitened, variance in _whitened(with_window(inputs, PLACE[1]), rng):
                at = torch.bucketize(whitened, GRID)
                counts[layer].scatter_add_(1, at.flatten(1), torch.ones_like(at, dtype=torch.double).flatten(1))
                own = (whitened - whitened.mean(-1, keepdim=True)) / whitened.std(-1, keepdim=True, correction=0)
                shape = [own.pow(3).mean(-1), own.pow(4).mean(-1) - 3, whitened.amax(-1)]
                frozen = variance > 2 * math.log(whitened.shape[-1])
                sums[layer] += torch.stack([*shape, frozen.double()], -1).double().sum(1)
                n_queries[layer] += len(rows)
            return attend()

        policy = Policy(sink_size=SINK, window_size=1, min_bulk=0, gate=OpenGate())
        with patch(model, policy, record=None) as handle, observing(handle, visit):
            read_document(model, torch.tensor(document("facts", PLACE[0], f"gaussian/{index}").token_ids))
    means = sums / n_queries[:, None, None]
    return {"counts": counts.long().tolist(), "moments": means.tolist()}


def _whitened(inputs: AttentionInputs, rng: random.Random) -> Any:
    """Yield (rows, whitened bulk scores [heads, rows, keys], predicted variance [heads, rows]) of sampled queries."""
    sink, window, length = inputs.regions.sink_size, inputs.regions.window_size, inputs.query.shape[2]
    first = sink + window - 1
    for chunks in range(1, (length - first) // CHUNK):
        covered = KeyMoments.of(inputs.key[0, :, sink : sink + CHUNK * chunks])
        rows = sorted(rng.sample(range(first + CHUNK * chunks, first + CHUNK * (chunks + 1)), QUERIES_PER_CHUNK))
        query = inputs.query[0, :, rows].float().unflatten(0, (covered.mean.shape[0], -1)) * inputs.scale
        mean = torch.einsum("hgrd,hd->hgr", query, covered.mean).flatten(0, 1)
        variance = torch.einsum("hgrd,hde,hgre->hgr", query, covered.covariance, query).flatten(0, 1)
        scores = torch.cat([attention_scores(inputs, slice(row, row + 1)) for row in rows], dim=2)[0]
        # The keys that are bulk for the first of the rows, so that all have as many.
        bulk = scores[..., sink : rows[0] + 1 - window]
        yield rows, (bulk - mean[..., None]) / variance.clamp(min=1e-12).sqrt()[..., None], variance


def per_head(place: Recorded, samples: Row) -> list[Row]:
    """Join what was recorded and sampled, one row for each head."""
    errors = {name: place.array("errors", name).sum(0) for name in ("prompt/guarded", "prompt/saturating")}
    ranks = {name: np.nanmean(place.array("ranks", name), axis=0) for name in ("prompt/guarded", "prompt/saturating")}
    joint = place.array("joint", "prompt/guarded").sum(0)  # [layers, heads, oracle bins, gate bins]
    tops = place.array("top_share").sum(0)  # [layers, heads, tasks, 2]
    by_task = place.array("margin_by_task").sum(0)  # [layers, heads, tasks, 3]
    moments = np.array(samples["moments"])
    asked = by_task[..., 0]
    answer = TASKS.index("answer")
    found = []
    for layer in range(place.layers):
        for head in range(joint.shape[1]):
            row: Row = {"layer": layer, "head": head}
            for name, short in (("prompt/saturating", "saturating"), ("prompt/guarded", "guarded")):
                count, total, squares = errors[name][layer, head].sum(0)
                bias = total / count
                row[f"bias_{short}"] = bias
                row[f"spread_{short}"] = math.sqrt(max(squares / count - bias**2, 0))
                row[f"rank_{short}"] = float(ranks[name][layer, head])
            n_answers, off, _ = errors["prompt/saturating"][layer, head, answer]
            row["bias_answering"] = off / n_answers
            at = THRESHOLDS.index(DEFAULT) + 1
            needed = joint[layer, head, :at].sum()
            row["recall"] = joint[layer, head, :at, :at].sum() / needed if needed else math.nan
            row["oracle_open"] = needed / joint[layer, head].sum()
            row["top_share"] = tops[layer, head, :, 0].sum() / asked[layer, head].sum()
            row["bulk_share"] = tops[layer, head, :, 1].sum() / asked[layer, head].sum()
            row["bulk_share_answering"] = tops[layer, head, answer, 1] / asked[layer, head, answer]
            row["top_share_answering"] = tops[layer, head, answer, 0] / asked[layer, head, answer]
            row |= dict(zip(("skewness", "kurtosis", "largest", "frozen"), moments[layer, head].tolist(), strict=True))
            found.append(row)
    return found


def quantiles(counts: Any, shares: np.ndarray) -> np.ndarray:
    """Read quantiles off the counts of a head's whitened scores."""
    below = np.cumsum(np.asarray(counts, float))[:-1]
    below /= below[-1] if below[-1] else 1
    return np.interp(shares, below, GRID.numpy())


def main() -> None:
    """Measure what is missing, then write table, page and picture."""
    arguments = command_line("gaussian", __doc__)
    place = Recorded(recorded(arguments.work, arguments.processes), *PLACE)
    samples = kept(arguments.work / "gaussian-scores.json", sample_scores)
    heads = per_head(place, samples)
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, list(heads[0]), lineterminator="\n")
        lines.writeheader()
        lines.writerows({k: v if isinstance(v, int) else f"{v:.5g}" for k, v in row.items()} for row in heads)
    ordered = sorted(heads, key=lambda row: -row["rank_saturating"])
    chosen = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]}
    shares = np.linspace(0.0005, 0.9995, 4000)
    curves = {name: quantiles(samples["counts"][row["layer"]][row["head"]], shares) for name, row in chosen.items()}
    draw(heads, chosen, shares, curves, arguments.out.with_suffix(".png"))
    arguments.out.with_suffix(".md").write_text(page(heads, chosen, len(place.rows)))


if __name__ == "__main__":
    main()
