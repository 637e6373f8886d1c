"""The OpenAI-compatible server of transformers, for one model that is at hand; what it calls things is known here only.

It is the one that `transformers serve` starts. Two things differ: it does not load its model, but is given one that may
be patched, and it does not start before that is known to be served.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import socket
from typing import Any

from patchattn.errors import MissingPackageError, UnsupportedCallError
from patchattn.hf.loading import first_line

_PACKAGES = ("fastapi", "openai", "uvicorn")


def check_packages() -> None:
    """Refuse to go on without the packages of the server.

    Raises:
        MissingPackageError: Names those that are not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"The server of transformers needs {', '.join(missing)}.", fix='pip install "patchattn[serve]"'
        )


class ModelServer:
    """A server of one model, which does not run yet.

    Args:
        model: The model; patched before.
        tokenizer: Its tokenizer.
        name: What clients call the model.
        num_blocks: Blocks of the cache, for all requests together.
        max_batch_tokens: Most tokens in one step of the engine: longer prompts are read in parts.

    `cache_tokens` is the number of tokens that the cache has room for.

    Raises:
        MissingPackageError: A package of the server is not installed.
        UnsupportedCallError: The model, its patch or the cache can't be served; says why.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, num_blocks: int, max_batch_tokens: int) -> None:
        check_packages()
        self.cache_tokens = _try_cache(model, num_blocks, max_batch_tokens)
        self._serve = _server_class()(
            continuous_batching=True, cb_num_blocks=num_blocks, cb_max_batch_tokens=max_batch_tokens, non_blocking=True
        )
        loader = self._serve._model_manager
        known_as = loader.process_model_name(name)

        def at_hand(what: Any) -> Any:
            def load(asked: str, *_: Any, **__: Any) -> Any:
                if asked != known_as:
                    raise ValueError(f"This server has {name!r} and loads no other model.")
                return what

            return load

        # Asked for again after /reset, which drops what is loaded.
        loader._load_model, loader._load_processor = at_hand(model), at_hand(tokenizer)
        loader.force_model, loader.model_timeout = name, -1
        loader.load_model_and_processor(known_as)

    def run(self, listening: socket.socket) -> None:
        """Serve until `stop` or a signal, and leave no thread behind.

        Args:
            listening: Where clients come to; closed afterwards.

        Raises:
            KeyboardInterrupt: Ctrl-C, once open answers have ended.
        """
        try:
            self._serve.server.run([listening])
        finally:
            if self.engine is not None:
                # Requests that are left have nobody who waits for them.
                self.engine.stop(hard_stop=True)

    def stop(self) -> None:
        """Make `run` return once open answers have ended; may be called from any thread."""
        self._serve.server.should_exit = True

    @property
    def engine(self) -> Any:
        """The manager of continuous batching; None before the first request."""
        of_model = self._serve._generation_state._cb_manager
        return None if of_model is None else of_model._cb


def _server_class() -> Any:
    from transformers.cli.serve import Serve

    class NotStarted(Serve):
        def start_server(self) -> None:
            """Wait for `run`."""

    return NotStarted


def _try_cache(model: Any, num_blocks: int, max_batch_tokens: int) -> int:
    """Make the engine's cache once, and return how many tokens one request may have.

    The server makes it at the first request, where a refusal would end the engine.
    """
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens)
    # A copy: the engine writes into it.
    manager = model.init_continuous_batching(copy.deepcopy(model.generation_config), config)
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

    try:
        return infer_max_single_request_tokens(manager._create_batch_processor().cache)
    # What it raises where memory is short depends on who is asked for it: MemoryError here, RuntimeError in torch.
    except (MemoryError, RuntimeError) as error:
        raise UnsupportedCallError(
            f"There is no memory for a cache of {num_blocks:,} blocks: {first_line(error)}.", fix="ask for fewer blocks"
        ) from error
    finally:
        # The engine's objects know each other; without this the cache would be there twice.
        del manager
        gc.collect()
