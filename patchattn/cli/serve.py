"""`patchattn serve`: the OpenAI-compatible server of transformers, with a patched model."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from patchattn.cli.evaluate import SHIPPED
from patchattn.cli.models import load
from patchattn.cli.options import Device
from patchattn.cli.policies import in_words
from patchattn.cli.problems import read_text, stop
from patchattn.hf.patching import PatchHandle, patch
from patchattn.hf.serving import ModelServer, check_packages
from patchattn.hf.weights import input_device, input_dtype
from patchattn.policy import Policy


def serve(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a causal language model, or demo for the shipped model.")
    ],
    *,
    policy: Annotated[
        Path | None, typer.Option(help="Policy as a JSON file. Default: that of the calibration, or Policy().")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Folder or Hub id of a calibration of the model.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, and there is no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    device: Device = "cpu",
    num_blocks: Annotated[
        int,
        typer.Option(
            min=1, help="Blocks of the cache, of 256 tokens each, for all requests together; taken at the first one."
        ),
    ] = 128,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in a step of the engine: longer prompts are read in parts.")
    ] = 2048,
) -> None:
    """Serve a patched model to OpenAI clients: many requests at once, through the engine of transformers.

    It is the server of `transformers serve --continuous-batching`, pinned to this model. Ctrl-C ends it and prints what
    the gates did. Needs the extra `serve` and transformers 5.24 or later; docs/how-to/serve.md has more.

    **Examples**

    - `patchattn serve demo --port 8001`: the shipped model
    - `patchattn serve Qwen/Qwen3-0.6B --policy mine.json --num-blocks 512`: room for 131,072 tokens
    - `patchattn serve MODEL --calibration me/model-patchattn --device cuda`
    """
    check_packages()
    chosen = None if policy is None else Policy.model_validate_json(read_text(policy))
    with _listening(host, port) as listening:
        loaded, tokenizer = load(None if model == SHIPPED else model, device)
        handle = patch(loaded, chosen, calibration=calibration)
        server = ModelServer(loaded, tokenizer, model, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens)
        _tell(handle, tokenizer, model, listening, server.cache_tokens)
        # Whatever else ends a service ends it as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            server.run(listening)
    Console().print(str(handle.report()), markup=False, highlight=False, soft_wrap=True)


def _listening(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded; whoever comes early waits until the server runs."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise stop(f"Can't listen on {host}:{port}: {reason}.", fix="Choose another --host or --port.") from None


def _tell(handle: PatchHandle, tokenizer: Any, name: str, listening: socket.socket, cache_tokens: int) -> None:
    """Say what is served, and how to ask it something."""
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    asks = {"messages": [{"role": "user", "content": "Hello"}]} if tokenizer.chat_template else {"prompt": "Hello"}
    path = "chat/completions" if tokenizer.chat_template else "completions"
    kind = f"{input_device(handle.model).type}, {str(input_dtype(handle.model)).removeprefix('torch.')}"
    body = dumps({"model": name, **asks, "max_tokens": 100})
    lines = [
        f"Model: {name}, {kind}, backend {handle.backend}.",
        in_words(handle.policy),
        f"Cache: {cache_tokens:,} tokens, for all requests together.",
        f"Address: {address}; Ctrl-C ends it.",
        "",
        f"curl {address}/{path} -H 'Content-Type: application/json' -d '{body}'",
        "",
    ]
    if not tokenizer.chat_template:
        lines.insert(-2, "The model has no chat template: /v1/completions only.")
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
