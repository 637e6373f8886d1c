"""Cut a model's heads over several processes; each gates the heads that are its own.

torchrun --nproc-per-node 2 recipes/07_tensor_parallel.py

Without GPUs the processes talk through gloo on the CPU. The number of processes has to divide the KV heads.
"""

from __future__ import annotations

import argparse
import os

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchattn
from patchattn import Policy, demo


def main() -> None:
    """Write the same text with all heads in one process and with the heads cut over all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(demo.model_folder()), help="folder or name on the Hub")
    parser.add_argument("--characters", type=int, default=6000, help="characters of text to read")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("Start this with torchrun --nproc-per-node 2 recipes/07_tensor_parallel.py")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompt = tokenizer(demo.sample_text()[: options.characters], return_tensors="pt")

    # float32, so that summing over processes in another order does not change a token.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, tp_plan="auto").eval()
    tokens, report = write(model, prompt.to(model.device), options.new_tokens)
    print_in_turn(rank, ranks, f"rank {rank}: {described(report)}")

    if rank == 0:
        alone = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(model.device)
        expected, report = write(alone, prompt.to(model.device), options.new_tokens)
        print(f"one process: {described(report)}")
        print(f"the same {options.new_tokens} tokens: {'yes' if torch.equal(tokens, expected) else 'NO'}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def write(model, prompt, new_tokens: int):
    """Write tokens greedily on the patched model; return them and the report of this process's heads."""
    with patchattn.patch(model, Policy(window_size=128, min_bulk=0)) as handle:
        tokens = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
    return tokens.cpu(), handle.report()


def described(report) -> str:
    """Say how many heads a process holds, and how many pairs they opened."""
    opened = sum(sum(counts.open_pairs) for found in report.layers.values() for counts in found.values())
    heads = len(next(iter(report.head_open_fractions().values())))
    return f"{heads} query heads a layer, {opened:,} pairs open ({report.open_fraction():.1%})"


def print_in_turn(rank: int, ranks: int, line: str) -> None:
    """Print the line of each process, one after the other."""
    for turn in range(ranks):
        if turn == rank:
            print(line, flush=True)
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
