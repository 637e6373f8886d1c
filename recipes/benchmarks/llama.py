"""llama.cpp on the same tokens, in a Python that has `llama-cpp-python` and need not have torch.

Used by `model.py --llama`. Reads a JSON object from standard input: `file`, `threads`, `repeats`, `prompt` (how many of
the tokens are read at once) and `tokens`. Prints, as JSON, milliseconds to the first token and for each later one, a
number for each repeat, and the peak of memory in MiB above the loaded model.
"""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
from peak import resident_peak


def main() -> None:
    """Read the prompt and go on with its text, as often as asked for."""
    asked = json.load(sys.stdin)
    prompt, following = asked["tokens"][: asked["prompt"]], asked["tokens"][asked["prompt"] :]
    threads = {"n_threads": asked["threads"], "n_threads_batch": asked["threads"]}
    # Keys and values are float16, as llama.cpp has them by default.
    model = Llama(asked["file"], n_ctx=len(asked["tokens"]), verbose=False, **threads)
    # Weights are read from the file as they are needed.
    model.eval(prompt[:64])
    found: dict = {"prefill": [], "decode": []}

    def read_on() -> None:
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        found["prefill"].append(1e3 * (time.perf_counter() - begin))
        begin = time.perf_counter()
        for token in following:
            model.eval([token])
        found["decode"].append(1e3 * (time.perf_counter() - begin) / len(following))

    found["MiB"] = resident_peak(read_on)
    for _ in range(asked["repeats"] - 1):
        read_on()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
