"""What streams look like on the wire, byte by byte, and what they are when something fails in them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jaxserve.errors import (
    DrainingError,
    EngineDeadError,
    KVBudgetError,
    NumericalError,
    QueueFullError,
    QueueTimeoutError,
)
from jaxserve.types import Delta

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT_HEAD = '{"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":'
TEXT_HEAD = '{"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":'
TAIL = ',"system_fingerprint":"jaxserve-test"'

GOLDEN_CHAT = [
    CHAT_HEAD
    + '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
    + TAIL
    + "}",
    CHAT_HEAD + '[{"index":0,"delta":{"content":"hello"},"logprobs":null,"finish_reason":null}]' + TAIL + "}",
    CHAT_HEAD + '[{"index":0,"delta":{"content":" wor"},"logprobs":null,"finish_reason":null}]' + TAIL + "}",
    CHAT_HEAD + '[{"index":0,"delta":{"content":"ld"},"logprobs":null,"finish_reason":null}]' + TAIL + "}",
    CHAT_HEAD
    + '[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}]'
    + TAIL
    + "}",
    "[DONE]",
]
GOLDEN_COMPLETION = [
    TEXT_HEAD + '[{"index":0,"text":"hello","logprobs":null,"finish_reason":null,"stop_reason":null}]' + TAIL + "}",
    TEXT_HEAD + '[{"index":0,"text":" wor","logprobs":null,"finish_reason":"length","stop_reason":null}]' + TAIL + "}",
    "[DONE]",
]  # fmt: skip


def transcript(server: Any, path: str, body: dict[str, Any]) -> list[str]:
    """The events' data as sent, with ids and times made equal."""
    answer = server.post(path, {"model": "tiny", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in answer.headers
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"id":"\1-ID"', answer.text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    assert text.startswith("data: ")
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text[:-2].split("\n\n")]


def test_a_chat_stream(server: Any):
    assert transcript(server, CHAT, {"messages": MESSAGES}) == GOLDEN_CHAT


def test_a_completion_stream(server: Any):
    assert transcript(server, COMPLETIONS, {"prompt": "hi", "max_tokens": 2}) == GOLDEN_COMPLETION


@pytest.mark.parametrize(
    ("path", "body", "golden", "prompt", "completion"),
    [(CHAT, {"messages": MESSAGES}, GOLDEN_CHAT, 21, 4),
     (COMPLETIONS, {"prompt": "hi", "max_tokens": 2}, GOLDEN_COMPLETION, 2, 2)],
)  # fmt: skip
def test_usage_comes_last_and_only_where_it_was_asked(
    server: Any, path: str, body: dict[str, Any], golden: list[str], prompt: int, completion: int
):
    head = CHAT_HEAD if path == CHAT else TEXT_HEAD
    usage = (
        f',"usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{prompt + completion},'
        '"prompt_tokens_details":{"cached_tokens":3}}}'
    )
    asked = transcript(server, path, body | {"stream_options": {"include_usage": True}})
    assert asked == [*golden[:-1], head + "[]" + TAIL + usage, "[DONE]"]
    # sglang's benchmark reads choices[0] of every chunk: an empty list that nobody asked for ends it
    assert transcript(server, path, body | {"stream_options": {"include_usage": False}}) == golden
    assert transcript(server, path, body | {"stream_options": {}}) == golden


@pytest.mark.parametrize(
    ("path", "body", "counts"),
    [(CHAT, {"messages": MESSAGES}, [0, 1, 2, 3, 4, 4]), (COMPLETIONS, {"prompt": "hi", "max_tokens": 2}, [1, 2, 2])],
)
def test_continuous_usage_is_on_every_chunk(server: Any, path: str, body: dict[str, Any], counts: list[int]):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, done = server.events(path, body | {"stream_options": options})
    assert done == "[DONE]"
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == counts
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
    assert all(chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": 3} for chunk in chunks)


def test_the_role_comes_with_the_first_token_and_not_before(make_server: Any):
    """A chunk at admission would be a time to first token that is not true."""
    server = make_server(script=[QueueFullError("full")])
    answer = server.post(CHAT, {"model": "tiny", "messages": MESSAGES, "stream": True})
    assert answer.status_code == 503


def test_one_chunk_a_token_though_the_engine_gives_several_at_once(make_server: Any, tokenizer: Any):
    ids = tuple(tokenizer.encode("hello world", False))
    server = make_server(script=[Delta(token_ids=ids, finish_reason="length")])
    *chunks, _ = server.events(CHAT, {"messages": MESSAGES})
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "hello", " wor", "ld"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]


def test_a_token_without_text_makes_no_chunk_unless_ids_are_asked(make_server: Any, tokenizer: Any):
    first, second, third = tokenizer.encode("€", False)
    script = [
        Delta((first,)),
        Delta((second,)),
        Delta((third,)),
        Delta(tuple(tokenizer.encode("h", False)), None, None, "length"),
    ]
    *chunks, _ = make_server(script=script).events(COMPLETIONS, {"prompt": "hi"})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["€", "h"]
    *chunks, _ = make_server(script=script).events(COMPLETIONS, {"prompt": "hi", "return_token_ids": True})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "", "€", "h"]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [
        [first],
        [second],
        [third],
        [script[3].token_ids[0]],
    ]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == tokenizer.encode("hi")
    assert all("prompt_token_ids" not in chunk["choices"][0] for chunk in chunks[1:])


