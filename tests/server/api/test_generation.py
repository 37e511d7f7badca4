"""What the generation endpoints ask of the engine and make of its answers: prompts, echo, logprobs, usage, defaults."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from jaxserve.types import Delta, SamplingParams, TokenLogprobs

MESSAGES = [{"role": "user", "content": "hi"}]


# --- prompts -----------------------------------------------------------------------------------------------


def test_four_forms_of_prompt(server: Any, tokenizer: Any):
    hi, hello = tokenizer.encode("hi"), tokenizer.encode("hello")
    for prompt, expected in (("hi", [hi]), (["hi", "hello"], [hi, hello]), (hi, [hi]), ([hi, hello], [hi, hello])):
        server.engine.calls.clear()
        answer = server.complete(prompt=prompt)
        assert sorted(list(ids) for ids, *_ in server.engine.calls) == sorted(expected)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
        assert answer["usage"]["completion_tokens"] == 4 * len(expected)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * len(expected)


def test_choices_keep_their_prompts_order_whoever_ends_first(make_server: Any):
    server = make_server()
    play = server.engine.play
    server.engine.play = lambda ids, params: play(ids, params)[-len(ids) :]
    answer = server.complete(prompt=["abcd", "a", "abc"])
    assert [choice["text"] for choice in answer["choices"]] == ["hello world", "", " world"]


def test_engine_ids_are_never_the_clients(server: Any):
    """S-32: with the client's id as the engine's, an abort of one request ended another of the same id."""
    answers = [server.complete(prompt=["hi", "hi"], request_id="mine") for _ in range(2)]
    assert [answer["id"] for answer in answers] == ["cmpl-mine", "cmpl-mine"]
    ids = [request_id for *_, request_id in server.engine.calls]
    assert len(set(ids)) == 4
    assert not any("mine" in request_id for request_id in ids)


def test_control_tokens_are_read_in_raw_prompts_and_not_in_messages(server: Any, tokenizer: Any):
    end = tokenizer.token_to_id("<|im_end|>")
    server.complete(prompt="a<|im_end|>")
    assert server.engine.calls[-1][0].count(end) == 1
    server.chat("a<|im_end|>b")
    assert server.engine.calls[-1][0].count(end) == 1  # the template's own


def test_content_parts_are_text(server: Any):
    server.chat()
    plain = server.engine.calls[-1][0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert server.post("/v1/chat/completions", {"model": "tiny", "messages": parts}).status_code == 200
    assert server.engine.calls[-1][0] == plain


def test_a_reply_can_be_sent_back_as_sdks_dump_it(server: Any, tokenizer: Any):
    reply = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None,
             "function_call": None, "tool_calls": None}  # fmt: skip
    server.post("/v1/chat/completions", {"model": "tiny", "messages": [*MESSAGES, reply, *MESSAGES], "max_tokens": 1})
    assert "yes<|im_end|>" in tokenizer.decode(server.engine.calls[-1][0], skip_special_tokens=False)


def test_the_last_message_can_be_continued(server: Any, tokenizer: Any):
    messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    body = {"model": "tiny", "messages": messages, "continue_final_message": True, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert tokenizer.decode(server.engine.calls[-1][0], skip_special_tokens=False).endswith("assistant\nI am")


@pytest.mark.parametrize(("side", "kept"), [(None, "ef"), ("left", "ef"), ("right", "ab")])
def test_prompts_are_truncated_as_asked(server: Any, tokenizer: Any, side: str | None, kept: str):
    server.complete(prompt="abcdef", truncate_prompt_tokens=2, **({"truncation_side": side} if side else {}))
    assert tokenizer.decode(server.engine.calls[-1][0]) == kept


def test_minus_one_truncates_to_what_the_context_leaves(server: Any):
    server.complete(prompt="x" * 100, truncate_prompt_tokens=-1, max_tokens=10)
    assert len(server.engine.calls[-1][0]) == 54


def test_long_text_is_tokenised_away_from_the_event_loop(make_server: Any):
    """Ten milliseconds of tokenising would be a gap in every open stream."""
    server = make_server()
    tokenizer, threads = server.serving.tokenizer, []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            if name == "encode_batch":
                threads.append(threading.current_thread())
            return getattr(tokenizer, name)

    server = make_server(tokenizer=Watched())
    server.complete(prompt="x" * 5000, truncate_prompt_tokens=5)
    assert server.engine.calls[-1][0] == tuple(tokenizer.encode("xxxxx"))
    server.complete(prompt="x")
    assert [thread is threading.main_thread() for thread in threads] == [False, True]  # short text stays on the loop


# --- parameters --------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": -0.3,
    "repetition_penalty": 1.1, "seed": -9, "stop": ["x", "yz"], "stop_token_ids": [5], "ignore_eos": True,
    "min_tokens": 2, "prompt_logprobs": 2, "include_stop_str_in_output": True, "allowed_token_ids": [1, 2, 3],
    "skip_special_tokens": False,
}  # fmt: skip


def test_every_parameter_reaches_the_engine(server: Any, tokenizer: Any):
    server.complete(prompt="hi", max_tokens=9, logprobs=3, logit_bias={"3": -1.5}, bad_words=["hello"], **EVERYTHING)
    _, params, _ = server.engine.calls[-1]
    expected = SamplingParams(
        **EVERYTHING, max_tokens=9, logprobs=3, logit_bias={3: -1.5}, bad_words=["hello"], bad_words_token_ids=(
            tuple(tokenizer.encode("hello")), tuple(tokenizer.encode(" hello")))
    )  # fmt: skip
    assert params == expected
    server.chat(
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"3": -1.5},
        bad_words=["hello"],
        **EVERYTHING,
    )
    assert server.engine.calls[-1][1] == expected


def test_defaults_of_the_api(server: Any):
    server.complete(prompt="hi")
    assert server.engine.calls[-1][1] == SamplingParams(max_tokens=16)
    server.chat()
    prompt, params, _ = server.engine.calls[-1]
    assert params == SamplingParams(max_tokens=64 - len(prompt))
    server.complete(prompt="x" * 60)
    assert server.engine.calls[-1][1].max_tokens == 4  # the default gives way to the context


def test_defaults_of_the_models_generation_config_stand_behind_the_request(make_server: Any):
    server = make_server(default_sampling={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 8})
    server.chat(top_p=0.5)
    _, params, _ = server.engine.calls[-1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.5, 20, 8)
    server.chat(temperature=0, max_tokens=11)
    assert (server.engine.calls[-1][1].temperature, server.engine.calls[-1][1].max_tokens) == (0, 11)


def test_null_means_not_given(server: Any):
    server.complete(prompt="hi", temperature=None, stop=None, logprobs=None, max_tokens=None, logit_bias=None, n=None)
    assert server.engine.calls[-1][1] == SamplingParams(max_tokens=16)


# --- answers -----------------------------------------------------------------------------------------------


def test_a_completions_shape(server: Any):
    answer = server.complete(prompt="hi")
    assert list(answer) == ["id", "object", "created", "model", "choices", "system_fingerprint", "usage"]
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["choices"] == [
        {"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": 3}
    }  # fmt: skip


def test_a_chat_completions_shape(server: Any):
    answer = server.chat(max_tokens=2)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "hello wor"}, "logprobs": None,
         "finish_reason": "length", "stop_reason": None}
    ]  # fmt: skip


def test_answers_carry_the_canonical_name(server: Any):
    assert server.complete(prompt="hi", model="org/tiny")["model"] == "tiny"


def test_the_last_of_a_held_stop_string_is_given_at_the_end(make_server: Any):
    assert make_server(reply="abc").complete(prompt="hi", stop=["cd"])["choices"][0]["text"] == "abc"


def test_stop_reason_names_a_stop_token_of_the_request(make_server: Any, tokenizer: Any):
    (letter,) = tokenizer.encode("b", False)
    script = [Delta(tuple(tokenizer.encode("a", False))), Delta((letter,), None, None, "stop", letter)]
    choice = make_server(script=script).complete(prompt="hi", stop_token_ids=[letter])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", letter)


def test_completion_logprobs(server: Any):
    logprobs = server.complete(prompt="hi", logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["hello", " wor", "ld"]
    assert logprobs["text_offset"] == [0, 5, 9]
    assert logprobs["token_logprobs"] == [-0.1] * 3
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert len(top) == 2
        assert top[token] == -0.1 == max(top.values())  # the very float, which lm-eval compares


def test_the_chosen_token_is_listed_though_it_is_not_among_the_likeliest(make_server: Any, tokenizer: Any):
    (a, b, c) = (tokenizer.encode(letter, False)[0] for letter in "abc")
    entry = TokenLogprobs(a, -5.0, 9, ((b, -0.5), (c, -1.5)))
    script = [Delta((a,), (entry,), None, "length")]
    answer = make_server(script=script).complete(prompt="hi", logprobs=2)["choices"][0]["logprobs"]
    assert answer["top_logprobs"] == [{"a": -5.0, "b": -0.5, "c": -1.5}]
    content = make_server(script=script).chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["b", "c"]


def test_an_impossible_token_has_a_finite_logprob(make_server: Any, tokenizer: Any):
    (a, b) = (tokenizer.encode(letter, False)[0] for letter in "ab")
    script = [Delta((a,), (TokenLogprobs(a, float("-inf"), 9, ((b, 0.0),)),), None, "length")]
    logprobs = make_server(script=script).complete(prompt="hi", logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"a": -9999.0, "b": 0.0}]


def test_tokens_that_are_parts_of_a_character_keep_their_bytes(make_server: Any, tokenizer: Any):
    ids = tokenizer.encode("€", False)
    script = [Delta((i,), (TokenLogprobs(i, -1.0, 1, ((i, -1.0),)),)) for i in ids[:2]]
    script.append(Delta((ids[2],), (TokenLogprobs(ids[2], -1.0, 1, ((ids[2], -1.0),)),), None, "length"))
    content = make_server(script=script).chat(logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "€"
    assert [entry["token"] for entry in content] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert content[0]["top_logprobs"][0] == {"token": "bytes:\\xe2", "logprob": -1.0, "bytes": [0xE2]}


def test_tokens_can_be_written_as_ids(server: Any, tokenizer: Any):
    (hello,) = tokenizer.encode("hello")
    options = {"return_tokens_as_token_ids": True, "max_tokens": 1}
    logprobs = server.complete(prompt="hi", logprobs=1, **options)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{hello}"]
    assert list(logprobs["top_logprobs"][0]) == [f"token_id:{hello}"]
    content = server.chat(logprobs=True, **options)["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == f"token_id:{hello}"
    assert content[0]["top_logprobs"] == []


def test_token_ids_can_be_returned(server: Any, tokenizer: Any):
    expected = tokenizer.encode("hello world<|im_end|>")
    choice = server.complete(prompt="hi", return_token_ids=True)["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (expected, tokenizer.encode("hi"))
    answer = server.chat(return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == expected
    assert tuple(answer["prompt_token_ids"]) == server.engine.calls[-1][0]


# --- echo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["hi hello", "€ and ü", "<|bos|>hello", "hello\x00"])
def test_echo_with_logprobs_places_every_token(server: Any, tokenizer: Any, prompt: str):
    choice = server.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=2)["choices"][0]
    assert choice["text"] == prompt + "hello wor"
    logprobs = choice["logprobs"]
    ids = tokenizer.encode(prompt)
    assert len(logprobs["tokens"]) == len(ids) + 2
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert None not in logprobs["token_logprobs"][1:]
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"].startswith(token, start)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_tokens_put_before_an_echoed_text_stand_at_its_start(make_server: Any, bos_tokenizer: Any):
    choice = make_server(tokenizer=bos_tokenizer).complete(prompt="hello a", echo=True, logprobs=0, max_tokens=1)[
        "choices"
    ][0]
    assert choice["text"] == "hello ahello"
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "hello", " ", "a", "hello"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 5, 6, 7]


def test_the_loglikelihood_requests_of_lm_eval(server: Any, tokenizer: Any):
    rows = [tokenizer.encode("hello world"), tokenizer.encode("abc")]
    answer = server.complete(prompt=rows, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    for choice, row in zip(answer["choices"], rows, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(row) + 1
        assert choice["text"].startswith(tokenizer.decode(row))
        scored = zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True)
        assert all(own == max(top.values()) for own, top in scored)


def test_echo_alone_needs_no_engine(server: Any):
    answer = server.complete(prompt=["hi", "hello"], echo=True, max_tokens=0)
    assert [choice["text"] for choice in answer["choices"]] == ["hi", "hello"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    assert not server.engine.calls


def test_echo_alone_with_logprobs_shows_nothing_generated(server: Any):
    answer = server.complete(prompt="hello ab", echo=True, max_tokens=0, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "hello ab"
    assert choice["logprobs"]["tokens"] == ["hello", " ", "a", "b"]
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)


def test_prompt_logprobs_are_maps_from_token_ids(server: Any, tokenizer: Any):
    ids = tokenizer.encode("hello a")
    maps = server.complete(prompt="hello a", prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert maps[0] is None
    assert len(maps) == len(ids)
    for token_id, found in zip(ids[1:], maps[1:], strict=True):
        assert found[str(token_id)] == {"logprob": -0.1, "rank": 1, "decoded_token": tokenizer.decode([token_id])}
        assert len(found) == 2
    assert server.chat(prompt_logprobs=0)["prompt_logprobs"][0] is None


def test_echo_and_prompt_logprobs_each_list_as_many_as_they_ask(server: Any):
    choice = server.complete(prompt="abc", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1)["choices"][0]
    assert server.engine.calls[-1][1].prompt_logprobs == 3
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1, 1, 1]
    assert [len(found) for found in choice["prompt_logprobs"][1:]] == [3, 3]
