"""Several continuations of a prompt: n, best_of and beam search, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import EngineDeadError, NumericalError
from jaxserve.types import BeamSearchParams, Delta, TokenLogprobs
from jaxserve_server.serving import Limits

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
TEXTS = ["hello world", " world", "ld"]  # of the scripted engine's first three continuations of "hello world"


def base(path: str) -> dict[str, Any]:
    return {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}


def texts_of(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in answer["choices"]]


def whole(server: Any, path: str, **fields: Any) -> dict[str, Any]:
    answer = server.post(path, {"model": "tiny", **base(path), **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- n -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_one_request_of_the_engine_gives_n_choices(server: Any, path: str):
    answer = whole(server, path, n=3, seed=5)
    ((prompt, params, _),) = server.engine.calls
    assert (params.n, params.best_of, params.seed) == (3, None, 5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert texts_of(answer) == TEXTS
    # the prompt and its cached tokens once; 4, 3 and 2 tokens, ends included
    assert answer["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": 9, "total_tokens": len(prompt) + 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip


def test_choices_of_several_prompts_are_numbered_as_openai_does(server: Any):
    answer = server.complete(prompt=["hi", "hello", "a"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert texts_of(answer) == TEXTS[:2] * 3
    assert answer["usage"]["prompt_tokens"] == 2 + 1 + 1
    assert answer["usage"]["completion_tokens"] == 3 * (4 + 3)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * 3
    chunks = [
        event["choices"][0] for event in server.events(COMPLETIONS, {"prompt": ["hi", "hello", "a"], "n": 2})[:-1]
    ]
    for index in range(6):
        assert "".join(chunk["text"] for chunk in chunks if chunk["index"] == index) == TEXTS[index % 2]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"return_token_ids": True}, {"stop": "ld"}, {"max_tokens": 2}])
def test_each_choice_of_a_stream_joins_to_that_of_the_whole_answer(server: Any, path: str, extra: dict[str, Any]):
    if path == CHAT and "logprobs" in extra:
        extra = {"logprobs": True, "top_logprobs": 2}
    options = {"stream_options": {"include_usage": True}}
    answer = whole(server, path, n=3, **extra)
    *events, last, done = server.events(path, base(path) | {"n": 3, **extra, **options})
    assert (last["choices"], last["usage"], done) == ([], answer["usage"], "[DONE]")
    chunks = [event["choices"][0] for event in events]
    assert all(len(event["choices"]) == 1 for event in events)
    for index, expected in enumerate(answer["choices"]):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        if path == CHAT:
            role, *own = own
            assert role["delta"] == {"role": "assistant", "content": ""}
            assert "".join(chunk["delta"]["content"] for chunk in own) == expected["message"]["content"]
        else:
            assert "".join(chunk["text"] for chunk in own) == expected["text"]
        assert [chunk["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + [expected["finish_reason"]]
        assert own[-1]["stop_reason"] == expected["stop_reason"]
        if "logprobs" in extra:
            for name, values in expected["logprobs"].items():
                assert [value for chunk in own for value in chunk["logprobs"][name]] == values
        if "return_token_ids" in extra:
            assert [i for chunk in own for i in chunk["token_ids"]] == expected["token_ids"]


def test_choices_are_interleaved(server: Any):
    chunks = [event["choices"][0] for event in server.events(COMPLETIONS, {"prompt": "hi", "n": 3})[:-1]]
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2, 0, 1, 2, 0, 1, 0]


def test_roles_and_prompt_ids_of_a_chat_stream(server: Any):
    *events, _ = server.events(CHAT, {"messages": MESSAGES, "n": 3, "return_token_ids": True})
    roles = [event for event in events if "role" in event["choices"][0]["delta"]]
    assert [event["choices"][0]["index"] for event in roles] == [0, 1, 2]
    assert [tuple(e["prompt_token_ids"]) for e in events if "prompt_token_ids" in e] == [server.engine.calls[0][0]]


@pytest.mark.parametrize(("path", "counts"), [(COMPLETIONS, {0: [1, 2, 3, 4], 1: [1, 2, 3]}),
                                              (CHAT, {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3]})])  # fmt: skip
def test_continuous_usage_counts_each_choice_for_itself(server: Any, path: str, counts: dict[int, list[int]]):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, _ = server.events(path, base(path) | {"n": 2, "stream_options": options})
    for index, expected in counts.items():
        own = [event["usage"] for event in events if event["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in own] == expected
        assert all(usage["prompt_tokens_details"]["cached_tokens"] == 3 for usage in own)
    assert last["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("stream", [True, False])
def test_echo_and_logprobs_of_each_choice(server: Any, tokenizer: Any, stream: bool):
    body = {"prompt": "hi", "n": 2, "echo": True, "logprobs": 1, "max_tokens": 2}
    if stream:
        chunks = [event["choices"][0] for event in server.events(COMPLETIONS, body)[:-1]]
    else:
        chunks = server.complete(**body)["choices"]
    for index, expected in enumerate((["hello", " wor"], [" wor", "ld"])):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        tokens = [token for chunk in own for token in chunk["logprobs"]["tokens"]]
        values = [value for chunk in own for value in chunk["logprobs"]["token_logprobs"]]
        assert "".join(chunk["text"] for chunk in own) == "hi" + "".join(expected)
        assert tokens == ["h", "i", *expected]
        assert values == [None, -0.1, *[-0.1 / (index + 1)] * 2]
        assert [at for chunk in own for at in chunk["logprobs"]["text_offset"]] == [0, 1, 2, 2 + len(expected[0])]


def test_echo_alone_gives_n_echoes_without_the_engine(server: Any):
    answer = server.complete(prompt=["hi", "a"], n=2, best_of=3, echo=True, max_tokens=0)
    assert texts_of(answer) == ["hi", "hi", "a", "a"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 0
    assert not server.engine.calls


def test_prompt_logprobs_stand_with_each_choice(server: Any):
    choices = server.complete(prompt="abc", n=2, prompt_logprobs=1, max_tokens=1)["choices"]
    assert len(choices[0]["prompt_logprobs"]) == 3
    assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]
    assert len(server.chat(n=2, prompt_logprobs=1)["prompt_logprobs"]) == 21


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_in_one_choice_ends_that_one_only(make_server: Any, stream: bool):
    server = make_server(reply="abcdefgh")
    body = {"prompt": "hi", "n": 3, "stop": ["ab"]}  # which only the first continuation says
    if stream:
        chunks = [event["choices"][0] for event in server.events(COMPLETIONS, body)[:-1]]
        choices = [[chunk for chunk in chunks if chunk["index"] == index] for index in range(3)]
    else:
        choices = [[choice] for choice in server.complete(**body)["choices"]]
    assert ["".join(c["text"] for c in own) for own in choices] == ["", "bcdefgh", "cdefgh"]
    assert [own[-1]["stop_reason"] for own in choices] == ["ab", None, None]
    assert {own[-1]["finish_reason"] for own in choices} == {"stop"}
    (_, _, request_id) = server.engine.calls[0]
    assert server.engine.told == [(request_id, "stop", 0)]
    # two tokens of the first, eight of the second, seven of the third, ends included: the first said no more
    assert len(server.engine.yielded) == 2 + 8 + 7


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [True, False])
def test_the_failure_of_one_choice_is_the_requests(
    make_server: Any, error_of: Any, tokenizer: Any, path: str, stream: bool
):
    (letter,) = tokenizer.encode("h", False)
    failure = Delta(finish_reason="error", error=NumericalError("NaN"), index=1)
    server = make_server(script=[Delta((letter,)), Delta((letter,), index=1), failure, Delta((letter,))])
    if stream:
        *chunks, last = server.events(path, base(path) | {"n": 2})
        assert last["error"]["code"] == "internal_error"
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    else:
        answer = server.post(path, {"model": "tiny", "n": 2, **base(path)})
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert len(server.engine.yielded) == 3


def test_an_abort_from_outside_ends_every_choice(make_server: Any, tokenizer: Any):
    (letter,) = tokenizer.encode("h", False)
    script = [Delta((letter,)), Delta((letter,), None, None, "stop", None, index=1), Delta(finish_reason="abort")]
    choices = make_server(script=script).complete(prompt="hi", n=3)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["abort", "stop", "abort"]


def test_an_engine_that_forgets_a_choice_is_an_error(make_server: Any, error_of: Any, tokenizer: Any):
    (letter,) = tokenizer.encode("h", False)
    answer = make_server(script=[Delta((letter,), None, None, "length")]).post(
        COMPLETIONS, {"model": "tiny", "prompt": "a", "n": 2}
    )
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")


# --- best_of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_likeliest_of_best_of_are_answered_best_first_and_all_are_counted(server: Any, path: str):
    """The scripted engine's later continuations are the likelier: the third, then the second."""
    answer = whole(server, path, n=2, best_of=3)
    assert texts_of(answer) == [TEXTS[2], TEXTS[1]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 4 + 3 + 2
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    params = server.engine.calls[0][1]
    assert (params.n, params.best_of, params.logprobs) == (2, 3, 0)  # asked of the engine, to rank by


def test_best_of_several_prompts(server: Any):
    answer = server.complete(prompt=["hi", "a"], best_of=3, logprobs=1)
    assert texts_of(answer) == [TEXTS[2], TEXTS[2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [-0.1 / 3] * 2


def test_it_is_the_mean_that_counts_and_only_of_tokens_up_to_a_stop_string(make_server: Any, tokenizer: Any):
    """-1 once; -0.6 twice, which is less in sum; -0.2 twice and a -9 behind the stop string."""
    ids = {letter: tokenizer.encode(letter, False)[0] for letter in "abcde"}

    def delta(letter: str, logprob: float, index: int, reason: Any = None) -> Delta:
        return Delta((ids[letter],), (TokenLogprobs(ids[letter], logprob, 1),), None, reason, index=index)

    late = Delta(
        (ids["c"], ids["d"], ids["e"]),
        tuple(TokenLogprobs(ids[x], p, 1) for x, p in zip("cde", (-0.2, -0.2, -9.0), strict=True)),
        index=2,
    )
    script = [delta("a", -1.0, 0, "stop"), delta("b", -0.6, 1), delta("b", -0.6, 1, "length"), late]
    answer = make_server(script=script).complete(prompt="hi", n=2, best_of=3, stop="d")
    assert texts_of(answer) == ["c", "bb"]
    assert answer["usage"]["completion_tokens"] == 1 + 2 + 2


def test_best_of_equal_to_n_is_n(server: Any):
    assert texts_of(server.complete(prompt="hi", n=2, best_of=2)) == TEXTS[:2]
    assert server.engine.calls[0][1].logprobs is None


# --- beam search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_n_is_the_width_of_a_beam_search(server: Any, path: str):
    fields = {"length_penalty": 0.5, "early_stopping": True, "ignore_eos": True, "stop_token_ids": [7]}
    answer = whole(server, path, use_beam_search=True, n=3, temperature=0, max_tokens=9, **fields)
    expected = BeamSearchParams(beam_width=3, max_tokens=9, **fields)
    ((_, params, _),) = server.engine.calls
    assert params == expected
    assert texts_of(answer) == TEXTS
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


def test_best_of_is_the_width_where_it_is_given(server: Any):
    answer = server.complete(prompt=["hi", "a"], use_beam_search=True, n=2, best_of=4)
    assert [params.beam_width for _, params, _ in server.engine.calls] == [4, 4]
    assert texts_of(answer) == [*TEXTS[:2], *TEXTS[:2]]
    assert answer["usage"]["completion_tokens"] == 2 * (4 + 3 + 2 + 1)


def test_defaults_of_the_model_are_not_a_beam_searchs(make_server: Any):
    server = make_server(default_sampling={"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    server.complete(prompt="hi", use_beam_search=True)
    assert server.engine.calls[0][1] == BeamSearchParams(beam_width=1, max_tokens=16)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_streamed_beam_search_is_framed_like_any_stream(server: Any, path: str):
    body = base(path) | {"use_beam_search": True, "n": 3, "stream_options": {"include_usage": True}}
    *events, last, done = server.events(path, body)
    assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], 9, "[DONE]")
    chunks = [event["choices"][0] for event in events]
    for index, text in enumerate(TEXTS):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        if path == CHAT:
            assert own.pop(0)["delta"]["role"] == "assistant"
            assert "".join(chunk["delta"]["content"] for chunk in own) == text
        else:
            assert "".join(chunk["text"] for chunk in own) == text
        assert [chunk["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + ["stop"]
    assert [chunk["index"] for chunk in chunks] == sorted(chunk["index"] for chunk in chunks)


def test_a_beam_search_can_echo_and_list_ids(server: Any, tokenizer: Any):
    choices = server.complete(prompt="hi", use_beam_search=True, n=2, echo=True, return_token_ids=True)["choices"]
    assert [choice["text"] for choice in choices] == ["hihello world", "hi world"]
    assert choices[0]["token_ids"] == tokenizer.encode("hello world<|im_end|>")


def test_as_many_beams_as_there_are_rows(make_server: Any, error_of: Any):
    server = make_server(limits=Limits(max_beam_width=4))
    assert (
        server.post(COMPLETIONS, {"model": "tiny", "prompt": "a", "use_beam_search": True, "n": 4}).status_code == 200
    )
    answer = server.post(COMPLETIONS, {"model": "tiny", "prompt": "a", "use_beam_search": True, "n": 5})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")
    assert "<= 4, but got 5" in answer.text
    assert server.post(COMPLETIONS, {"model": "tiny", "prompt": "a", "n": 5}).status_code == 200


# --- the prefix cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_salt_reaches_the_engine_as_it_is(server: Any, path: str):
    whole(server, path, cache_salt="ключ", n=2)
    whole(server, path)
    assert server.engine.salts == ["ключ", None]


def test_every_prompt_has_the_requests_salt(server: Any):
    server.complete(prompt=["a", "b"], cache_salt="s", use_beam_search=True)
    assert server.engine.salts == ["s", "s"]


@pytest.mark.parametrize("body", [None, b"{}"])
def test_the_prefix_cache_can_be_reset(server: Any, body: bytes | None):
    headers = {} if body is None else {"content-type": "application/json"}
    answer = server.request("POST", "/reset_prefix_cache", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (200, b"")
    assert server.engine.resets == 1


@pytest.mark.parametrize(
    ("path", "kwargs", "status", "words"),
    [
        ("?reset_running_requests=true", {}, 400, "supplied: reset_running_requests"),
        ("", {"content": b'{"device": 0}', "headers": {"content-type": "application/json"}}, 400, "supplied: device"),
        ("", {"content": b"x=1", "headers": {"content-type": "text/plain"}}, 415, "application/json"),
        ("", {"content": b"[]", "headers": {"content-type": "application/json"}}, 400, "must be a JSON object"),
        ("", {"headers": {"origin": "https://evil.example"}}, 403, "insufficient permissions"),
        ("", {"headers": {"origin": "null"}}, 403, "insufficient permissions"),
    ],
)
def test_what_a_reset_refuses(server: Any, error_of: Any, path: str, kwargs: dict[str, Any], status: int, words: str):
    """Among it any web page: a POST without a body needs no preflight (S-29)."""
    answer = server.request("POST", "/reset_prefix_cache" + path, **kwargs)
    assert (answer.status_code, words in error_of(answer)["message"]) == (status, True), answer.text
    assert server.engine.resets == 0


def test_a_reset_of_a_dead_engine_is_an_error(server: Any, error_of: Any, monkeypatch: pytest.MonkeyPatch):
    async def fail() -> int:
        raise EngineDeadError("The step loop failed.")

    monkeypatch.setattr(server.engine, "reset_prefix_cache", fail)
    answer = server.request("POST", "/reset_prefix_cache")
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert server.request("GET", "/reset_prefix_cache").status_code == 405
