"""/v1/models, /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "hi"}]


def test_models_are_listed_by_every_served_name(server: Any):
    listed = server.request("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "org/tiny"]
    for card in listed["data"]:
        assert card["object"] == "model"
        assert (card["max_model_len"], card["created"], card["root"]) == (64, 1_700_000_000, "tiny")
        assert card["owned_by"] == "jaxserve"
        assert server.request("GET", f"/v1/models/{card['id']}").json() == card


@pytest.mark.parametrize("name", ["gpt-4", "org", "org/tiny/", "..%2F..%2Fetc", "tiny%00", "TINY"])
def test_an_unknown_model_is_not_found(server: Any, error_of: Any, name: str):
    answer = server.request("GET", f"/v1/models/{name}")
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_tokenize_gives_the_ids_that_completions_use(server: Any):
    answer = server.post("/tokenize", {"prompt": "hello world", "return_token_strs": True}).json()
    server.complete(prompt="hello world")
    assert tuple(answer["tokens"]) == server.engine.calls[-1][0]
    assert (answer["count"], answer["max_model_len"]) == (3, 64)
    assert answer["token_strs"] == ["hello", " wor", "ld"]


def test_tokenize_gives_the_ids_that_chat_uses(server: Any):
    answer = server.post("/tokenize", {"model": "tiny", "messages": MESSAGES}).json()
    server.chat()
    assert tuple(answer["tokens"]) == server.engine.calls[-1][0]
    assert answer["token_strs"] is None
    bare = server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert answer["tokens"][: bare["count"]] == bare["tokens"]
    assert bare["count"] < answer["count"]


def test_tokenize_takes_text_longer_than_the_context(server: Any):
    assert server.post("/tokenize", {"prompt": "x" * 5000}).json()["count"] == 5000


def test_detokenize_undoes_tokenize(server: Any):
    for text in ("hello wörld €", "<|im_start|>x", "", "a\x00b"):
        tokens = server.post("/tokenize", {"prompt": text}).json()["tokens"]
        assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "missing_required_parameter", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "invalid_parameter_combination", "messages"),
        ("/tokenize", {"prompt": ["a"]}, "invalid_type", "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, None, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "empty_array", "messages"),
        ("/tokenize", {"prompt": "a", "foo": 1}, "unknown_parameter", None),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
        ("/detokenize", {}, "missing_required_parameter", "tokens"),
        ("/detokenize", {"tokens": [268]}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": "a"}, "invalid_type", "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "invalid_type", "tokens[0]"),
    ],
)
def test_what_the_tokenizer_cannot_take(
    server: Any, error_of: Any, path: str, body: Any, code: str | None, param: str | None
):
    answer = server.post(path, body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_a_model_that_is_named_must_be_served(server: Any, error_of: Any, path: str):
    answer = server.post(
        path, {"model": "gpt-9", "prompt": "a"} if path == "/tokenize" else {"model": "gpt-9", "tokens": [1]}
    )
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")


def test_the_probes_of_lm_evals_remote_tokenizer(server: Any):
    """`lm_eval.utils.check_remote_tokenizer_support`: eos_token in the info, tokens for a prompt, no model named."""
    info = server.request("GET", "/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<|im_end|>", "<|bos|>", "<|pad|>")
    assert "<|im_start|>" in info["chat_template"]
    tokens = server.post("/tokenize", {"prompt": "test", "add_special_tokens": False}).json()["tokens"]
    assert isinstance(tokens, list)
    assert server.post("/tokenize", {"prompt": info["eos_token"]}).json()["tokens"] == [info["eos_token_id"]]
