"""The table of errors, its page, and what becomes of exceptions."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest

from jaxserve import errors
from jaxserve.errors import ContextLengthError, ParameterError, QueueFullError, RequestError
from jaxserve_server.errors import ApiError, ErrorKind, error_event, error_response, from_exception, kind_of_code, quote
from jaxserve_server.errors_doc import markdown


def test_the_page_is_made_from_the_table(repo: Path):
    page = (repo / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m jaxserve_server.errors_doc > docs/errors.md"


def test_the_page_holds_every_row():
    lines = [line for line in markdown().splitlines() if line.startswith(("| 4", "| 5"))]
    assert len(lines) == len(ErrorKind)
    assert all(line.count("|") - line.count("\\|") == 6 for line in lines)


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_row_makes_a_whole_answer(kind: ErrorKind):
    names = {name for _, name, _, _ in string.Formatter().parse(kind.value.template) if name}
    fields = {name: f"<{name}>" for name in names - {"param"}}
    answer = error_response(ApiError(kind, "some_param", **fields))
    assert answer.status_code == kind.value.status
    assert answer.headers["content-type"] == "application/json"
    assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503))
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
    assert ("connection" in answer.headers) == kind.value.close
    assert b"{" not in answer.body[1:-1].replace(b'"error":{', b"", 1)
    assert all(f"<{name}>".encode() in answer.body for name in fields)


def test_types_follow_the_status():
    expected = {429: "requests", 500: "server_error", 503: "server_error"}
    for kind in ErrorKind:
        assert kind.value.type == expected.get(kind.value.status, "invalid_request_error")


def exception_classes() -> list[type[Exception]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.JaxserveError)]


@pytest.mark.parametrize("kind", exception_classes())
def test_every_exception_of_ours_has_an_answer(kind: type[Exception]):
    exc = (
        ContextLengthError(max_model_len=8, num_prompt_tokens=9, max_tokens=None)
        if kind is ContextLengthError
        else kind("a secret 0x7f3a99 in /home/me")
    )
    err = from_exception(exc)
    if isinstance(exc, RequestError):
        assert err.status == 400
    elif isinstance(exc, errors.UnavailableError):
        assert err.status == 503
        assert error_response(err).headers["retry-after"] == "1"
    else:
        assert err.status == 500
    if not isinstance(exc, RequestError):  # whose messages are written for clients
        assert "secret" not in err.message


@pytest.mark.parametrize(
    "exc", [ValueError("at 0x7f3a99"), KeyError("/home/me"), OSError(2, "no", "/etc/x"), MemoryError()]
)
def test_no_word_of_a_foreign_exception_reaches_a_client(exc: BaseException):
    assert from_exception(exc).body() == ApiError(ErrorKind.INTERNAL_ERROR).body()


def test_a_parameter_error_keeps_its_code_and_param():
    err = from_exception(ParameterError("too small", param="min_p", code="decimal_below_min_value"))
    assert err.body()["error"] == {
        "message": "too small", "type": "invalid_request_error", "param": "min_p", "code": "decimal_below_min_value"
    }  # fmt: skip
    assert kind_of_code("a code that nobody knows") is ErrorKind.INVALID_VALUE


def test_context_errors_speak_of_what_the_endpoint_takes():
    exc = ContextLengthError(max_model_len=8, num_prompt_tokens=6, max_tokens=4)
    assert (
        "requested 10 tokens (6 in the messages, 4 in the completion)" in from_exception(exc, what="messages").message
    )
    assert from_exception(exc).param == "prompt"


def test_retry_after_is_at_least_a_second():
    assert error_response(from_exception(QueueFullError("full", retry_after_s=0))).headers["retry-after"] == "1"
    assert error_response(from_exception(QueueFullError("full", retry_after_s=9))).headers["retry-after"] == "9"


def test_a_clients_value_is_cut_and_never_a_template():
    assert len(quote("x" * 10_000)) < 100
    fields: dict[str, Any] = {"name": "{param} {0.__class__}"}
    assert "{0.__class__}" in ApiError(ErrorKind.UNKNOWN_PARAMETER, **fields).message


def test_the_event_of_an_error_is_its_body():
    err = ApiError(ErrorKind.INTERNAL_ERROR)
    assert error_event(err) == b"data: " + error_response(err).body + b"\n\n"
