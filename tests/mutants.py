"""Break the library in named ways, one at a time, and see that the tests notice.

    python tests/mutants.py                     # all of them; some minutes
    python tests/mutants.py window_one_longer   # only these
    python tests/mutants.py --write             # all, and the table in docs/explanation/testing.md

Each mutant changes one expression in a copy of the package and runs only the tests that should notice. It is caught if
they fail; the exit code is the number of mutants that were not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/explanation/testing.md"
_BEGIN, _END = "<!-- mutants: begin -->", "<!-- mutants: end -->"


@dataclass(frozen=True)
class Mutant:
    """One way to break the library.

    Args:
        name: Short name.
        meaning: What is wrong then, in words.
        file: Path below `patchattn/`.
        old: Source that occurs exactly once in the file.
        new: What takes its place.
        tests: Arguments of pytest: the tests that should notice.
    """

    name: str
    meaning: str
    file: str
    old: str
    new: str
    tests: str


REGIONS, GATE, MOMENTS = (
    f"tests/unit/test_{name}.py tests/property/test_{name}.py" for name in ("regions", "gate", "moments")
)
BLOCKWISE, PATCHING = "tests/unit/test_blockwise.py", "tests/integration/test_patching.py"
DRAFTING = "tests/integration/test_drafting.py"
FLEX = "tests/unit/test_flex.py -k 'two_passes_equal or block_lists_cover or open_rows'"

MUTANTS = (
    Mutant(
        "window_one_longer",
        "the window holds one key too many",
        "call/regions.py",
        "- slots >= self.window_size",
        "- slots > self.window_size",
        REGIONS,
    ),
    Mutant(
        "sink_counts_padding",
        "the sink is counted from the first slot, not from the first real token",
        "call/regions.py",
        "past_sink = slots - self.first[:, None] >=",
        "past_sink = slots - 0 * self.first[:, None] >=",
        REGIONS,
    ),
    Mutant(
        "bulk_one_short",
        "a query with one bulk key is not asked",
        "call/regions.py",
        "(self.positions + 1 - self.sink_size",
        "(self.positions - self.sink_size",
        REGIONS,
    ),
    Mutant(
        "padding_attended",
        "padding keys are attended",
        "call/regions.py",
        "return self.valid[:, None, :] & (self._slots",
        "return torch.ones_like(self.valid)[:, None, :] & (self._slots",
        REGIONS,
    ),
    Mutant(
        "nan_closes",
        "a margin that is not a number closes the gate",
        "gates/decision.py",
        "& ~(bulk_log_mass <= most)",
        "& (bulk_log_mass > most)",
        GATE,
    ),
    Mutant(
        "threshold_sign",
        "a higher threshold closes more",
        "gates/thresholds.py",
        "math.log(threshold) - math.log1p(-threshold)",
        "math.log1p(-threshold) - math.log(threshold)",
        GATE,
    ),
    Mutant(
        "below_break_even_closes",
        "queries below break-even are closed instead of open",
        "call/regions.py",
        "return (self.n_bulk > 0) & ~self.asked",
        "return (self.n_bulk >= max(self.break_even, 1)) & ~self.asked",
        GATE,
    ),
    Mutant(
        "static_heads_of_all_layers",
        "a static gate opens its heads in every layer",
        "gates/static.py",
        "if layer == known.layer",
        "if layer >= 0",
        GATE,
    ),
    Mutant(
        "wrong_group",
        "query heads are matched to the wrong KV heads",
        "call/masses.py",
        "@ key.mT).view(",
        "@ key.flip(1).mT).view(",
        BLOCKWISE,
    ),
    Mutant(
        "softcap_dropped",
        "scores are not capped",
        "call/masses.py",
        "scores = inputs.softcap * torch.tanh(scores / inputs.softcap)",
        "pass",
        f"{BLOCKWISE} tests/integration/test_models.py",
    ),
    Mutant(
        "variance_not_halved",
        "the estimate takes the whole variance of the scores",
        "moments/gaussian.py",
        "variance, alpha=0.5)",
        "variance, alpha=1.0)",
        MOMENTS,
    ),
    Mutant(
        "freezing_point_moved",
        "the guarded estimate trusts scores that are frozen",
        "moments/gaussian.py",
        "torch.where(variance > freezing",
        "torch.where(variance > 2 * freezing",
        MOMENTS,
    ),
    Mutant(
        "merge_without_shift",
        "merged moments ignore that the means differ",
        "moments/gaussian.py",
        "self.covariance.lerp(other.covariance, share[..., None]) + between",
        "self.covariance.lerp(other.covariance, share[..., None])",
        MOMENTS,
    ),
    Mutant(
        "reference_key_dropped",
        "sums are not taken from the first bulk key",
        "moments/running.py",
        "n_chunks * CHUNK) - reference[:, :, None]",
        "n_chunks * CHUNK)",
        MOMENTS,
    ),
    Mutant(
        "chunk_dropped",
        "the last full chunk of bulk keys is never counted",
        "moments/running.py",
        "inside = slots < (first_bulk + CHUNK * upto)[:, None]",
        "inside = slots < (first_bulk + CHUNK * (upto - 1))[:, None]",
        MOMENTS,
    ),
    Mutant(
        "stale_moments",
        "moments survive keys that were replaced",
        "moments/running.py",
        "keep = self.chunks <= chunks",
        "keep = self.chunks >= 0",
        f"{MOMENTS} {PATCHING}",
    ),
    Mutant(
        "stale_moments_after_crop",
        "a cache keeps its moments when it is cropped far",
        "hf/cache.py",
        "if cropped > getattr(self, _GRID)[1]:",
        "if cropped > 10**9:",
        f"{PATCHING} tests/integration/test_stateful.py",
    ),
    Mutant(
        "beams_keep_their_moments",
        "moments do not follow reordered beams",
        "hf/cache.py",
        "            _select(self, beam_idx)",
        "            pass",
        PATCHING,
    ),
    Mutant(
        "repeats_in_wrong_order",
        "moments of repeated rows are interleaved wrongly",
        "hf/cache.py",
        "rows.repeat_interleave(repeats)",
        "rows.repeat(repeats)",
        PATCHING,
    ),
    Mutant(
        "merge_swapped",
        "blockwise merges local and bulk results with swapped weights",
        "backends/blockwise/softmax.py",
        "return torch.sigmoid(other.log_mass - self.log_mass)",
        "return torch.sigmoid(self.log_mass - other.log_mass)",
        BLOCKWISE,
    ),
    Mutant(
        "sink_logits_dropped",
        "blockwise leaves the learned sink logits out of the output",
        "backends/blockwise/softmax.py",
        "(part.output * (part.log_mass - total).exp()[..., None])",
        "part.output",
        BLOCKWISE,
    ),
    Mutant(
        "rows_see_as_far_as_the_last",
        "blockwise shows the open rows of a rectangle the keys of its last row",
        "backends/blockwise/prefill.py",
        "shared, longest = ends[first], ends[last - 1]",
        "shared, longest = ends[last - 1], ends[last - 1]",
        BLOCKWISE,
    ),
    Mutant(
        "flex_merge_swapped",
        "flex merges local and bulk results with swapped weights",
        "backends/flex/passes.py",
        "torch.sigmoid(bulk_log_mass - log_mass), 0",
        "torch.sigmoid(log_mass - bulk_log_mass), 0",
        FLEX,
    ),
    Mutant(
        "flex_rows_left_moved",
        "flex does not move the results of open rows back",
        "backends/flex/compiled.py",
        "bulk_output = bulk_output.gather(2, place[..., None].expand_as(bulk_output))",
        "pass",
        FLEX,
    ),
    Mutant(
        "flex_unstable_order",
        "flex moves open rows out of their order",
        "backends/flex/masks.py",
        "torch.where(opened, count - 1, count[:, :, -1:] + rows - count)",
        "torch.where(opened, count[:, :, -1:] - count, count[:, :, -1:] + rows - count)",
        FLEX,
    ),
    Mutant(
        "flex_reads_padding",
        "flex attends padding among the bulk keys",
        "backends/flex/shared.py",
        "return (real[b, key] != 0) & (key >= sink_end[b])",
        "return (key >= sink_end[b])",
        FLEX,
    ),
    Mutant(
        "flex_block_missing",
        "flex leaves out the last block of a tile's bulk keys",
        "backends/flex/shared.py",
        "longest // block + 1 - sink_end // block, 0)",
        "longest // block - sink_end // block, 0)",
        FLEX,
    ),
    Mutant(
        "flex_unpinned",
        "flex gives compiled kernels tensors in layouts they do not expect",
        "backends/flex/compiled.py",
        "return pinned(rows_of(query, kv_heads)), pinned(key), pinned(value)",
        "return rows_of(query, kv_heads), key, value",
        "tests/unit/test_flex.py -k inductor -m ''",
    ),
    Mutant(
        "cut_mask_keeps_its_slot",
        "a mask cut to the last queries takes them for the first",
        "hf/mask.py",
        "slot, cut = self.query_slot + begin,",
        "slot, cut = self.query_slot,",
        "tests/unit/test_mask.py",
    ),
    Mutant(
        "padding_reads_local_keys",
        "queries in slots of padding read local keys only",
        "call/regions.py",
        "return (self.n_bulk > 0) & ~self.asked",
        "return self.below",
        "tests/integration/test_masks.py",
    ),
    Mutant(
        "cache_not_found",
        "the cache does not reach the layers",
        "hf/architecture.py",
        "    for given in arguments:",
        "    for given in ():",
        f"{PATCHING} -k moments_stay",
    ),
    Mutant(
        "mask_forgets_padding",
        "the mask function takes every token for real",
        "hf/mask.py",
        "padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)",
        "padding = None",
        PATCHING,
    ),
    Mutant(
        "phase_ignored",
        "a policy for one phase gates both",
        "hf/state.py",
        "if phase not in self.policy.phases:",
        "if not self.policy.phases:",
        PATCHING,
    ),
    Mutant(
        "drafts_verified_by_gates",
        "the call that verifies a draft goes through the gates",
        "hf/state.py",
        "if self.drafting is not None and not self.drafting.is_on:",
        "if self.drafting is not None and False:",
        DRAFTING,
    ),
    Mutant(
        "draft_left_in_cache",
        "a draft is not taken out of the cache as a whole",
        "hf/candidates.py",
        ".crop(-steps)",
        ".crop(-1)",
        DRAFTING,
    ),
    Mutant(
        "draft_past_the_end",
        "a draft goes on behind the token that ends the text",
        "hf/candidates.py",
        "if bool(self._criteria(longer, None).all()):",
        "if False:",
        DRAFTING,
    ),
    Mutant(
        "drafts_keep_moments",
        "steps of a draft that may be refused keep their moments",
        "hf/gated.py",
        "state.drafting.keeps_moments",
        "True",
        DRAFTING,
    ),
    Mutant(
        "drafts_of_another_distribution",
        "sampled drafts are verified with other probabilities than they were drawn with",
        "hf/candidates.py",
        "torch.stack(logits, 1)",
        "torch.stack(logits, 1) * 0.5",
        "tests/integration/test_drafted_sampling.py",
    ),
    Mutant(
        "filled_cache_read_again",
        "a text whose cache is filled is read once more on top of it",
        "hf/candidates.py",
        "input_ids.shape[1] - known if known else None",
        "None",
        DRAFTING,
    ),
    Mutant(
        "drafts_that_never_stop",
        "a model goes on drafting where that does not pay",
        "hf/draft_length.py",
        "while length and lost + length * self._price > allowed:",
        "while False:",
        "tests/unit/test_draft_length.py",
    ),
    Mutant(
        "drafts_judged_by_another_text",
        "what steps took in a text before is taken for what they take in this one, whatever they read",
        "hf/draft_length.py",
        "max(_FEWEST, 1 - self._saved.value * (1 - self._least))",
        "max(_FEWEST, 1 - self._saved.value * 0.4)",
        "tests/unit/test_draft_length.py",
    ),
    Mutant(
        "every_other_text_is_level",
        "a drafted text that is another passes for rounding",
        "evaluation/drafted.py",
        "return bool(gaps[at] <= moves.max())",
        "return True",
        "tests/unit/test_evaluation_drafted.py",
    ),
    Mutant(
        "drafting_left_behind",
        "an unpatched model still drafts",
        "hf/patching.py",
        "            state.drafting.undo()",
        "            pass",
        DRAFTING,
    ),
    Mutant(
        "hook_left_behind",
        "unpatch leaves its hook on the modules",
        "hf/patching.py",
        "        module._forward_pre_hooks.pop(state.hook_id)\n",
        "",
        PATCHING,
    ),
    Mutant(
        "risk_without_correction",
        "thresholds trust the average over the documents at hand",
        "calibration/risk.py",
        "return (documents * missed.double() + 1) / (documents + 1) <= alpha",
        "return missed.double() <= alpha",
        "tests/unit/test_calibration_risk.py",
    ),
    Mutant(
        "kl_the_other_way",
        "KL is that of dense attention from the policy",
        "evaluation/agreement.py",
        "dense.exp() * (dense - other)",
        "other.exp() * (other - dense)",
        "tests/unit/test_evaluation_agreement.py",
    ),
    Mutant(
        "gain_counts_as_drop",
        "the worst task is the one that gains most",
        "evaluation/summary.py",
        "worst = max(drops",
        "worst = min(drops",
        "tests/unit/test_evaluation_summary.py",
    ),
    Mutant(
        "questions_see_each_other",
        "a question is asked on the cache of the one before",
        "demo/compare.py",
        "copy.deepcopy(cache) if quiz.alone",
        "cache if quiz.alone",
        "tests/unit/test_demo_compare.py",
    ),
    Mutant(
        "passed_over_keys_count",
        "keys that a product reads beyond the last one count",
        "backends/blockwise/products.py",
        "if n_seen < key.shape[1]:",
        "if n_seen < 0:",
        "tests/unit/test_products.py",
    ),
    Mutant(
        "drafts_see_later_tokens",
        "a query of the dense call over a draft sees the keys of later ones",
        "backends/blockwise/dense.py",
        ".tril_(n_keys - n_queries)",
        ".tril_(n_keys)",
        "tests/unit/test_products.py",
    ),
    Mutant(
        "short_calls_pay",
        "a prefill is gated however little it saves",
        "backends/blockwise/cost.py",
        "40 * 80 * _CALL",
        "-1",
        "tests/unit/test_break_even.py",
    ),
    Mutant(
        "price_not_halved",
        "a price is not halved",
        "measuring/prices.py",
        "along.square() / 2",
        "along.square()",
        "tests/unit/test_prices.py -k second_order",
    ),
    Mutant(
        "labels_are_the_likeliest",
        "labels are the likeliest tokens, not drawn ones",
        "measuring/prices.py",
        "uniform * share[:, -1:]",
        "0.5 * share[:, -1:]",
        "tests/unit/test_prices.py -k 'drawn or second_order'",
    ),
    Mutant(
        "prices_without_the_offset",
        "prices are put on margins without the offset of the probe",
        "measuring/probe.py",
        "MeasuredHeads(offset, probe=probe)",
        "MeasuredHeads(offset * 0, probe=probe)",
        "tests/unit/test_probe.py",
    ),
    Mutant(
        "groups_never_whole",
        "in decode no head opens with its group",
        "gates/decision.py",
        "opened | (opened.any(axis, keepdim=True) & (bulk_log_mass != -torch.inf))",
        "opened",
        "tests/unit/test_gate.py -k groups_open",
    ),
    Mutant(
        "prices_without_the_scale",
        "thresholds by price are not multiplied by the scale of the probe",
        "calibration/findings.py",
        'prices.margins[prices.rungs(target)] * self.tensors["probe_scale"]',
        "prices.margins[prices.rungs(target)]",
        "tests/unit/test_kl_target.py -k where_it_has_them",
    ),
    Mutant(
        "probe_left_out",
        "a gate with a probe does not read the hidden state",
        "gates/measured.py",
        "linear(hidden, probe).mT + margins",
        "linear(hidden, probe).mT * 0 + margins",
        "tests/integration/test_priced.py -k decides_as_the_calibration_says",
    ),
    Mutant(
        "values_left_out",
        "thresholds go by prices of the dense model, however much is closed",
        "calibration/prices.py",
        "cost = (1 - share) * self.price.double() + share * self.value.double()",
        "cost = self.price.double()",
        "tests/unit/test_kl_target.py",
    ),
    Mutant(
        "values_count_at_once",
        "the first pair that closes is predicted to cost what the last one does",
        "calibration/prices.py",
        "half = self._share_of_gated(self.opened(rungs)) / 2",
        "half = self._share_of_gated(self.opened(rungs))",
        "tests/unit/test_kl_target.py",
    ),
    Mutant(
        "expected_is_the_predicted",
        "a target in nats takes what prices predict, whatever was measured",
        "calibration/prices.py",
        "self.expected(self.at(step / _FINENESS)) <= nats",
        "self.predicted(self.at(step / _FINENESS)) <= nats",
        "tests/unit/test_kl_target.py",
    ),
    Mutant(
        "promise_without_the_next_document",
        "the promise of a KL trusts the average over the documents at hand",
        "calibration/prices.py",
        "(kl.sum(0) + KL_BOUND) / (len(kl) + 1)",
        "kl.sum(0) / max(len(kl), 1)",
        "tests/unit/test_kl_target.py -k promise",
    ),
    Mutant(
        "promise_that_falls",
        "a document whose KL falls as more closes makes a promise cheaper",
        "calibration/prices.py",
        ".clamp(0, KL_BOUND).cummax(-1).values",
        ".clamp(0, KL_BOUND)",
        "tests/unit/test_kl_target.py -k 'promise or worst'",
    ),
    Mutant(
        "finished_documents_again",
        "a resumed run reads its last document again",
        "measuring/steps.py",
        "if self._begun > self._done:",
        "if self._begun >= self._done:",
        "tests/unit/test_pricing.py -k broken_run",
    ),
    Mutant(
        "keys_of_the_batch_before",
        "all requests of a step read the keys of the first",
        "hf/pages.py",
        "places = self.places[sequence.first_key : sequence.first_key + sequence.keys]",
        "places = self.places[: sequence.keys]",
        "tests/integration/test_serving.py -k 'tokens_and_gates and open'",
    ),
    Mutant(
        "moments_stand_still",
        "moments of a served request do not go on while it writes",
        "hf/paged_attention.py",
        "if kept is not None and covered == needed:",
        "if kept is not None:",
        "tests/integration/test_serving.py -k gathers",
    ),
    Mutant(
        "table_reads_closed",
        "closed heads of a row over pages read its far blocks",
        "backends/flex/table.py",
        "torch.where(has_bulk.any(2, keepdim=True), owned.bulk_counts, 0)",
        "owned.bulk_counts.expand(-1, kv_heads, -1)",
        "tests/unit/test_page_table.py -k reference",
    ),
    Mutant(
        "table_block_missing",
        "a row over pages leaves out the last block of its far keys",
        "backends/flex/owned.py",
        "-(-(length - window) // block) - sink // block",
        "(length - window) // block - sink // block",
        "tests/unit/test_page_table.py -k reference",
    ),
    Mutant(
        "table_sees_others",
        "a row over pages sees keys of others where a kernel reads all",
        "backends/flex/owned.py",
        "is_own = (page >= 0) & (within < size) & (position < end)",
        "is_own = position < end",
        "tests/unit/test_page_table.py -k budget",
    ),
    Mutant(
        "table_closes_without_moments",
        "a row over pages closes before its first chunk is full",
        "backends/flex/table.py",
        "mass = torch.where(n_bulk >= CHUNK, mass, torch.inf)",
        "mass = torch.where(n_bulk >= CHUNK, mass, -torch.inf)",
        "tests/unit/test_page_table.py -k gates",
    ),
    Mutant(
        "rows_of_others",
        "what is read of a request in pages begins with its sink",
        "call/paged.py",
        "[self.places[row][sink : sink + n_bulk]]",
        "[self.places[row][:n_bulk]]",
        "tests/unit/test_paged.py",
    ),
    Mutant(
        "sliding_layer_one_longer",
        "a sliding layer of a served model sees one token too many",
        "hf/paged_attention.py",
        "(ages >= window)",
        "(ages > window)",
        "tests/integration/test_serving.py -k 'families and gemma3_text'",
    ),
    Mutant(
        "manager_of_another_patch",
        "a manager from an undone patch starts, and mixes up requests",
        "hf/engine.py",
        "if self.patchattn_batching.is_undone:",
        "if False:",
        "tests/integration/test_serving_patch.py -k ends_with_its_patch",
    ),
    Mutant(
        "room_of_a_full_cache",
        "a manager that was kept measures the room for a request in a cache that is not empty",
        "hf/engine.py",
        'if "add_waiting_request" in vars(scheduler):',
        "if False:",
        "tests/integration/test_serving_patch.py -k room",
    ),
)


def find_mistakes() -> list[str]:
    """Say which mutants no longer fit the source."""
    return [
        f"{mutant.name}: {n} occurrences in {mutant.file}"
        for mutant in MUTANTS
        if (n := (ROOT / "patchattn" / mutant.file).read_text().count(mutant.old)) != 1
    ]


def catcher(mutant: Mutant, copy: Path) -> str | None:
    """Run the tests against a mutant.

    Args:
        mutant: What to break.
        copy: Folder with a copy of the package and the tests.

    Returns:
        The first test that fails; None if all pass.
    """
    path = copy / "patchattn" / mutant.file
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        done = subprocess.run(
            f"{sys.executable} -m pytest -q -x -n0 --no-header -p no:cacheprovider {mutant.tests}",
            shell=True,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        path.write_text(sound)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"pytest did not run for {mutant.name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


def main() -> int:
    """Break, test, print; returns the number of mutants that live."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants to run; all if none is named")
    parser.add_argument("--write", action="store_true", help="write the table to docs/explanation/testing.md")
    arguments = parser.parse_args()
    if mistakes := find_mistakes():
        sys.exit("These mutants do not fit the source:\n" + "\n".join(mistakes))
    if unknown := set(arguments.names) - {mutant.name for mutant in MUTANTS}:
        sys.exit(f"No such mutants: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    rows, alive = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("patchattn", "tests", "docs", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, copy)
        for mutant in chosen:
            test = catcher(mutant, copy)
            alive += test is None
            print(f"{mutant.name:32} {'LIVES' if test is None else 'caught by ' + test}", flush=True)
            caught = "**not caught**" if test is None else f"`{test.removeprefix('tests/')}`"
            rows.append(f"| `{mutant.file}` | {mutant.meaning} | {caught} |")
    if arguments.write:
        head = ["| file | what is wrong | first test that fails |", "|---|---|---|"]
        page = PAGE.read_text()
        before, after = page[: page.index(_BEGIN) + len(_BEGIN)], page[page.index(_END) :]
        PAGE.write_text("\n".join([before, *head, *rows, after]))
    print(f"{len(chosen) - alive} of {len(chosen)} mutants caught")
    return alive


if __name__ == "__main__":
    sys.exit(main())
