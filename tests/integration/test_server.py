"""The OpenAI-compatible server of transformers with a patched model, asked by OpenAI's client over loopback."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import transformers
from packaging.version import Version

import patchattn
from patchattn import demo
from patchattn.errors import UnsupportedCallError
from patchattn.gates import MomentGate, OpenGate
from patchattn.hf.serving import ModelServer
from patchattn.policy import Policy

openai = pytest.importorskip("openai", reason="needs the extra serve")
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="the engine before transformers 5.24 has no hooks"
)

NAME = "org/shipped"
ASKED = Policy(sink_size=4, window_size=32, min_bulk=0, gate=MomentGate(threshold=0.6))


class Served:
    """A running server, a client of it, and what was patched."""

    def __init__(self, server: ModelServer, address: str, handle: patchattn.PatchHandle | None) -> None:
        self.server, self.address, self.handle = server, address, handle
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=120)

    def chat(self, text: str, most: int = 12, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": text}], max_tokens=most, temperature=0, **options
        )

    def answer(self, text: str, most: int = 12) -> str:
        return self.chat(text, most).choices[0].message.content

    def fetch(self, path: str, body: bytes | None = None) -> tuple[int, str]:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def active(self) -> Any:
        """The requests that the engine is at."""
        return self.server.engine.batch_processor.scheduler.active_requests

    def is_idle(self) -> bool:
        """Whether the engine keeps no request, no block of one, and nobody who waits."""
        cache = self.server.engine.batch_processor.cache
        free = cache.compute_free_capacity(relative=False)
        for each in cache.cache_allocators.values():
            free += len(each.ledger.cached_blocks) * each.bytes_per_block  # kept for prompts that begin alike
        is_free = free == cache.num_sectors * cache.bytes_per_sector
        return is_free and not self.active and not self.server.engine.output_router.result_handlers


@contextmanager
def served(policy: Policy | None) -> Iterator[Served]:
    model, tokenizer = demo.load()
    model.float()  # so that the same arithmetic in another order writes the same tokens
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    handle = None if policy is None else patchattn.patch(model, policy, backend="blockwise")
    server = ModelServer(model, tokenizer, NAME, num_blocks=8, max_batch_tokens=256)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=(listening,))
        thread.start()
        try:
            yield Served(server, address, handle)
        finally:
            server.stop()
            thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def patched() -> Iterator[Served]:
    with served(ASKED) as found:
        yield found


def text_of(begin: int, length: int = 900) -> str:
    return demo.sample_text()[begin : begin + length]


def written(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


@pytest.mark.slow
def test_open_gates_answer_as_the_model_that_is_not_patched() -> None:
    texts = [text_of(begin) for begin in (0, 5000, 9000)]
    found = []
    for policy in (None, ASKED.model_copy(update={"gate": OpenGate()})):
        with served(policy) as running, ThreadPoolExecutor(3) as clients:
            found.append(list(clients.map(running.answer, texts)))
    assert found[0] == found[1]
    assert running.handle is not None
    report = running.handle.report()
    assert report.open_fraction("prefill") == report.open_fraction("decode") == 1


def test_a_stream_says_what_an_answer_says(patched: Served) -> None:
    whole = patched.chat(text_of(0))
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    *_, last = stream = list(patched.chat(text_of(0), stream=True))
    assert len(stream) > 3
    assert written(stream) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == "length"
    assert last.usage == whole.usage


def test_gates_decide_in_the_engine(patched: Served) -> None:
    assert patched.handle is not None
    patched.handle.reset_report()
    patched.answer(text_of(3000))
    report = patched.handle.report()
    for phase in ("prefill", "decode"):
        assert 0 < report.open_fraction(phase) < 1


def test_completions_need_no_chat_template(patched: Served) -> None:
    found = patched.client.completions.create(model=NAME, prompt=text_of(0), max_tokens=12, temperature=0)
    assert found.choices[0].text == patched.answer(text_of(0))


def test_two_clients_are_answered_at_once(patched: Served) -> None:
    alone = patched.answer(text_of(700), 200)
    slow = patched.chat(text_of(700), 200, stream=True)
    first = [next(slow), next(slow)]
    patched.answer(text_of(100), 4)
    assert patched.active
    assert written([*first, *slow]) == alone


def test_a_client_that_goes_away_frees_its_place(patched: Served) -> None:
    alone = patched.answer(text_of(100), 60)
    slow = patched.chat(text_of(700), 1000, stream=True)
    next(slow), next(slow)
    with ThreadPoolExecutor(1) as other:
        stays = other.submit(patched.answer, text_of(100), 60)
        assert wait_for(lambda: len(patched.active) == 2)
        slow.close()
        assert stays.result() == alone
    assert wait_for(patched.is_idle)
    assert patched.fetch("/health") == (200, '{"status":"ok"}')


@pytest.mark.parametrize(
    ("stream", "error", "said"),
    [(True, openai.APIError, "the cache holds 2,048"), (False, openai.InternalServerError, "Internal Server Error")],
)
def test_a_prompt_longer_than_the_cache_fails_alone(patched: Served, stream: bool, error: type, said: str) -> None:
    alone = patched.answer(text_of(100), 60)
    with ThreadPoolExecutor(1) as other:
        stays = other.submit(patched.answer, text_of(100), 60)
        assert wait_for(lambda: bool(patched.active))
        with pytest.raises(error) as caught:
            list(patched.chat(text_of(0, 20_000), stream=stream))
        assert stays.result() == alone
    assert said in str(caught.value.body)
    assert wait_for(patched.is_idle)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_wait_harms_nobody(patched: Served, stream: bool) -> None:
    alone = patched.answer(text_of(100), 60)
    asked = {"model": NAME, "prompt": text_of(700), "max_tokens": 200, "stream": stream}
    connection = http.client.HTTPConnection(patched.address.removeprefix("http://"))
    with ThreadPoolExecutor(1) as other:
        stays = other.submit(patched.answer, text_of(100), 60)
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        assert wait_for(lambda: len(patched.active) == 2)
        connection.close()
        assert stays.result() == alone
    assert wait_for(patched.is_idle)


@pytest.mark.slow
def test_many_clients_leave_nothing_behind(patched: Served, caplog: pytest.LogCaptureFixture) -> None:
    # Records of errors keep the frames in which they were raised.
    caplog.set_level(logging.CRITICAL, logger="ContinuousBatchingLogger")

    def ask(at: int) -> None:
        if at % 5 == 0:
            stream = patched.chat(text_of(100 * at), 400, stream=True)
            next(stream), next(stream)
            stream.close()
        elif at % 7 == 0:
            with pytest.raises(openai.APIError):
                list(patched.chat(text_of(0, 9000), stream=True))
        else:
            assert patched.chat(text_of(100 * at, 300 + 50 * (at % 11)), 4).usage.completion_tokens == 4

    with ThreadPoolExecutor(6) as clients:
        list(clients.map(ask, range(120)))
    assert wait_for(patched.is_idle)
    assert patched.server.engine.output_router.output_queue.empty()
    assert len(patched.server.engine.patchattn_memories) <= 6  # of the last step


def test_mistakes_get_the_servers_own_errors(patched: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        patched.client.completions.create(model="org/other", prompt="a")
    assert "pinned to 'org/shipped'" in str(caught.value.body)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        patched.client.completions.create(model=NAME, prompt="a", extra_body={"no_such_field": 1})
    assert "no_such_field" in str(caught.value.body)
    with pytest.raises(openai.APIError) as caught:
        list(patched.chat("", stream=True))
    assert "prompt is empty" in str(caught.value.body)
    status, said = patched.fetch("/v1/chat/completions", b'{"model": ')
    assert status == 422
    assert "detail" in said
    assert patched.answer(text_of(0))


@pytest.mark.slow
def test_after_a_reset_the_same_patched_model_answers(patched: Served) -> None:
    assert patched.handle is not None
    before = patched.answer(text_of(0))
    assert patched.fetch("/reset", b"") == (200, '{"status":"ok"}')
    patched.handle.reset_report()
    assert patched.answer(text_of(0)) == before
    assert patched.handle.report().open_fraction("decode") < 1
    (listed,) = patched.client.models.list().data
    assert listed.id == NAME
    assert listed.status == {"value": "loaded"}


def test_no_other_model_is_loaded(patched: Served) -> None:
    _, said = patched.fetch("/load_model", b'{"model": "org/other"}')
    assert "loads no other model" in said


@pytest.mark.slow
def test_a_server_that_stops_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with served(ASKED) as running:
        running.answer(text_of(0))
        model = running.handle.model
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before
    running.handle.unpatch()
    assert not patchattn.is_patched(model)


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_refused_at_once() -> None:
    model, tokenizer = demo.load()
    with patchattn.patch(model, ASKED, backend="blockwise"):
        with pytest.raises(UnsupportedCallError, match="no memory for a cache of 1,000,000,000 blocks"):
            ModelServer(model, tokenizer, NAME, num_blocks=10**9, max_batch_tokens=256)
        assert model.generation_config.eos_token_id == 1
    with patchattn.patch(model, ASKED, backend="blockwise", record="timeline"):
        with pytest.raises(UnsupportedCallError, match="timeline"):
            ModelServer(model, tokenizer, NAME, num_blocks=4, max_batch_tokens=256)
