"""Run the needles of EleutherAI's lm-evaluation-harness (RULER's niah_*) on a patched model, without a network.

pip install -c tests/constraints.txt -e ".[eval]"
python recipes/09_lm_eval_needles.py --model FOLDER --length 2048

niah_single_1, niah_multikey_2 and niah_multikey_3 make up their haystack. The others hide needles in essays, which the
harness downloads, and nltk downloads what cuts them into sentences. --text FILE takes a text of yours instead, cut
after full stops; such scores are for comparing policies, not for comparing with published ones.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1])]

import patchattn
from patchattn import ClosedGate, Policy, demo
from patchattn.evaluation.documents import check_longest
from patchattn.hf.loading import load_pretrained

OWN_HAYSTACK = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")


def use_text(text: str | None, samples: int) -> Path:
    """Put a text in the place of essays, and make no more samples than are asked; returns the folder of the tasks."""
    import nltk

    nltk.download = lambda *_, **__: False  # else it asks the network as soon as the tasks are imported
    from lm_eval.tasks.ruler import prepare_niah

    if text is not None:
        haystack, words = prepare_niah.get_haystack, text.split()
        prepare_niah.get_haystack = lambda type_haystack: words if type_haystack == "essay" else haystack(type_haystack)
        prepare_niah.sent_tokenize = lambda part: re.split(r"(?<=[.!?]) ", part)
    make = prepare_niah.generate_samples  # always 500, of which the first are asked
    prepare_niah.generate_samples = lambda *given, **more: make(*given, **more | {"num_samples": samples})
    return Path(prepare_niah.__file__).parent


def scores(model: Any, tokenizer: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run the harness: a patched model is passed as any other one is. Returns a score from 0 to 1 for each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    about = {"pretrained": str(arguments.model), "max_seq_lengths": [arguments.length]}
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=arguments.tasks.split(","),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, metadata=about),
        gen_kwargs={"max_gen_toks": arguments.most},
        limit=arguments.samples,
        bootstrap_iters=0,
    )
    if found is None:
        raise RuntimeError("the harness gives results to the first process only")
    return {task: result[f"{arguments.length},none"] for task, result in found["results"].items()}


def main() -> None:
    """Compare dense attention with the default gate and with all gates closed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.model_folder(), help="folder of a model")
    parser.add_argument("--tasks", default="niah_single_1", help="with commas between")
    parser.add_argument("--text", type=Path, help="your own text, in the place of essays")
    parser.add_argument("--length", type=int, default=1024, help="tokens in prompt and answer")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--most", type=int, default=32, help="most tokens that are written; the harness's own is 128")
    arguments = parser.parse_args()
    if arguments.text is None and (essays := set(arguments.tasks.split(",")) - {*OWN_HAYSTACK}):
        sys.exit(f"{', '.join(sorted(essays))}: needs --text, or a network and the harness's own command")
    folder = use_text(None if arguments.text is None else arguments.text.read_text("utf-8"), arguments.samples)
    model, tokenizer = load_pretrained(arguments.model)
    check_longest(model, arguments.length)
    regions: dict[str, int] = {"window_size": arguments.window, "min_bulk": 0}
    found = {"dense": scores(model, tokenizer, folder, arguments)}
    for name, policy in {"default": Policy(**regions), "closed": Policy(**regions, gate=ClosedGate())}.items():
        with patchattn.patch(model, policy):
            found[name] = scores(model, tokenizer, folder, arguments)
    for task in found["dense"]:
        print(f"{task}: " + ", ".join(f"{name} {by_task[task]:.3f}" for name, by_task in found.items()))
    if not any(found["dense"].values()):
        print("Dense attention answers nothing, so this says nothing about a policy.")


if __name__ == "__main__":
    main()
