"""Connections that stall: row 17 of the bad-input table, readers that do not read, and broken framing."""

from __future__ import annotations

import re
import socket
import time

import psutil
import pytest

SECONDS = {"header_s": 0.4, "stalled_write_s": 0.5, "linger_s": 0.3, "linger_bytes": 300_000}
HEAD = b"POST /v1/count HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(connections=SECONDS, body={"max_bytes": 1000})


def seconds_until_closed(sock: socket.socket) -> float:
    """Seconds until the peer has closed, reading and dropping what it sends."""
    began = time.monotonic()
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def send_until_reset(sock: socket.socket, data: bytes, every_s: float) -> int:
    """Bytes sent until the peer gave up; more than any bound if it does not within 5 s."""
    began = time.monotonic()
    sent = 0
    while time.monotonic() - began < 5:
        try:
            sent += sock.send(data)
        except ConnectionError:
            return sent
        time.sleep(every_s)
    return 10**12


def test_17_a_silent_connection_is_closed(server):
    with server.connect() as sock:
        assert 0.3 < seconds_until_closed(sock) < 2


def test_17_half_a_header_is_closed(server):
    with server.connect() as sock:
        sock.sendall(HEAD + b"X-A: ")
        assert 0.3 < seconds_until_closed(sock) < 2


def test_17_slow_bytes_do_not_move_the_deadline(server):
    with server.connect() as sock:
        sock.settimeout(0.05)
        began = time.monotonic()
        closed = False
        while not closed and time.monotonic() - began < 3:
            try:
                sock.sendall(b"X")
                closed = sock.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True
        assert 0.3 < time.monotonic() - began < 2


def test_17_half_a_header_after_an_answer_is_closed(server, read_answer):
    """Any byte stops uvicorn's keep-alive timer, so the second request needs a deadline of its own."""
    with server.connect() as sock:
        sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(HEAD)
        assert 0.3 < seconds_until_closed(sock) < 2


def test_a_request_longer_than_the_header_deadline_is_not_disturbed(server):
    answer = server.ask("POST", "/v1/count", json={"n": 80})  # 0.8 s at least
    assert len(answer.json()) == 80


def test_a_reader_that_does_not_read_is_dropped(server):
    process = psutil.Process(server.process.pid)
    with server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        port = sock.getsockname()[1]
        sock.sendall(b"GET /v1/flood HTTP/1.1\r\nHost: localhost\r\n\r\n")

        def held() -> bool:
            return any(c.raddr and c.raddr.port == port for c in process.net_connections())

        time.sleep(0.3)
        assert held()
        deadline = time.monotonic() + 5
        while held() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not held()
    assert process.memory_info().rss < 300 * 2**20  # the flood has 1,000 MiB


def test_an_unread_body_is_dropped_for_a_while_only(server):
    with server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        began = time.monotonic()
        assert send_until_reset(sock, b"x", every_s=0.01) > 0
        assert 0.2 < time.monotonic() - began < 2


def test_an_unread_body_is_dropped_up_to_its_bound_only(server):
    with server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert send_until_reset(sock, bytes(10_000), every_s=0) < 60_000_000


def test_a_client_that_reads_and_closes_after_a_refusal_frees_the_connection_at_once(server):
    with server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 2000\r\n\r\n")
        sock.sendall(bytes(2000))
        began = time.monotonic()
        assert b" 413 " in sock.recv(65536)
        while sock.recv(65536):
            pass
        assert time.monotonic() - began < 0.25  # not the 0.3 s for which an unread body may still come


@pytest.mark.parametrize("path", [b"/nope", b"/v1/state?x", b"/ping"])
def test_an_answer_before_the_body_closes_the_connection(start_server, path):
    """Nobody waits for the rest of a body that is not wanted, and it is not taken for the next request."""
    server = start_server(keys=["k"], connections=SECONDS)
    with server.connect() as sock:
        sock.sendall(b"POST %s HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 100\r\n\r\nGET /ping" % path)
        began = time.monotonic()
        answer = b""
        while part := sock.recv(65536):
            answer += part
        assert time.monotonic() - began < 1
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("wait", [0.0, 0.15])
def test_broken_chunks_end_the_request_and_nothing_else(server, wait):
    with server.connect() as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}")
        time.sleep(wait)
        sock.sendall(b"zz\r\n\r\n")
        assert seconds_until_closed(sock) < 2
    assert server.ask("GET", "/ping").status_code == 200
    assert "Traceback" not in server.log


def test_garbage_after_an_answer_has_begun_closes_quietly(server):
    with server.connect() as sock:
        sock.sendall(b"GET /v1/flood HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        sock.recv(100)
        sock.sendall(b"\x00garbage\r\n\r\n")
        assert seconds_until_closed(sock) < 10
    assert server.ask("GET", "/ping").status_code == 200
    assert "Traceback" not in server.log


def test_pipelined_requests_are_answered_in_order(server, read_answer):
    ask = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(ask % b"/v1/state" + ask % b"/nope" + ask % b"/version")
        answers = b""
        while answers.count(b"HTTP/1.1") < 3 or not answers.endswith(b"}"):
            answers += sock.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"404", b"200"]
