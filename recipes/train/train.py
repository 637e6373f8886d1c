"""Train the shipped model on the standard library and on long-range tasks.

    python recipes/train/train.py --minutes 85 --out runs/demo

Needs a CPU only. Schedule and learning rate follow the clock, so that a run ends on time on any
machine; the data are the same for a given number of processes. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

# Recipes run from a checkout: the package beside them is used, installed or not.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from batches import make_batch
from checkpoint import Progress, load_checkpoint, save_checkpoint
from corpus import collect, join, train_tokenizer
from model import TrainingForward, build_model
from schedule import learning_rate_at, mix_at

from patchattn.evaluation.documents import tokenize_text

_TOKENS_PER_STEP = 8192
_SECONDS_BETWEEN_CHECKPOINTS = 120
_SECONDS_BETWEEN_LOGS = 20


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=85.0, help="training time")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="one per core")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()


def _average_gradients(model: LlamaForCausalLM, seconds: float) -> float:
    """Average gradients over the processes, and the time of each, so that they agree on it."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.view(-1) for g in gradients] + [torch.tensor([seconds])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return flat[-1].item()


def _train(rank: int, arguments: argparse.Namespace) -> None:
    """Run one process of the training."""
    torch.set_num_threads(1)
    store = f"file://{(arguments.out / f'rendezvous-{os.getppid()}').resolve()}"
    dist.init_process_group("gloo", store, rank=rank, world_size=arguments.processes)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out / "tokenizer")
    text = tokenize_text(join([f for f in collect() if not f.held_out]), tokenizer)

    model = build_model(tokenizer.vocab_size, seed=arguments.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    path = arguments.out / "checkpoint.safetensors"
    progress = load_checkpoint(path, model, optimizer) if arguments.resume else Progress()
    forward = TrainingForward(model)

    log: dict[str, list[float]] = defaultdict(list)
    logged = saved = time.monotonic()
    last_rank = rank == arguments.processes - 1
    while progress.seconds < 60 * arguments.minutes:
        started = time.monotonic()
        done = progress.seconds / (60 * arguments.minutes)
        mix = mix_at(done)
        n_rows = max(1, _TOKENS_PER_STEP // arguments.processes // mix.length)
        seed = f"{arguments.seed}/{progress.step}/{rank}"
        batch = make_batch(text, tokenizer, mix, n_rows=n_rows, seed=seed)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(done, progress.step)
        with torch.autocast("cpu", torch.bfloat16):
            losses = forward(batch.tokens, batch.positions, batch.targets)
        _weighted_loss(losses, batch.weights).backward()
        elapsed = time.monotonic() - started
        # The first step after a start compiles; it is not training time.
        counted = elapsed if progress.step and elapsed < 15 else 1.0
        progress.seconds = _average_gradients(model, progress.seconds + counted)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        progress.tokens += n_rows * mix.length * arguments.processes

        with torch.no_grad():
            for name, span in batch.parts.items():
                log[name] += losses[span].tolist()
        now = time.monotonic()
        if rank == 0 and now - logged > _SECONDS_BETWEEN_LOGS:
            parts = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(log.items()) if v)
            print(
                f"{time.strftime('%H:%M:%S')} {done:.3f} step {progress.step} "
                f"tokens {progress.tokens / 1e6:.2f}M length {mix.length} {parts}",
                flush=True,
            )
            logged = now
            log.clear()
        if last_rank and now - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            save_checkpoint(path, model, optimizer, progress)
            saved = now
    if last_rank:
        save_checkpoint(path, model, optimizer, progress)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Train the tokenizer, then the model on all processes."""
    arguments = _parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        files = [file for file in collect() if not file.held_out]
        train_tokenizer(join(files)).save_pretrained(arguments.out / "tokenizer")
    mp.spawn(_train, (arguments,), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
