"""Rows of the bad-input table that the server's shell answers, over real sockets. The number is the row."""

from __future__ import annotations

import json
import re
import time

import psutil
import pytest

KEY = "sk-Ünïcode-and-long-enough"
AUTH = b"Authorization: Bearer " + KEY.encode()
LIMIT = 1000


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(keys=[KEY, "second"], body={"max_bytes": LIMIT, "gap_s": 0.3, "total_s": 0.8})


@pytest.fixture(scope="module")
def open_server(start_server):
    """Without keys."""
    return start_server()


def request(method: str, path: str, *headers: bytes, body: bytes = b"", host: bytes = b"localhost") -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: " + host, *headers]
    return b"\r\n".join([*lines, b"", body])


def sized(body: bytes) -> tuple[bytes, bytes]:
    return b"Content-Type: application/json", b"Content-Length: %d" % len(body)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def header(answer: bytes, name: str) -> str | None:
    head = answer.partition(b"\r\n\r\n")[0].decode()
    found = re.search(rf"^{name}: (.*?)\r?$", head, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else None


def once(server, *args, **kwargs) -> bytes:
    """One request on a connection of its own."""
    method, path, *headers = args
    return server.raw(request(method, path, *headers, b"Connection: close", **kwargs))


def test_13_a_compressed_body_is_refused_unread(server, error_of):
    body = b"\x1f\x8b" + bytes(50)
    for encoding in (b"gzip", b"br", b"GZIP", b"identity, gzip"):
        answer = once(server, "POST", "/v1/count", AUTH, *sized(body), b"Content-Encoding: " + encoding, body=body)
        assert status(answer) == 415
        assert error_of(answer)["code"] == "unsupported_content_encoding"
    body = b'{"n": 1}'
    assert (
        status(once(server, "POST", "/v1/count", AUTH, *sized(body), b"Content-Encoding: Identity", body=body)) == 200
    )


def test_14_a_declared_body_over_the_limit_is_refused_before_it_is_sent(server, error_of):
    for length in (LIMIT + 1, 2**30, 10**19):
        began = time.monotonic()
        answer = server.raw(request("POST", "/v1/count", AUTH, b"Content-Length: %d" % length))
        assert time.monotonic() - began < 4  # the 2 s in which an unread body may still come, and some
        assert status(answer) == 413
        assert error_of(answer)["code"] == "request_too_large"
        assert str(LIMIT) in error_of(answer)["message"]
        assert header(answer, "connection") == "close"


def test_14_a_body_at_the_limit_is_read(server):
    body = b'{"n": 1}'.ljust(LIMIT)
    assert status(once(server, "POST", "/v1/count", AUTH, *sized(body), body=body)) == 200


def test_14_a_length_of_many_digits_is_not_a_crash(server):
    assert status(server.raw(request("POST", "/v1/count", AUTH, b"Content-Length: " + b"9" * 5000))) in (400, 413)


def test_14_no_100_continue_for_a_body_that_is_not_wanted(server):
    answer = server.raw(request("POST", "/v1/count", AUTH, b"Content-Length: 5000", b"Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 413")


def test_15_a_chunked_body_is_cut_at_the_limit(server, error_of, read_answer):
    chunk = b"64\r\n" + b" " * 100 + b"\r\n"
    with server.connect() as sock:
        sock.sendall(request("POST", "/v1/count", AUTH, b"Transfer-Encoding: chunked"))
        sock.sendall(chunk * 11)
        answer = read_answer(sock)
        assert status(answer) == 413
        assert error_of(answer)["code"] == "request_too_large"
        assert header(answer, "connection") == "close"


def test_15_a_client_that_goes_on_sending_still_reads_the_answer(server):
    """Closing with bytes unread makes the kernel send RST, and the answer is lost (RFC 9112 section 9.6)."""
    with server.connect() as sock:
        sock.sendall(request("POST", "/v1/count", AUTH, b"Content-Length: 2000000"))
        for _ in range(20):
            sock.sendall(bytes(100_000))
            time.sleep(0.005)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
    assert status(b"".join(parts)) == 413


def test_16_a_slow_body_is_given_up(server, error_of, read_answer):
    with server.connect() as sock:
        sock.sendall(request("POST", "/v1/count", AUTH, b"Content-Length: 100") + b"{")
        began = time.monotonic()
        answer = read_answer(sock)
        assert 0.25 < time.monotonic() - began < 2
        assert status(answer) == 408
        assert error_of(answer)["code"] == "request_timeout"
        assert header(answer, "connection") == "close"


def test_16_a_trickle_is_given_up_at_the_total(server):
    with server.connect() as sock:
        sock.sendall(request("POST", "/v1/count", AUTH, b"Content-Length: 100"))
        sock.setblocking(False)
        began = time.monotonic()
        answer = b""
        while not answer and time.monotonic() - began < 5:
            sock.send(b" ")
            time.sleep(0.1)
            try:
                answer = sock.recv(65536)
            except BlockingIOError:
                continue
        assert status(answer) == 408
        assert 0.7 < time.monotonic() - began < 2.5


def test_18_header_bombs_are_refused(server):
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    for data in (
        request("GET", "/ping", b"X: " + b"a" * 2**20),
        request("GET", "/ping", *(b"X%d: y" % i for i in range(20_000))),
        b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /ping HTTP/1.1\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: a\r\nBad Name: b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ):
        with server.connect() as sock:
            answer = b""
            try:
                sock.sendall(data)
                answer = sock.recv(65536)
            except ConnectionError:
                pass  # refused while it was being sent
            assert answer[:12] in (b"", b"HTTP/1.1 400"), data[:60]
    assert server.ask("GET", "/ping").status_code == 200
    assert process.memory_info().rss < before + 20 * 2**20


def test_18_many_small_headers_are_refused_as_json(server, error_of):
    answer = once(server, "GET", "/ping", *(b"a%d: b" % i for i in range(300)))
    assert status(answer) == 400
    error_of(answer)
    assert status(once(server, "GET", "/ping", *(b"a%d: b" % i for i in range(200)))) == 200


def test_19_two_lengths_are_refused(server, error_of):
    answer = server.raw(
        request("POST", "/v1/count", AUTH, b"Content-Length: 8", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")
    )
    assert status(answer) == 400
    assert "Content-Length" in error_of(answer)["message"]
    assert header(answer, "connection") == "close"


@pytest.mark.parametrize("path", ["/v1/foo", "/", "/v1/count/", "//health", "/v1/../ping", "*"])
def test_20_unknown_paths(server, error_of, path):
    answer = once(server, "GET", path, AUTH)
    assert status(answer) == 404
    error = error_of(answer)
    assert error["message"] == f"Invalid URL (GET {path})"
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert header(answer, "location") is None


def test_20_a_long_path_is_not_echoed_whole(server, error_of):
    assert len(error_of(once(server, "GET", "/" + "x" * 5000, AUTH))["message"]) < 200


def test_21_wrong_methods(server, error_of):
    answer = once(server, "GET", "/v1/count", AUTH)
    assert (status(answer), header(answer, "allow")) == (405, "POST")
    assert error_of(answer)["message"].startswith("Not allowed to GET on /v1/count")
    answer = once(server, "DELETE", "/v1/state", AUTH)
    assert (status(answer), header(answer, "allow")) == (405, "GET, POST")
    assert status(once(server, "BREW", "/v1/state", AUTH)) == 405


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (b"Authorization:",),
        (b"Authorization: Bearer",),
        (b"Authorization: Bearer   ",),
        (b"Authorization: Basic " + KEY.encode(),),
        (AUTH, AUTH),
        (b"X-Api-Key: " + KEY.encode(),),
        (b"Authorization: " + KEY.encode(),),
    ],
)
def test_22_no_key(server, error_of, headers):
    answer = once(server, "GET", "/v1/state", *headers)
    assert status(answer) == 401
    assert header(answer, "www-authenticate") == "Bearer"
    error = error_of(answer)
    assert error["message"].startswith("You didn't provide an API key.")
    assert error["code"] is None


@pytest.mark.parametrize(
    "token",
    [b"wrong", KEY.encode()[:-1], KEY.encode() + b"x", b"\xff\xfe", "Ключ".encode(), b"a" * 60_000, b"second,second"],
)
def test_23_a_bad_key_is_not_echoed(server, error_of, token):
    answer = once(server, "GET", "/v1/state", b"Authorization: Bearer " + token)
    assert status(answer) == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert token not in answer
    assert token not in server.log.encode()


@pytest.mark.parametrize("value", [AUTH, b"authorization: bearer second", b"Authorization: BEARER  second "])
def test_23_a_good_key_is_taken(server, value):
    assert status(once(server, "GET", "/v1/state", value)) == 200


def test_the_prefix_cache_is_reset_with_a_key_only(server):
    assert status(once(server, "POST", "/reset_prefix_cache", b"Content-Length: 0")) == 401
    assert status(once(server, "POST", "/reset_prefix_cache", b"Content-Length: 0", AUTH)) == 200


def test_keys_are_nowhere_in_the_log(server):
    assert KEY not in server.log
    assert "second" not in server.log


@pytest.mark.parametrize(
    "host",
    [
        *(b"x/v1/models?", b"x#", b"x?y", b"", b"a@b", b"a" * 300, "bücher.example".encode(), b"evil.example"),
        *(b"[::1", b"localhost:80x", b"/health", b"ping", b"localhost.evil.example"),
    ],
)
def test_no_host_opens_a_path_and_foreign_names_are_refused(server, host):
    """CVE-2026-48746: the path was taken from the Host header. And DNS rebinding: CVE-2025-62593."""
    for headers in ((), (AUTH,)):
        answer = once(server, "GET", "/v1/state", *headers, host=host)
        assert status(answer) in (400, 401, 421), answer[:200]
    assert status(once(server, "GET", "/ping", host=host)) in (400, 421)


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:1", b"[::1]:8000", b"10.1.2.3", b"a.localhost", b"localhost."]
)
def test_local_names_and_addresses_are_answered(server, host):
    assert status(once(server, "GET", "/v1/state", AUTH, host=host)) == 200