def test_held_tokens_are_counted(make_server: Any, tokenizer: Any):
    first, second, third = tokenizer.encode("€", False)
    script = [Delta((first,)), Delta((second,)), Delta((third,), None, None, "length")]
    options = {"include_usage": True, "continuous_usage_stats": True}
    only, last, _ = make_server(script=script).events(COMPLETIONS, {"prompt": "hi", "stream_options": options})
    assert only["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 3


def test_the_interval_joins_tokens_but_for_the_first_and_the_last_chunk(make_server: Any):
    server = make_server(reply="abcdefgh")
    *chunks, _ = server.events(COMPLETIONS, {"prompt": "hi", "stream_interval": 3})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "bcd", "efg", "h"]


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 2}, {"stop": "wor"},
                                   {"return_token_ids": True}, {"stream_interval": 2}])  # fmt: skip
def test_a_completion_stream_joins_to_the_whole_answer(server: Any, extra: dict[str, Any]):
    whole = server.complete(prompt="hi", **{k: v for k, v in extra.items() if k != "stream_interval"})["choices"][0]
    chunks = [event["choices"][0] for event in server.events(COMPLETIONS, {"prompt": "hi", **extra})[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"]) == (whole["finish_reason"], whole["stop_reason"])
    assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])
    if "logprobs" in extra:
        for name, values in whole["logprobs"].items():
            assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values
    if "return_token_ids" in extra:
        assert [i for chunk in chunks for i in chunk["token_ids"]] == whole["token_ids"]


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"return_token_ids": True}])
def test_a_chat_stream_joins_to_the_whole_answer(server: Any, extra: dict[str, Any]):
    answer = server.chat(**extra)
    whole = answer["choices"][0]
    events = server.events(CHAT, {"messages": MESSAGES, **extra})[:-1]
    role, *chunks = (event["choices"][0] for event in events)
    assert role["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == whole["message"]["content"]
    assert all("role" not in chunk["delta"] for chunk in chunks)
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    if "logprobs" in extra:
        assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == whole["logprobs"]["content"]
    if "return_token_ids" in extra:
        assert [i for chunk in chunks for i in chunk["token_ids"]] == whole["token_ids"]
        assert events[0]["prompt_token_ids"] == answer["prompt_token_ids"]


# --- failures ----------------------------------------------------------------------------------------------

FAILURES = [
    (QueueFullError("full", retry_after_s=7), 503, "server_overloaded", "7"),
    (QueueTimeoutError("late", retry_after_s=5), 503, "queue_timeout", "5"),
    (DrainingError("bye"), 503, "server_draining", "1"),
    (KVBudgetError("too large"), 400, "kv_budget_exceeded", None),
    (NumericalError("NaN in row 3 at 0x7f3a"), 500, "internal_error", None),
    (EngineDeadError("/home/me/step.py failed"), 500, "internal_error", None),
]  # fmt: skip


@pytest.mark.parametrize(("failure", "status", "code", "retry_after"), FAILURES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_failure_before_the_first_token_has_a_status(
    make_server: Any,
    error_of: Any,
    path: str,
    stream: bool,
    failure: Exception,
    status: int,
    code: str,
    retry_after: str | None,
):
    body = {"model": "tiny", "stream": stream} | ({"messages": MESSAGES} if path == CHAT else {"prompt": "hi"})
    answer = make_server(script=[failure]).post(path, body)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry_after
    answer = make_server(script=[Delta(finish_reason="error", error=failure)]).post(path, body)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


@pytest.mark.parametrize(
    "failure", [failure for failure, *_ in FAILURES] + [ValueError("a secret at 0x7f3a"), KeyError("x")]
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_failure_in_a_stream_is_its_last_event(make_server: Any, tokenizer: Any, path: str, failure: Exception):
    """Without [DONE], and without a finish_reason, which would look like success."""
    server = make_server(script=[Delta(tuple(tokenizer.encode("h", False))), failure])
    *chunks, last = server.events(path, {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"})
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "0x" not in last["error"]["message"]
    assert "/home" not in last["error"]["message"]
    assert chunks
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_engine_that_ends_without_a_reason_is_an_error(make_server: Any, error_of: Any, tokenizer: Any, path: str):
    body = {"model": "tiny"} | ({"messages": MESSAGES} if path == CHAT else {"prompt": "hi"})
    answer = make_server(script=[Delta(tuple(tokenizer.encode("h", False)))]).post(path, body)
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")


def test_an_abort_from_outside_is_told(make_server: Any, tokenizer: Any):
    script = [Delta(tuple(tokenizer.encode("h", False))), Delta(finish_reason="abort")]
    choice = make_server(script=script).complete(prompt="hi")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("h", "abort")


def test_one_prompt_that_fails_ends_the_others(make_server: Any, error_of: Any, tokenizer: Any):
    """Of several prompts, the refused one decides; none of the others keeps running."""
    server = make_server(reply="abcdefgh")
    play = server.engine.play
    server.engine.play = lambda ids, params: [QueueFullError("full")] if len(ids) == 3 else play(ids, params)
    answer = server.post(COMPLETIONS, {"model": "tiny", "prompt": ["hi", "abc", "hi"]})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "server_overloaded")
    assert len(server.engine.aborted) == len(server.engine.calls)


def test_a_stop_string_in_the_middle_of_a_delta_ends_it_there(make_server: Any, tokenizer: Any):
    ids = tuple(tokenizer.encode("abcdef", False))
    server = make_server(script=[Delta(ids), Delta(ids)])
    answer = server.complete(prompt="hi", stop="cd")
    assert (answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]) == ("ab", "cd")
    assert answer["usage"]["completion_tokens"] == 4
    assert len(server.engine.yielded) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_engines_request(make_server: Any, stream: bool):
    server = make_server(reply="abcdefgh")
    body = {"prompt": "hi", "stop": ["cd"], "include_stop_str_in_output": False}
    if stream:
        choices = [event["choices"][0] for event in server.events(COMPLETIONS, body)[:-1]]
        assert "".join(choice["text"] for choice in choices) == "ab"
        last = choices[-1]
    else:
        last = server.complete(**body)["choices"][0]
        assert last["text"] == "ab"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "cd")
    assert len(server.engine.yielded) == 4
    (_, _, request_id) = server.engine.calls[0]
    assert server.engine.aborted == [request_id]
    assert server.engine.told == [(request_id, "stop", 0)]  # or its metrics would count a client that left
