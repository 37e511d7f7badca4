"""A real server process with a counting engine, and raw sockets to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

SCRIPT = Path(__file__).parent / "fake_server.py"
REPO = Path(__file__).parents[3]


class FakeServer:
    """One process of `fake_server.py`, and what it wrote."""

    def __init__(self, settings: dict[str, Any]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(REPO / part) for part in (".", "server", "checkpoints")),
            "PYTHONWARNINGS": "error",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._new_line = threading.Condition()
        pipes = (self.process.stdout, self.process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()
        self.port = int(re.search(r":(\d+),", self.wait_for_line("listening on"))[1])

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            with self._new_line:
                self.lines.append(line.rstrip("\n"))
                self._new_line.notify_all()

    def wait_for_line(self, part: str, timeout: float = 15.0) -> str:
        """The first line that holds `part`."""
        deadline = time.monotonic() + timeout
        with self._new_line:
            while not (found := [line for line in self.lines if part in line]):
                if not self._new_line.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no line with {part!r} in:\n" + "\n".join(self.lines))
        return found[0]

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, data: bytes, timeout: float = 10.0) -> bytes:
        """All that the server sends before it closes, upon `data`. The write side stays open."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            return read_all(sock)

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """One request on a connection of its own."""
        with httpx.Client(base_url=self.url, timeout=10.0, trust_env=False) as client:
            return client.request(method, path, **kwargs)

    def stop(self, sig: int = signal.SIGTERM) -> None:
        self.process.send_signal(sig)

    def exit_code(self, timeout: float = 10.0) -> int:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs after {timeout} s:\n{self.log}") from None
        for reader in self._readers:
            reader.join(5)  # the last lines are on their way through the pipes
        return code


def read_all(sock: socket.socket) -> bytes:
    """All bytes until the peer closes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_answer(sock: socket.socket) -> bytes:
    """One answer whose length is declared; what came if the peer closes first."""
    answer = b""
    while part := sock.recv(65536):
        answer += part
        head, blank, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if blank and length and len(body) >= int(length[1]):
            break
    return answer


@pytest.fixture(scope="session", name="read_answer")
def give_read_answer() -> Callable[[socket.socket], bytes]:
    return read_answer


@pytest.fixture(scope="module")
def start_server() -> Iterator[Callable[..., FakeServer]]:
    """Starts servers; those that still run at the end of the module are killed."""
    servers: list[FakeServer] = []

    def start(*, wait: bool = True, **settings: Any) -> FakeServer:
        servers.append(FakeServer(settings))
        if wait:
            servers[-1].wait_for_line("ready: http")
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
        for pipe in (server.process.stdout, server.process.stderr):
            pipe.close()


@pytest.fixture
def error_of() -> Callable[[bytes | httpx.Response], dict[str, Any]]:
    """The error object of an answer, checked for OpenAI's shape and for details that must not leak."""

    def error(answer: bytes | httpx.Response) -> dict[str, Any]:
        body = answer.content if isinstance(answer, httpx.Response) else answer.partition(b"\r\n\r\n")[2]
        found = json.loads(body)
        assert set(found) == {"error"}, found
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert not re.search(rb'/home/|0x[0-9a-f]{6,}|Traceback|site-packages|File "', body)
        return found["error"]

    return error
