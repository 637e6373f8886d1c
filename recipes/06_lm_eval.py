"""Run EleutherAI's lm-evaluation-harness on a patched model: a task of your own, without a network.

pip install -c tests/constraints.txt -e ".[eval]"
python recipes/06_lm_eval.py

The harness's own long-context groups need a network; docs/how-to/evaluate-your-model.md shows the call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1])]

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, Policy, demo
from patchattn.evaluation import Material, make_sample
from patchattn.evaluation.documents import check_longest

TASK = """
task: look_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.json}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: 6, until: ["\\n"]}}
filter_list: [{{name: stripped, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, tokenizer: Any, *, length: int, samples: int) -> None:
    """Write facts hidden in real text, with questions, as the harness reads them."""
    material = Material(demo.sample_text(), tokenizer)
    made = [make_sample("fact", material, length=length, seed=f"lm-eval/{at}") for at in range(samples)]
    # The tokenizer puts the first token there again.
    lines = [{"prompt": tokenizer.decode(one.prompt[1:]), "answer": one.answers[0]} for one in made]
    (folder / "data.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "look_up.yaml").write_text(TASK.format(folder=folder))


def accuracy(model: Any, tokenizer: Any, folder: Path) -> float:
    """Run the harness: a patched model is passed as any other one is."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=True)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=harness, tasks=["look_up"], task_manager=tasks, bootstrap_iters=0)
    if found is None:
        raise RuntimeError("the harness gives results to the first process only")
    return float(found["results"]["look_up"]["exact_match,stripped"])


def main() -> None:
    """Compare dense attention with three gates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    model, tokenizer = demo.load()
    check_longest(model, arguments.length)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, tokenizer, length=arguments.length, samples=arguments.samples)
        dense = accuracy(model, tokenizer, folder)
        print(f"dense   exact match {dense:.3f}")
        found = {}
        for gate in (OpenGate(), MomentGate(), ClosedGate()):
            policy = Policy(window_size=64, min_bulk=0, gate=gate)
            with patchattn.patch(model, policy) as handle:
                found[gate.kind] = accuracy(model, tokenizer, folder)
            opened = handle.report().open_fraction()
            print(f"{gate.kind:7} exact match {found[gate.kind]:.3f}, {opened:.1%} of the pairs open")
    if abs(found["open"] - dense) > 1 / arguments.samples:
        sys.exit("open gates should answer as dense attention does, but for one near tie")
    if not found["closed"] < dense:
        sys.exit("closed gates should not find facts that lie beyond the window")


if __name__ == "__main__":
    main()