def test_http_1_0_without_a_host_is_answered(server):
    assert status(server.raw(b"GET /ping HTTP/1.0\r\n\r\n")) == 200


def test_79_an_internal_error_has_no_details_and_the_log_has_no_values(open_server, error_of):
    answer = open_server.ask("GET", "/v1/crash", headers={"x-secret": "hunter2", "x-request-id": "crash-1"})
    assert answer.status_code == 500
    assert error_of(answer) == {
        "message": "The server had an error while processing your request. Sorry about that!",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    open_server.wait_for_line("request crash-1 failed with RuntimeError")
    assert "hunter2" not in open_server.log
    assert open_server.ask("GET", "/ping").status_code == 200


def test_79_an_error_within_a_stream_is_its_last_event(open_server):
    text = open_server.ask("GET", "/v1/crash_in_stream").text
    first, last, rest = text.split("\n\n")
    assert (first, rest) == ("data: 0", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"


def test_80_a_client_that_leaves_is_logged_as_499(open_server):
    body = b'{"n": 1000}'
    with open_server.connect() as sock:
        sock.sendall(request("POST", "/v1/count", b"X-Request-Id: gone", *sized(body + b" "), body=body))
        time.sleep(0.1)  # one byte of the body is missing
    assert '"POST /v1/count HTTP/1.1" 499' in open_server.wait_for_line("gone")


@pytest.mark.parametrize("value", ["abc-123", "a" * 128, "A.b_c:d/e+f=g@h"])
def test_81_a_request_id_is_echoed(open_server, value):
    assert open_server.ask("GET", "/ping", headers={"x-request-id": value}).headers["x-request-id"] == value


@pytest.mark.parametrize("values", [["a" * 129], ["a" * 10_000], ["a b"], ["a", "b"], [""], ["ä"], ["<script>"]])
def test_81_a_strange_request_id_is_replaced(open_server, values):
    lines = [b"X-Request-Id: " + value.encode() for value in values]
    found = header(once(open_server, "GET", "/ping", *lines), "x-request-id")
    assert re.fullmatch(r"req-[0-9a-f]{32}", found)


def test_81_errors_have_a_request_id_too(server):
    for args in (("GET", "/nope", AUTH), ("GET", "/v1/state"), ("POST", "/v1/count", AUTH, b"Content-Length: 5000")):
        assert header(server.raw(request(*args, b"Connection: close")), "x-request-id")


def test_82_head_and_options(server):
    for path in ("/health", "/ping", "/metrics", "/version"):
        answer = once(server, "HEAD", path, AUTH)
        assert status(answer) == 200
        assert answer.endswith(b"\r\n\r\n")
    for method in ("HEAD", "OPTIONS"):
        answer = once(server, method, "/v1/state", AUTH, b"Origin: http://evil.example")
        assert (status(answer), header(answer, "allow")) == (405, "GET, POST")
        assert header(answer, "access-control-allow-origin") is None


def test_log_lines_hold_no_queries_and_no_control_characters(open_server):
    open_server.raw(
        request("GET", "/v1/state%0aINFO%1b[31m?key=hunter3", b"X-Request-Id: logged", b"Connection: close")
    )
    line = open_server.wait_for_line("logged")
    assert "hunter3" not in line
    assert "\\nINFO\\x1b[31m" in line


def test_a_proxys_prefix_is_stripped_before_authentication(start_server):
    server = start_server(keys=["second"], app={"root_path": "api"})
    key = b"Authorization: Bearer second"
    assert status(once(server, "GET", "/api/v1/state", key)) == 200
    assert status(once(server, "GET", "/v1/state", key)) == 200
    assert status(once(server, "GET", "/api/health")) == 200
    assert status(once(server, "GET", "/api/v1/state")) == 401
    assert status(once(server, "GET", "/apiv1/state", key)) == 404


def test_a_kept_connection_serves_many_requests(server, read_answer):
    body = b'{"n": 2}'
    with server.connect() as sock:
        for _ in range(3):
            sock.sendall(request("POST", "/v1/count", AUTH, *sized(body), body=body))
            assert read_answer(sock).endswith(b"[0,1]")
