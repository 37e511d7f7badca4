"""A client that leaves ends its request in the engine, on real sockets: in-process transports cannot show it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from jaxserve.types import Delta

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def send(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps({"model": "tiny", **body}).encode()
    sock = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Clocked:
    """A pace for the scripted engine: one delta a tick, so that a test knows how many came after it left."""

    def __init__(self) -> None:
        self.ticks = 0
        self._moved = threading.Condition()

    def tick(self) -> None:
        with self._moved:
            self.ticks += 1

    def __call__(self) -> Any:
        return self._next()

    async def _next(self) -> None:
        while self.ticks <= 0:
            await asyncio.sleep(0.001)
        self.ticks -= 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_a_stream_that_nobody_reads_is_aborted_within_one_delta(make_server: Any, listen: Any, path: str, reset: bool):
    server = make_server(reply="x" * 40)
    server.engine.pace = clock = Clocked()
    sock = send(
        listen(server.app),
        path,
        {"stream": True, "messages": MESSAGES} if path == CHAT else {"stream": True, "prompt": "a"},
    )
    clock.tick()
    while b"data: " not in sock.recv(65536):  # the head may come alone
        pass
    wait_until(lambda: len(server.engine.yielded) == 1)
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()
    wait_until(lambda: len(server.engine.aborted) == 1)  # without another delta
    assert len(server.engine.yielded) == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_aborted_whose_client_leaves_before_the_first_token(
    make_server: Any, listen: Any, path: str, stream: bool
):
    """A handler that only awaits the engine is not cancelled by the server: it must listen itself."""
    never = asyncio.Event()
    server = make_server(script=[never])
    body = {"stream": stream} | ({"messages": MESSAGES} if path == CHAT else {"prompt": "a"})
    sock = send(listen(server.app), path, body)
    wait_until(lambda: len(server.engine.calls) == 1)
    assert not server.engine.aborted
    sock.close()
    wait_until(lambda: len(server.engine.aborted) == 1)


@pytest.mark.parametrize("stream", [True, False])
def test_every_prompt_of_a_request_is_aborted(make_server: Any, listen: Any, stream: bool):
    server = make_server(script=[asyncio.Event()])
    sock = send(listen(server.app), COMPLETIONS, {"prompt": ["a", "b", "c"], "stream": stream})
    wait_until(lambda: len(server.engine.calls) == 3)
    sock.close()
    wait_until(lambda: len(server.engine.aborted) == 3)
    assert set(server.engine.aborted) == {request_id for *_, request_id in server.engine.calls}


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": 2, "use_beam_search": True}, {"best_of": 3}])
@pytest.mark.parametrize("stream", [True, False])
def test_all_choices_of_a_request_are_aborted_as_one(
    make_server: Any, listen: Any, stream: bool, fields: dict[str, Any]
):
    stream = stream and "best_of" not in fields
    server = make_server(script=[Delta((1,)), Delta((1,), index=1), asyncio.Event()])
    sock = send(listen(server.app), COMPLETIONS, {"prompt": "a", "stream": stream, **fields})
    wait_until(lambda: len(server.engine.yielded) == 2)
    assert not server.engine.aborted
    sock.close()
    wait_until(lambda: len(server.engine.aborted) == 1)
    assert server.engine.told == []  # the iterator was closed, which ends all continuations


def test_one_that_leaves_disturbs_no_other(make_server: Any, listen: Any, tokenizer: Any):
    server = make_server(reply="abcdefgh")
    server.engine.pace = clock = Clocked()
    url = listen(server.app)
    leaver = send(url, COMPLETIONS, {"prompt": "a", "stream": True, "request_id": "same"})
    stayer = send(url, COMPLETIONS, {"prompt": "a", "request_id": "same"})
    wait_until(lambda: len(server.engine.calls) == 2)
    leaver.close()
    wait_until(lambda: len(server.engine.aborted) == 1)
    for _ in range(20):
        clock.tick()
    answer = stayer.recv(65536)
    stayer.close()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == "abcdefgh"
    assert len(server.engine.aborted) == 1


def test_nothing_is_left_of_a_hundred_that_left(make_server: Any, listen: Any):
    server = make_server(script=[Delta((1,)), asyncio.Event()])
    url = listen(server.app)
    before = threading.active_count()
    for n in range(100):
        sock = send(url, COMPLETIONS, {"prompt": ["a", "b"] if n % 2 else "a", "stream": n % 3 > 0})
        if n % 5:
            wait_until(lambda n=n: len(server.engine.calls) > n)
        sock.close()
    wait_until(lambda: len(server.engine.aborted) == len(server.engine.calls) > 0)
    assert threading.active_count() <= before + 1
