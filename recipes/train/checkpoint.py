"""Save and load the state of a training run, as one safetensors file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: Optimizer steps taken.
        seconds: Training time, evaluation and start-up left out.
        tokens: Tokens seen.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write weights, optimizer state and progress; the file is replaced in one move."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}@{name}"] = torch.as_tensor(value)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Read what `save_checkpoint` wrote into a model and, if given, its optimizer."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        progress = json.loads((file.metadata() or {})["progress"])
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))
            if optimizer is not None:
                optimizer.state[parameter] = {
                    key: file.get_tensor(f"{key}@{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }
    return Progress(**progress)
