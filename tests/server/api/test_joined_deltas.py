"""Deltas of several tokens: how the engine cuts its tokens into deltas is nobody's business but its own."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from jaxserve.types import Delta, SamplingParams, TokenLogprobs

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi", "logprobs": 2, "max_tokens": 11},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 11},
}


def join(deltas: list[Delta]) -> Delta:
    """Successive deltas of one continuation as one."""
    last = deltas[-1]
    return replace(
        deltas[0],
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs or ()),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def script(tokenizer: Any, size: int, reason: Any = "length") -> list[Delta]:
    """ "abcdefgh€": eleven tokens with logprobs, `size` of them a delta."""
    ids = tokenizer.encode("abcdefgh€", False)
    entries = [TokenLogprobs(token, -0.1 * (i + 1), 1, ((token, -0.1), (5, -2.0))) for i, token in enumerate(ids)]
    single = [Delta((token,), (entry,)) for token, entry in zip(ids, entries, strict=True)]
    single[0] = replace(single[0], num_cached_tokens=1)
    single[-1] = replace(single[-1], finish_reason=reason)
    return [join(single[i : i + size]) for i in range(0, len(single), size)] if size > 1 else single


def neutral(answer: Any) -> str:
    """An answer without what differs each time."""
    return re.sub(r'"(id|created)": ("[^"]*"|\d+)', "", json.dumps(answer))


EXTRAS = [
    *({}, {"stop": ["cd"]}, {"stop": ["cd"], "include_stop_str_in_output": True}, {"stop": ["h€"]}, {"stop": ["zz"]}),
    *({"return_token_ids": True}, {"stream_interval": 3}, {"stop": ["b"], "min_tokens": 3}, {"stop": ["de", "bc"]}),
]


@pytest.mark.parametrize("size", [2, 3, 4, 11])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_any_cut_gives_the_same_answer_and_the_same_events(
    make_server: Any, tokenizer: Any, path: str, extra: dict[str, Any], size: int
) -> None:
    body = BODIES[path] | extra
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    found = []
    for each in (1, size):
        server = make_server(script=script(tokenizer, each))
        whole = server.post(path, {"model": "tiny", **body}).json()
        found.append((neutral(whole), neutral(server.events(path, body | options))))
    assert found[0] == found[1]


@pytest.mark.parametrize("size", [4, 11])
def test_what_follows_a_stop_string_is_dropped_and_not_counted(make_server: Any, tokenizer: Any, size: int) -> None:
    """Of a delta that ends by itself, too: then there is nothing left to abort."""
    server = make_server(script=script(tokenizer, size))
    answer = server.complete(prompt="hi", stop="cd", logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 4
    assert len(server.engine.yielded) == 1
    assert [reason for _, reason, _ in server.engine.told] == (["stop"] if size == 4 else [])


def test_choices_side_by_side(make_server: Any, tokenizer: Any) -> None:
    parts = script(tokenizer, 4)
    mixed = [replace(part, index=index) for part in parts for index in (1, 0)]
    choices = make_server(script=mixed).complete(prompt="hi", n=2, stop="fg")["choices"]
    assert [choice["text"] for choice in choices] == ["abcde", "abcde"]


@pytest.mark.parametrize(("size", "pieces"), [(1, 11), (4, 3)])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_events_of_a_delta_leave_in_one_piece(
    make_server: Any, tokenizer: Any, path: str, size: int, pieces: int
) -> None:
    """Several writes a delta cost more than making its chunks. One event a token all the same."""
    server = make_server(script=script(tokenizer, size))
    body = json.dumps({"model": "tiny", "stream": True, **BODIES[path]}).encode()
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append(b"")
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    headers = [(b"host", b"test"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "client": ("test", 1), "server": ("test", 1)}
    asyncio.run(asyncio.wait_for(server.app(scope, receive, send), 10))
    events = [piece for piece in sent if piece and piece != b"data: [DONE]\n\n"]
    assert len(events) == pieces
    assert sum(piece.count(b"data: ") for piece in events) == 11 + (path == CHAT)


def test_the_params_of_the_script_are_the_api_s(make_server: Any, tokenizer: Any) -> None:
    """The scripts above stand for what an engine gives to these very requests."""
    server = make_server(script=script(tokenizer, 3))
    server.complete(**BODIES[COMPLETIONS])
    (_, params, _) = server.engine.calls[0]
    assert isinstance(params, SamplingParams)
    assert (params.max_tokens, params.logprobs) == (11, 2)
