"""From the first socket to the exit code: start-up, health, drain, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from jaxserve.types import EngineStats
from jaxserve_server.app import AppSettings, build_app
from jaxserve_server.auth import ApiKeys
from jaxserve_server.routes import api_routes
from jaxserve_server.startup_log import ThroughputLog
from jaxserve_server.status import Phase, ServerStatus

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
PUBLIC = {("/ping", m) for m in ("GET", "HEAD", "POST")} | {("/health", m) for m in ("GET", "HEAD")}


@pytest.fixture(scope="module")
def plain_server(start_server):
    return start_server()


class Stream(threading.Thread):
    """Reads one stream to its end: the events, and how the connection ended."""

    def __init__(self, server, n: int) -> None:
        super().__init__(daemon=True)
        self.server, self.n = server, n
        self.begun = threading.Event()
        self.text = b""
        self.error: Exception | None = None
        self.start()
        assert self.begun.wait(10)

    def run(self) -> None:
        with httpx.Client(timeout=10.0, trust_env=False) as client:
            try:
                with client.stream("POST", self.server.url + "/v1/count", json={"n": self.n, "stream": True}) as answer:
                    for part in answer.iter_raw():
                        self.text += part
                        self.begun.set()
            except httpx.HTTPError as exc:
                self.error = exc

    @property
    def events(self) -> list[str]:
        self.join(10)
        assert not self.is_alive()
        return [event.removeprefix("data: ") for event in self.text.decode().split("\n\n")[:-1]]


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def wait_for_drain(server) -> None:
    server.wait_for_line("draining: ")


# --- start -----------------------------------------------------------------------------------------------


def test_probes_are_answered_while_the_model_loads(start_server, error_of):
    server = start_server(wait=False, load_s=1.0)
    assert server.ask("GET", "/ping").status_code == 200
    health = server.ask("GET", "/health")
    assert (health.status_code, health.json()) == (503, {"status": "starting"})
    assert int(health.headers["retry-after"]) >= 1
    for path in ("/metrics", "/version", "/v1/state", "/nope"):
        answer = server.ask("GET", path)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "server_starting"
        assert int(answer.headers["retry-after"]) >= 1
    server.wait_for_line("ready: http")
    assert server.ask("GET", "/health").json()["status"] == "ok"
    assert server.ask("GET", "/version").json() == {"version": "0.1.0"}
    assert "vllm:num_requests_running" in server.ask("GET", "/metrics").text


def test_a_bad_checkpoint_is_one_line_and_exit_code_1(start_server):
    server = start_server(wait=False, failure="checkpoint")
    assert server.exit_code() == 1
    assert "error: The folder is empty. Give another." in server.lines[-1]
    assert "Traceback" not in server.log


def test_an_unexpected_failure_to_load_is_exit_code_1(start_server):
    server = start_server(wait=False, failure="bug")
    assert server.exit_code() == 1
    assert "ZeroDivisionError" in server.log


def test_a_taken_port_is_one_line_and_exit_code_1(repo):
    paths = os.pathsep.join(str(repo / part) for part in (".", "server", "checkpoints"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "jaxserve.serve", "--port", str(port)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
            check=False,
        )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: Cannot listen on 127.0.0.1:{port}: ")
    assert last.endswith("Choose another --host or --port.")


def test_sigterm_while_loading_ends_at_once(start_server):
    server = start_server(wait=False, load_s=30)
    server.stop()
    assert server.exit_code(timeout=3) == 0


def test_the_api_port_is_the_only_listening_socket_of_the_process_tree(plain_server):
    root = psutil.Process(plain_server.process.pid)
    tree = [root, *root.children(recursive=True)]
    listening = [c.laddr for p in tree for c in p.net_connections("all") if c.status == psutil.CONN_LISTEN]
    assert [tuple(address) for address in listening] == [("127.0.0.1", plain_server.port)]


# --- health and access -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "status", "reason"),
    [
        ({}, 200, "ok"),
        ({"num_running": 2, "num_waiting": 3, "last_commit_age_s": 59.9}, 200, "ok"),
        ({"num_running": 0, "num_waiting": 1, "last_commit_age_s": 60.0}, 503, "stalled"),
        ({"num_waiting": 4}, 503, "queue_full"),
        ({"is_ready": False}, 503, "engine_not_ready"),
    ],
)
def test_health_is_computed_from_progress(plain_server, reading, status, reason):
    plain_server.ask("POST", "/v1/state", json=reading)
    answer = plain_server.ask("GET", "/health")
    assert (answer.status_code, answer.json()["status"]) == (status, reason)
    assert plain_server.ask("HEAD", "/health").status_code == status
    assert plain_server.ask("GET", "/ping").status_code == 200


def test_every_route_and_method_asks_for_a_key_unless_it_is_public():
    status = ServerStatus(phase=Phase.READY)
    application = build_app(api_routes(), status, AppSettings(keys=ApiKeys(["secret"])))
    paths = {route.path.replace("{model:path}", "demo") for route in application.routes} | {"/", "/nope"}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= paths

    async def answers() -> dict[tuple[str, str], int]:
        transport = httpx.ASGITransport(application.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return {(p, m): (await client.request(m, p)).status_code for p in paths for m in METHODS}

    found = asyncio.run(answers())
    for (path, method), code in found.items():
        if path in ("/ping", "/health"):
            assert (code == 405) == ((path, method) not in PUBLIC), (path, method, code)
        else:
            assert code == 401, (path, method, code)


# --- drain -----------------------------------------------------------------------------------------------


def test_a_drain_lets_streams_finish_and_refuses_the_rest(start_server, error_of):
    server = start_server(token_s=0.05, server={"shutdown_timeout_s": 10})
    stream = Stream(server, 30)
    kept = httpx.Client(base_url=server.url, trust_env=False)
    assert kept.get("/ping").status_code == 200  # a connection that is open when the drain begins
    server.stop()
    wait_for_drain(server)
    for ask in (kept.request, server.ask):
        answer = ask("POST", "/v1/count", json={"n": 1})
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "server_draining"
        assert error_of(answer)["type"] == "server_error"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
    kept.close()
    health = server.ask("GET", "/health")
    assert (health.status_code, health.json()["status"], health.headers["connection"]) == (503, "draining", "close")
    assert server.ask("GET", "/ping").status_code == 200
    assert server.ask("GET", "/metrics").status_code == 200
    assert stream.events == [*map(str, range(30)), "[DONE]"]
    assert server.exit_code() == 0
    assert server.lines[-1] == "engine shut down"


@pytest.mark.parametrize("timeout_s", [0.5, 0])
def test_streams_that_outlast_the_drain_get_an_error_event(start_server, timeout_s):
    server = start_server(token_s=0.02, server={"shutdown_timeout_s": timeout_s})
    streams = [Stream(server, 1000) for _ in range(4)]
    began = time.monotonic()
    server.stop()
    for stream in streams:
        *numbers, last = stream.events
        assert stream.error is None
        assert numbers == [str(i % 64) for i in range(len(numbers))]
        assert json.loads(last)["error"]["code"] == "server_draining"
    assert server.exit_code() == 0
    assert timeout_s <= time.monotonic() - began < timeout_s + 2.5
    assert "Traceback" not in server.log


def test_a_whole_answer_that_outlasts_the_drain_is_a_503(start_server, error_of):
    server = start_server(token_s=0.02, server={"shutdown_timeout_s": 0.3})
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/count", json={"n": 1000})))
    waiting.start()
    assert eventually(lambda: server.ask("GET", "/v1/state").json()["open"] == 1)
    server.stop()
    waiting.join(5)
    assert answers[0].status_code == 503
    assert error_of(answers[0])["code"] == "server_draining"
    assert server.exit_code() == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_apis_answers_that_outlast_the_drain_end_with_an_error(start_server, error_of, path):
    server = start_server(token_s=0.02, server={"shutdown_timeout_s": 0.3})
    body = {"model": "fake", "max_tokens": 5000, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    del body["messages" if path == "/v1/completions" else "prompt"]
    answers: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        answers[stream] = server.ask("POST", path, json=body | {"stream": stream})

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in asking:
        thread.start()
    assert eventually(lambda: server.ask("GET", "/v1/state").json()["open"] == 2)
    server.stop()
    for thread in asking:
        thread.join(5)
    assert answers[False].status_code == 503
    assert error_of(answers[False])["code"] == "server_draining"
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in answers[True].text.split("\n\n")[:-1]]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["error"]["code"] == "server_draining"
    assert server.exit_code() == 0
    assert "Traceback" not in server.log


def test_an_idle_server_ends_at_once(start_server):
    server = start_server(server={"shutdown_timeout_s": 30})
    with server.connect():  # nobody waits for a connection without a request
        began = time.monotonic()
        server.stop(signal.SIGINT)
        assert server.exit_code() == 0
        assert time.monotonic() - began < 2.5


def test_the_second_signal_ends_the_server_within_two_seconds(start_server):
    server = start_server(token_s=0.02, server={"shutdown_timeout_s": 60})
    stream = Stream(server, 100_000)
    server.stop()
    wait_for_drain(server)
    time.sleep(0.2)
    began = time.monotonic()
    server.stop()
    assert server.exit_code() == 0
    assert time.monotonic() - began < 2
    assert json.loads(stream.events[-1])["error"]["code"] == "server_draining"


def test_the_second_signal_ends_even_a_stuck_engine(start_server):
    server = start_server(shutdown_s=60)
    server.stop()
    wait_for_drain(server)
    time.sleep(0.3)
    began = time.monotonic()
    server.stop()
    assert server.exit_code() == 1
    assert time.monotonic() - began < 2


def test_a_reader_that_does_not_read_cannot_hold_up_the_drain(start_server):
    server = start_server(server={"shutdown_timeout_s": 0.3})
    with server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /v1/flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        server.stop()
        assert server.exit_code() == 0


# --- the log ---------------------------------------------------------------------------------------------


def test_the_throughput_line_is_vllms_and_silent_when_idle():
    from jaxserve.metrics import EngineMetrics

    metrics = EngineMetrics(max_model_len=64)
    running = [0]

    def stats() -> EngineStats:
        return EngineStats(running[0], 1 if running[0] else 0, 10, 5 if running[0] else 10, 0, 0, 0, 0.0)

    log = ThroughputLog(metrics, stats, now=100.0)
    assert log.line(110.0) is None
    metrics.prompt_tokens, metrics.generation_tokens, running[0] = 500, 1234, 3
    assert log.line(120.0) == (
        "Engine 000: Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 123.4 tokens/s, "
        "Running: 3 reqs, Waiting: 1 reqs, KV cache usage: 50.0%, Prefix cache hit rate: 0.0%"
    )
    running[0] = 0
    assert "throughput: 0.0 tokens/s" in (log.line(130.0) or "")
    assert log.line(140.0) is None


def test_prompts_and_keys_reach_neither_log_nor_metrics(start_server):
    server = start_server(keys=["sk-canary-1"])
    headers = {"authorization": "Bearer sk-canary-1"}
    server.ask("POST", "/v1/count", headers=headers, json={"n": 1, "prompt": "canary-2"})
    server.ask("POST", "/v1/count?canary-3", headers=headers, content=b'{"canary-4')
    pages = server.ask("GET", "/metrics", headers=headers).text + server.ask("GET", "/health").text
    assert "canary" not in server.log + pages
