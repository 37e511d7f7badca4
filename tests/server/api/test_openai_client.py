"""The official openai client against the application on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jaxserve.errors import EngineDeadError, QueueFullError
from jaxserve.types import Delta

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def connect(listen: Any) -> Iterator[Any]:
    clients: list[openai.OpenAI] = []

    def make(server: Any) -> openai.OpenAI:
        http = httpx.Client(trust_env=False, timeout=10.0)
        clients.append(openai.OpenAI(base_url=listen(server.app) + "/v1", api_key="x", http_client=http, max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_models_completions_and_chat(server: Any, connect: Any):
    client = connect(server)
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    completion = client.completions.create(model="tiny", prompt="hi", logprobs=1, echo=True, max_tokens=2)
    assert completion.choices[0].text == "hihello wor"
    assert completion.choices[0].logprobs.tokens == ["h", "i", "hello", " wor"]
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 2
    assert completion.usage.prompt_tokens_details.cached_tokens == 3
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert (chat.choices[0].message.role, chat.choices[0].message.content) == ("assistant", "hello world")
    assert chat.choices[0].logprobs.content[0].token == "hello"
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    assert chat.system_fingerprint == "jaxserve-test"


def test_streams(server: Any, connect: Any):
    client = connect(server)
    stream = client.completions.create(model="tiny", prompt="hi", stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello world"
    assert (last.choices, last.usage.total_tokens) == ([], 6)
    *chunks, last = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, logprobs=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert [entry.token for chunk in chunks[1:] for entry in chunk.choices[0].logprobs.content][:2] == ["hello", " wor"]
    assert last.usage.completion_tokens == 4


def test_three_choices_whole_and_streamed(server: Any, connect: Any):
    client = connect(server)
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=1)
    assert [choice.message.content for choice in whole.choices] == ["hello world", " world", "ld"]
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, seed=1, stream=True, stream_options={"include_usage": True}
    )
    pieces, roles, reasons = {0: "", 1: "", 2: ""}, [], {}
    for chunk in stream:
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        usage = chunk.usage
    assert [pieces[choice.index] for choice in whole.choices] == [choice.message.content for choice in whole.choices]
    assert roles == [0, 1, 2]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, n=3) as helper:
        final = helper.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["hello world", " world", "ld"]


def test_best_of_and_beams(server: Any, connect: Any):
    client = connect(server)
    best = client.completions.create(model="tiny", prompt="hi", n=1, best_of=3)
    assert [choice.text for choice in best.choices] == ["ld"]
    assert best.usage.completion_tokens == 9
    beams = client.completions.create(
        model="tiny", prompt="hi", n=2, temperature=0, extra_body={"use_beam_search": True, "cache_salt": "s"}
    )
    assert [choice.text for choice in beams.choices] == ["hello world", " world"]
    assert server.engine.salts == [None, "s"]
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="hi", n=2, best_of=3, stream=True)
    assert bad.value.param == "best_of"


def test_the_clients_own_helpers(server: Any, connect: Any):
    client = connect(server)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "hello world"
    extra = {"top_k": 3, "min_p": 0.1, "return_token_ids": True}
    answer = client.completions.with_raw_response.create(model="tiny", prompt="hi", extra_body=extra)
    assert server.engine.calls[-1][1].top_k == 3
    assert "token_ids" in answer.http_response.json()["choices"][0]


def test_errors_become_the_clients_exceptions(server: Any, connect: Any):
    client = connect(server)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (bad.value.code, bad.value.param, bad.value.type) == (
        "decimal_above_max_value", "temperature", "invalid_request_error"
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="hi", stream=True)
    assert missing.value.code == "model_not_found"


def test_engine_failures_become_the_clients_exceptions(make_server: Any, connect: Any, tokenizer: Any):
    with pytest.raises(openai.InternalServerError) as full:
        connect(make_server(script=[QueueFullError("full", retry_after_s=3)])).completions.create(
            model="tiny", prompt="a"
        )
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "3"
    script = [Delta(tuple(tokenizer.encode("h", False))), EngineDeadError("gone")]
    stream = connect(make_server(script=script)).chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="had an error"):
        list(stream)
