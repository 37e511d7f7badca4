"""Random bodies: never a 500, always an error of the table, never a detail of the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve_server.schemas import REFUSED, ChatRequest, CompletionRequest, Message, TokenizeRequest

RELAXED = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**63, -(10**30), 10**400]),
)
TEXT = st.text(max_size=12) | st.sampled_from(["<|im_end|>", "tiny", "\x00", "wor", "user", "{{ 7 * 7 }}"])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
ARGUMENTS = st.one_of(
    JSON.map(json.dumps), TEXT, st.integers(0, 2000).map(lambda n: '{"a":' * n + "1" + "}" * n), st.just('{"a": NaN}')
)
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS | JSON})}) | JSON
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON, "content": TEXT | JSON},
    optional={name: JSON for name in Message.__struct_fields__ if name not in ("role", "content", "tool_calls")}
    | {"tool_calls": st.lists(CALL, max_size=2)},
)


def fields_of(kind: Any) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted({*kind.__struct_fields__, *REFUSED})) | TEXT


def body_of(kind: Any, base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A body that is good but for some fields, so that it gets past the first check."""
    changes = st.dictionaries(fields_of(kind), JSON, max_size=4)
    whole = changes.map(lambda changed: {"model": "tiny", **base, **changed})
    if "messages" not in base:
        return whole
    return st.tuples(whole, st.lists(MESSAGE, max_size=3)).map(lambda pair: {**pair[0], "messages": pair[1]})


def check(server: Any, error_of: Any, path: str, body: bytes) -> None:
    answer = server.post(path, body)
    if answer.status_code != 200:
        error_of(answer)
        assert answer.status_code in (400, 404), answer.text


@pytest.mark.parametrize(
    ("path", "kind", "base"),
    [
        ("/v1/completions", CompletionRequest, {"prompt": "hi"}),
        ("/v1/chat/completions", ChatRequest, {"messages": []}),
        ("/tokenize", TokenizeRequest, {"messages": []}),
    ],
)
def test_fields_of_any_type_and_value(server: Any, error_of: Any, path: str, kind: Any, base: dict[str, Any]):
    @RELAXED
    @given(body_of(kind, base))
    def run(body: dict[str, Any]) -> None:
        check(server, error_of, path, json.dumps(body).encode())

    run()


@pytest.mark.parametrize("name", sorted({*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__}))
def test_each_field_alone(server: Any, error_of: Any, name: str):
    """Every field with every kind of value: the one that nobody thought of is the one that fails."""
    values = [
        None,
        True,
        0,
        -1,
        2**31,
        2**63,
        10**400,
        1.5,
        -0.0,
        1e308,
        "",
        "x",
        "\x00",
        [],
        [1],
        ["x"],
        [[]],
        {},
        {"x": 1},
        [None],
    ]
    for path, base in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        for value in values:
            check(server, error_of, path, json.dumps({"model": "tiny", **base, name: value}).encode())


@RELAXED
@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_bodies_of_any_bytes(server: Any, error_of: Any, body: bytes):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        check(server, error_of, path, body)


@RELAXED
@given(data=st.data())
def test_good_bodies_with_bytes_changed(server: Any, error_of: Any, data: st.DataObject):
    body = bytearray(
        json.dumps(
            {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stop": ["a"], "seed": 1}
        ).encode()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
        body = body or bytearray(b"{")
    check(server, error_of, "/v1/chat/completions", bytes(body))
