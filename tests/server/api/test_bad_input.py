"""Bad input, row by row: the status, code and param of the project's error rows 1 to 71, and valid neighbours of them.

The expectations are OpenAI's published answers where they are known; the rows of connections, keys and overload
(12 to 24, 76 to 82) are tested with the server's shell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jaxserve_server.body import decode
from jaxserve_server.errors import ApiError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
NESTED = b"[" * 2000 + b"]" * 2000
OMIT = object()


def bodies(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {"model": "tiny"} | ({"prompt": "hi"} if path == COMPLETIONS else {"messages": USER})
    return {name: value for name, value in {**base, **fields}.items() if value is not OMIT}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def called(arguments: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


JSON_FAULT = (400, None, None, "could not parse the JSON body")

# (row, body as bytes, (status, code, param, words of the message))
BYTES: list[tuple[str, bytes, tuple[int, str | None, str | None, str]]] = [
    ("1", b'{"model": "tiny",', JSON_FAULT),
    ("1-trailing", b'{"model": "tiny"} x', JSON_FAULT),
    ("2", b"", JSON_FAULT),
    ("3-array", b"[1]", (400, None, None, "must be a JSON object, but got an array")),
    ("3-string", b'"a"', (400, None, None, "must be a JSON object, but got a string")),
    ("3-number", b"1", (400, None, None, "must be a JSON object, but got an integer")),
    ("3-null", b"null", (400, None, None, "must be a JSON object, but got null")),
    ("4-array", NESTED, JSON_FAULT),
    ("4-million", b"[" * 1_000_000, JSON_FAULT),
    ("4-inside", b'{"metadata": ' + NESTED + b"}", JSON_FAULT),
    ("6", b'{"model": "\xff"}', JSON_FAULT),
    ("6-surrogate-bytes", b'{"model": "\xed\xa0\x80"}', JSON_FAULT),
    ("7", b'{"model": "\\ud800"}', JSON_FAULT),
    ("7-low", b'{"model": "\\udc00 "}', JSON_FAULT),
    ("9-bom", b'\xef\xbb\xbf{"model": "tiny"}', JSON_FAULT),
    ("9-utf16", '{"model": "tiny"}'.encode("utf-16"), JSON_FAULT),
    ("10-nan", b'{"model": "tiny", "temperature": NaN}', JSON_FAULT),
    ("10-infinity", b'{"model": "tiny", "temperature": -Infinity}', JSON_FAULT),
    ("11", b'{"model": "tiny", "temperature": 1e400}', JSON_FAULT),
]

# (row, path, fields, (status, code, param, words of the message))
FIELDS: list[tuple[str, str, dict[str, Any], tuple[int, str | None, str | None, str]]] = [
    ("25", CHAT, {"model": OMIT}, (400, None, "model", "you must provide a model parameter")),
    ("25-null", COMPLETIONS, {"model": None}, (400, None, "model", "you must provide a model parameter")),
    ("26", CHAT, {"model": "gpt-9"}, (404, "model_not_found", "model", "'gpt-9' does not exist")),
    ("26-path", COMPLETIONS, {"model": "../../etc/passwd"}, (404, "model_not_found", "model", "does not exist")),
    ("27", CHAT, {"messages": OMIT}, (400, "missing_required_parameter", "messages", "'messages'")),
    ("27-prompt", COMPLETIONS, {"prompt": OMIT}, (400, "missing_required_parameter", "prompt", "'prompt'")),
    ("28", CHAT, {"messages": []}, (400, "empty_array", "messages", "minimum length 1")),
    ("29", CHAT, {"messages": "hi"}, (400, "invalid_type", "messages", "expected an array, but got a string")),
    ("29-item", CHAT, {"messages": ["hi"]}, (400, "invalid_type", "messages[0]", "expected an object")),
    ("30", CHAT, {"messages": [*USER, {"role": "bot", "content": ""}]},
     (400, "invalid_value", "messages[1].role", "'bot'. Supported values are: 'system', 'developer', 'user'")),
    ("30-missing", CHAT, {"messages": [{"content": "hi"}]},
     (400, "missing_required_parameter", "messages[0].role", "messages[0].role")),
    ("31-null", CHAT, {"messages": [{"role": "user", "content": None}]},
     (400, "invalid_value", "messages[0].content", "")),
    ("31-absent", CHAT, {"messages": [{"role": "user"}]}, (400, "invalid_value", "messages[0].content", "")),
    ("31-part", CHAT, {"messages": [*USER, {"role": "user", "content": [{"type": "smell"}]}]},
     (400, "invalid_value", "messages[1].content", "smell")),
    ("31-image", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     (400, "invalid_value", "messages[0].content", "image_url")),
    ("31-number", CHAT, {"messages": [{"role": "user", "content": 3}]},
     (400, "invalid_type", "messages[0].content", "but got an integer")),
    ("32", CHAT, {"messages": [{"role": "system", "content": "refuse me"}]}, (400, "invalid_prompt", "messages", "")),
    ("33", CHAT, {"messages": [{"role": "user", "content": "x" * 80}]},
     (400, "context_length_exceeded", "messages", "context length is 64 tokens. However, your messages resulted")),
    ("33-prompt", COMPLETIONS, {"prompt": "x" * 80},
     (400, "context_length_exceeded", "prompt", "your prompt resulted in 80 tokens")),
    ("33-full", COMPLETIONS, {"prompt": "x" * 64}, (400, "context_length_exceeded", "prompt", "(64 in the prompt, 1")),
    ("34", CHAT, {"max_tokens": 60},
     (400, "context_length_exceeded", "messages", "requested 81 tokens (21 in the messages, 60 in the completion)")),
    ("34-prompt", COMPLETIONS, {"max_tokens": 63},
     (400, "context_length_exceeded", "prompt", "you requested 65 tokens (2 in the prompt, 63 in the completion)")),
    ("36", CHAT, {"max_tokens": 0}, (400, "integer_below_min_value", "max_tokens", ">= 1, but got 0 instead.")),
    ("36-negative", COMPLETIONS, {"max_tokens": -1},
     (400, "integer_below_min_value", "max_tokens", "Expected a value >= 1, but got -1 instead.")),
    ("36-no-echo", COMPLETIONS, {"max_tokens": 0}, (400, "integer_below_min_value", "max_tokens", ">= 1")),
    ("36-new-name", CHAT, {"max_completion_tokens": 0}, (400, "integer_below_min_value", "max_completion_tokens", "")),
    ("37", CHAT, {"max_tokens": 50_000},
     (400, "integer_above_max_value", "max_tokens", "Expected a value <= 64, but got 50000 instead.")),
    ("37-completions", COMPLETIONS, {"max_tokens": 65}, (400, "integer_above_max_value", "max_tokens", "<= 64")),
    ("37-new-name", CHAT, {"max_completion_tokens": 65},
     (400, "integer_above_max_value", "max_completion_tokens", "<= 64")),
    ("38", CHAT, {"max_tokens": 4, "max_completion_tokens": 4},
     (400, "invalid_parameter_combination", "max_tokens", "not both")),
    ("39-decimal", CHAT, {"max_tokens": 1.5},
     (400, "invalid_type", "max_tokens", "expected an integer, but got a decimal number instead.")),
    ("39-integral", COMPLETIONS, {"max_tokens": 1.0}, (400, "invalid_type", "max_tokens", "")),
    ("39-exponent", COMPLETIONS, {"max_tokens": 1e2}, (400, "invalid_type", "max_tokens", "")),
    ("39-string", CHAT, {"max_tokens": "5"},
     (400, "invalid_type", "max_tokens", "expected an integer, but got a string instead.")),
    ("39-bool", CHAT, {"n": True}, (400, "invalid_type", "n", "expected an integer, but got a boolean instead.")),
    *((f"40-{name}", path, {name: 10**30}, (400, "integer_above_max_value", name, "")) for path, name in (
        (CHAT, "max_tokens"), (CHAT, "n"), (CHAT, "seed"), (CHAT, "top_logprobs"), (COMPLETIONS, "logprobs"),
        (COMPLETIONS, "top_k"), (COMPLETIONS, "min_tokens"), (COMPLETIONS, "best_of"), (COMPLETIONS, "prompt_logprobs"),
        (COMPLETIONS, "truncate_prompt_tokens"), (COMPLETIONS, "stream_interval"))),
    ("40-4000-digits", CHAT, {"max_tokens": 10**4000}, (400, "integer_above_max_value", "max_tokens", "…")),
    ("40-below", CHAT, {"seed": -(10**30)}, (400, "integer_below_min_value", "seed", "")),
    ("41", CHAT, {"temperature": 200},
     (400, "decimal_above_max_value", "temperature",
      "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 200 instead.")),
    ("41-just", CHAT, {"temperature": 2.01}, (400, "decimal_above_max_value", "temperature", "<= 2, but got 2.01")),
    ("41-below", CHAT, {"temperature": -0.1}, (400, "decimal_below_min_value", "temperature", ">= 0, but got -0.1")),
    ("41-string", CHAT, {"temperature": "NaN"}, (400, "invalid_type", "temperature", "expected a number")),
    ("41-huge", CHAT, {"temperature": 10**400}, (400, "decimal_above_max_value", "temperature", "")),
    ("45", CHAT, {"top_p": 5}, (400, "decimal_above_max_value", "top_p", "Expected a value <= 1, but got 5 instead.")),
    ("45-below", COMPLETIONS, {"top_p": -1}, (400, "decimal_below_min_value", "top_p", "")),
    *((f"46-{name}-{value}", path, {name: value}, (400, f"decimal_{word}_value", name, ""))
      for path in (CHAT, COMPLETIONS) for name in ("frequency_penalty", "presence_penalty")
      for value, word in ((2.1, "above_max"), (-2.1, "below_min"))),
    ("46-repetition", CHAT, {"repetition_penalty": 0}, (400, "decimal_below_min_value", "repetition_penalty", "")),
    ("46-min-p", CHAT, {"min_p": 1.5}, (400, "decimal_above_max_value", "min_p", "")),
    ("47-zero", CHAT, {"n": 0}, (400, "integer_below_min_value", "n", ">= 1")),
    ("47-negative", COMPLETIONS, {"n": -1}, (400, "integer_below_min_value", "n", "")),
    ("47-billion", CHAT, {"n": 10**9}, (400, "integer_above_max_value", "n", "<= 16")),
    ("47-seventeen", COMPLETIONS, {"n": 17},
     (400, "integer_above_max_value", "n", "Expected a value <= 16, but got 17 instead.")),
    ("47-fan-out", COMPLETIONS, {"prompt": ["a"] * 9, "n": 8},
     (400, "invalid_parameter_combination", "n",
      "9 prompts with n=8 make 72 continuations, and one request may have at most 64. Send fewer prompts, or")),
    ("47-fan-out-best-of", COMPLETIONS, {"prompt": [[1]] * 13, "n": 2, "best_of": 5},
     (400, "invalid_parameter_combination", "best_of", "13 prompts with best_of=5 make 65")),
    *((f"49-{n}-{best_of}", path, {"n": n, "best_of": best_of},
       (400, None, "best_of", f"'best_of' must be at least n={n}, got {best_of}."))
      for path in (COMPLETIONS, CHAT) for n, best_of in ((2, 1), (16, 15))),
    ("49-stream", COMPLETIONS, {"best_of": 2, "stream": True}, (400, None, "best_of", "streamed")),
    ("49-stream-n", CHAT, {"n": 2, "best_of": 3, "stream": True},
     (400, None, "best_of", "above n=2 cannot be streamed")),
    ("49-high", CHAT, {"best_of": 17}, (400, "integer_above_max_value", "best_of", "<= 16")),
    ("49-zero", COMPLETIONS, {"best_of": 0}, (400, "integer_below_min_value", "best_of", "")),
    ("50-float", CHAT, {"seed": 1.5}, (400, "invalid_type", "seed", "")),
    ("50-above", CHAT, {"seed": 2**63}, (400, "integer_above_max_value", "seed", "9223372036854775807")),
    ("50-below", CHAT, {"seed": -(2**63) - 1}, (400, "integer_below_min_value", "seed", "")),
    ("51", CHAT, {"stop": list("abcdefghi")},
     (400, "array_above_max_length", "stop",
      "Expected an array with maximum length 4, but got an array with length 9 instead.")),
    ("51-five", COMPLETIONS, {"stop": list("abcde")}, (400, "array_above_max_length", "stop", "")),
    ("52", COMPLETIONS, {"stop": ""}, (400, "invalid_value", "stop", "empty")),
    ("52-list", CHAT, {"stop": ["a", ""]}, (400, "invalid_value", "stop", "empty")),
    ("53", CHAT, {"stop": "x" * 10_240}, (400, "string_above_max_length", "stop", "maximum length 256")),
    ("53-ints", CHAT, {"stop": [1, 2]}, (400, "invalid_type", "stop[0]", "expected a string")),
    ("54-vocab", CHAT, {"logit_bias": {"100265": 1}},
     (400, None, "logit_bias", "Invalid key in 'logit_bias': 100265. Maximum value is 267.")),
    ("54-edge", COMPLETIONS, {"logit_bias": {"268": 1}}, (400, None, "logit_bias", "Maximum value is 267.")),
    *((f"54-{key!r}", CHAT, {"logit_bias": {key: 1}},
       (400, None, "logit_bias", f"Invalid key in 'logit_bias': {key}. You should only be submitting non-negative"))
      for key in ("-1", "abc", "1.5", "", " 1", "¹", "1e1")),
    ("55", CHAT, {"logit_bias": {"1": 101}}, (400, "decimal_above_max_value", "logit_bias", "<= 100, but got 101")),
    ("55-below", CHAT, {"logit_bias": {"1": -100.5}}, (400, "decimal_below_min_value", "logit_bias", "")),
    ("55-string", CHAT, {"logit_bias": {"1": "5"}}, (400, "invalid_type", "logit_bias", "expected a number")),
    ("55-huge", CHAT, {"logit_bias": {"1": 10**400}}, (400, "decimal_above_max_value", "logit_bias", "")),
    ("55-list", CHAT, {"logit_bias": [1]}, (400, "invalid_type", "logit_bias", "expected an object")),
    ("57", CHAT, {"top_logprobs": 2}, (400, None, "top_logprobs", "'logprobs' is enabled")),
    ("57-false", CHAT, {"top_logprobs": 2, "logprobs": False}, (400, None, "top_logprobs", "'logprobs'")),
    ("58", CHAT, {"logprobs": True, "top_logprobs": 21},
     (400, "integer_above_max_value", "top_logprobs", "Expected a value <= 20, but got 21")),
    ("58-below", CHAT, {"logprobs": True, "top_logprobs": -1}, (400, "integer_below_min_value", "top_logprobs", "")),
    ("58-completions", COMPLETIONS, {"logprobs": 6}, (400, "integer_above_max_value", "logprobs", "<= 5")),
    ("58-type", CHAT, {"logprobs": 1}, (400, "invalid_type", "logprobs", "expected a boolean")),
    ("58-prompt", COMPLETIONS, {"prompt_logprobs": 21}, (400, "integer_above_max_value", "prompt_logprobs", "<= 20")),
    ("61", COMPLETIONS, {"prompt": []}, (400, "empty_array", "prompt", "")),
    ("61-inner", COMPLETIONS, {"prompt": [[]]}, (400, "empty_array", "prompt", "")),
    ("61-mixed", COMPLETIONS, {"prompt": ["a", [1]]}, (400, "invalid_type", "prompt", "one type")),
    ("61-mixed-flat", COMPLETIONS, {"prompt": [1, "a"]}, (400, "invalid_type", "prompt", "token ids")),
    ("61-object", COMPLETIONS, {"prompt": {"a": 1}}, (400, "invalid_type", "prompt", "but got an object")),
    ("61-bools", COMPLETIONS, {"prompt": [True]}, (400, "invalid_type", "prompt", "but got a boolean")),
    ("61-null-item", COMPLETIONS, {"prompt": [None]}, (400, "invalid_type", "prompt", "but got null")),
    *((f"62-{name}", COMPLETIONS, {"prompt": value}, (400, "invalid_value", "prompt", "not an integer in [0, 267]"))
      for name, value in (("negative", [-1]), ("vocab", [268]), ("float", [1.5]), ("integral", [1.0]),
                          ("2^40", [2**40]), ("10^400", [10**400]), ("second", [[1], [2, -1]]))),
    ("63", COMPLETIONS, {"prompt": ["a"] * 10_000}, (400, "array_above_max_length", "prompt", "maximum length 32")),
    ("64", CHAT, {"stream": "yes"}, (400, "invalid_type", "stream", "expected a boolean, but got a string")),
    ("64-int", COMPLETIONS, {"stream": 1}, (400, "invalid_type", "stream", "")),
    ("65", CHAT, {"stream_options": {"include_usage": True}},
     (400, None, "stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")),
    ("65-inner", CHAT, {"stream": True, "stream_options": {"usage": True}},
     (400, "unknown_parameter", None, "stream_options.usage")),
    ("66", CHAT, {"foo": 1}, (400, "unknown_parameter", None, "Unrecognized request argument supplied: foo")),
    ("66-null", COMPLETIONS, {"foo": None}, (400, "unknown_parameter", None, "supplied: foo")),
    ("66-message", CHAT, {"messages": [{"role": "user", "content": "hi", "mood": 1}]},
     (400, "unknown_parameter", None, "messages[0].mood")),
    ("66-part", CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "cache_control": 1}]}]},
     (400, "unknown_parameter", None, "messages[0].content.cache_control")),
    ("66-user-type", CHAT, {"user": 5}, (400, "invalid_type", "user", "expected a string")),
    *((f"67-{name}", CHAT, {name: value}, (400, "unsupported_parameter", name, f"'{name}' is not supported"))
      for name, value in (
        ("audio", {"voice": "alloy", "format": "wav"}), ("modalities", ["text", "audio"]), ("prompt_embeds", "AAAA"),
        ("chat_template", "{{ 1 }}"), ("documents", [{"text": "x"}]), ("structured_outputs", {"regex": "a"}),
        ("web_search_options", {}), ("prediction", {"type": "content"}), ("verbosity", "low"), ("functions", [{}]),
        ("function_call", "auto"), ("tool_choice", "auto"), ("session_id", "s"), ("priority", 1),
        ("priority", False), ("echo", True), ("reasoning_effort", "low"), ("kv_transfer_params", {}))),
    *((f"67-{name}", COMPLETIONS, {name: value}, (400, "unsupported_parameter", name, "")) for name, value in (
        ("suffix", "x"), ("prompt_embeds", "AAAA"),
        ("logprob_token_ids", [1]), ("thinking_token_budget", 5), ("repetition_detection", {}),
        ("spaces_between_special_tokens", False), ("vllm_xargs", {"a": 1}), ("return_prompt_text", True))),
    *((f"67-{name}", COMPLETIONS, {name: "x"}, (400, "unsupported_parameter", name, "structured_outputs"))
      for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")),
    ("67-obfuscation", CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}},
     (400, "unsupported_value", "stream_options.include_obfuscation", "")),
    ("67-prompt-logprobs", COMPLETIONS, {"stream": True, "prompt_logprobs": 1},
     (400, "invalid_parameter_combination", "prompt_logprobs", "streamed")),
    *((f"salt-{name}", path, {"cache_salt": value}, (400, code, "cache_salt", words)) for path in (COMPLETIONS, CHAT)
      for name, value, code, words in (
        ("empty", "", "invalid_value", "non-empty"), ("number", 5, "invalid_type", "expected a string"),
        ("list", ["x"], "invalid_type", "expected a string"),
        ("long", "x" * 257, "string_above_max_length", "maximum length 256, but got a string with length 257"))),
    *((f"beam-alone-{name}", COMPLETIONS, {name: value},
       (400, None, name, "only allowed when 'use_beam_search' is enabled"))
      for name, value in (("length_penalty", 2.0), ("early_stopping", True), ("early_stopping", "never"))),
    *((f"beam-{name}", COMPLETIONS, {"use_beam_search": True, "n": 2, name: value},
       (400, "invalid_parameter_combination", name, f"A beam search cannot honour '{name}': leave it out"))
      for name, value in (
        ("temperature", 0.7), ("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("frequency_penalty", 0.5),
        ("presence_penalty", 0.5), ("repetition_penalty", 1.1), ("logit_bias", {"1": 1}), ("seed", 0), ("stop", "x"),
        ("min_tokens", 1), ("allowed_token_ids", [1]), ("bad_words", ["x"]), ("logprobs", 0), ("prompt_logprobs", 0))),
    *((f"beam-{name}", CHAT, {"use_beam_search": True, name: value},
       (400, "invalid_parameter_combination", name, f"A beam search cannot honour '{name}'"))
      for name, value in (("logprobs", True), ("seed", 7))),
    ("beam-remedy", CHAT, {"use_beam_search": True, "temperature": 0.5},
     (400, "invalid_parameter_combination", "temperature", "leave it out, or send 0.0 or 1.0, or do not set")),
    ("beam-wide", COMPLETIONS, {"use_beam_search": True, "n": 17}, (400, "integer_above_max_value", "n", "<= 16")),
    ("beam-best-of", COMPLETIONS, {"use_beam_search": True, "n": 3, "best_of": 2},
     (400, None, "best_of", "at least n=3")),
    ("beam-type", COMPLETIONS, {"use_beam_search": "yes"}, (400, "invalid_type", "use_beam_search", "a boolean")),
    ("beam-penalty", COMPLETIONS, {"use_beam_search": True, "length_penalty": 10.5},
     (400, "decimal_above_max_value", "length_penalty", "<= 10")),
    ("beam-stopping", COMPLETIONS, {"use_beam_search": True, "early_stopping": "always"},
     (400, "invalid_value", "early_stopping", "expected true, false or 'never', got 'always'")),
    ("beam-stopping-type", COMPLETIONS, {"use_beam_search": True, "early_stopping": 1},
     (400, "invalid_type", "early_stopping", "a boolean or a string")),
    ("68-type", CHAT, {"tools": "x"}, (400, "invalid_type", "tools", "")),
    ("68-name", CHAT, {"tools": [tool("a b")]}, (400, "invalid_value", "tools[0].function.name", "")),
    ("68-nameless", CHAT, {"tools": [{"type": "function", "function": {}}]},
     (400, "missing_required_parameter", "tools[0].function.name", "")),
    ("68-many", CHAT, {"tools": [tool("f")] * 129}, (400, "array_above_max_length", "tools", "maximum length 128")),
    ("68-good", CHAT, {"tools": [tool("f")]}, (400, "unsupported_parameter", "tools", "")),
    ("69", CHAT, {"response_format": {"type": "json_schema"}},
     (400, "missing_required_parameter", "response_format.json_schema", "")),
    ("69-schema", CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
     (400, "unsupported_value", "response_format.type", "'json_schema' is not supported")),
    ("69-object", COMPLETIONS, {"response_format": {"type": "json_object"}},
     (400, "unsupported_value", "response_format.type", "")),
    ("69-type", CHAT, {"response_format": {"type": "xml"}}, (400, "invalid_value", "response_format.type", "'xml'")),
    ("ids-stop", CHAT, {"stop_token_ids": [268]}, (400, "invalid_value", "stop_token_ids", "[0, 267]")),
    ("ids-allowed", CHAT, {"allowed_token_ids": [-1]}, (400, "invalid_value", "allowed_token_ids", "")),
    ("ids-none-allowed", CHAT, {"allowed_token_ids": []}, (400, "empty_array", "allowed_token_ids", "")),
    ("ids-many", CHAT, {"stop_token_ids": list(range(65))}, (400, "array_above_max_length", "stop_token_ids", "")),
    ("bad-words", CHAT, {"bad_words": [""]}, (400, "invalid_value", "bad_words", "")),
    ("bad-words-long", CHAT, {"bad_words": ["q" * 100]}, (400, "string_above_max_length", "bad_words", "")),
    ("min-tokens", COMPLETIONS, {"min_tokens": 5, "max_tokens": 4}, (400, "integer_above_max_value", "min_tokens", "")),
    ("truncate-zero", COMPLETIONS, {"truncate_prompt_tokens": 0},
     (400, "integer_below_min_value", "truncate_prompt_tokens", "")),
    ("truncate-far", COMPLETIONS, {"truncate_prompt_tokens": 65},
     (400, "integer_above_max_value", "truncate_prompt_tokens", "")),
    ("truncate-side", COMPLETIONS, {"truncation_side": "left"}, (400, None, "truncation_side", "")),
    ("interval", CHAT, {"stream": True, "stream_interval": 0}, (400, "integer_below_min_value", "stream_interval", "")),
    ("request-id", CHAT, {"request_id": "a/b"}, (400, "invalid_value", "request_id", "")),
    ("continue-both", CHAT, {"continue_final_message": True, "add_generation_prompt": True},
     (400, "invalid_parameter_combination", "continue_final_message", "")),
    ("kwargs-long", CHAT, {"chat_template_kwargs": {"x" * 100_000: 1}},
     (400, "invalid_value", "chat_template_kwargs." + "x" * 64, "Invalid 'chat_template_kwargs'")),
    *((f"arguments-{depth}", CHAT, {"messages": [called('{"a":' * depth + "1" + "}" * depth)]},
       (400, "invalid_value", "messages[0].tool_calls[0].function.arguments", "at most 64 deep"))
      for depth in (65, 500, 100_000)),
    ("arguments-malformed", CHAT, {"messages": [called("[" * 100)]},
     (400, "invalid_value", "messages[0].tool_calls[0].function.arguments", "")),
    ("arguments-object", CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f",
     "arguments": {}}}]}]}, (400, "invalid_type", "messages[0].tool_calls[0].function.arguments", "expected a string")),
    ("kwargs-reserved", CHAT, {"chat_template_kwargs": {"tokenize": True}},
     (400, "invalid_value", "chat_template_kwargs.tokenize", "")),
]  # fmt: skip


def ids_of(cases: list[Any]) -> list[str]:
    return [f"{case[0]}{'c' if case[1] == CHAT else ''}" for case in cases]


@pytest.mark.parametrize(("row", "body", "expected"), BYTES, ids=ids_of(BYTES))
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(server: Any, error_of: Any, path: str, row: str, body: bytes, expected: Any):
    check(server.post(path, body), error_of, expected)
    assert not server.engine.calls


@pytest.mark.parametrize(("row", "path", "fields", "expected"), FIELDS, ids=ids_of(FIELDS))
def test_fields_that_cannot_be_served(
    refusing_server: Any, error_of: Any, row: str, path: str, fields: dict[str, Any], expected: Any
):
    check(refusing_server.post(path, bodies(path, fields)), error_of, expected)
    assert not refusing_server.engine.calls


def check(answer: httpx.Response, error_of: Callable[..., dict[str, Any]], expected: tuple) -> None:
    status, code, param, words = expected
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error"
    assert words in error["message"], error["message"]
    assert len(error["message"]) <= 1000


@pytest.fixture
def refusing_server(make_server: Any) -> Any:
    """Its template raises at "refuse me", as templates do that want roles to alternate."""
    from jaxserve.text.chat import ChatTemplate

    source = (
        "{% for m in messages %}{% if 'refuse me' in m['content'] %}{{ raise_exception('no: ' + m['content']) }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return make_server(chat_template=ChatTemplate(source, {}))


# (row, path, fields): neighbours of the above that are served.
SERVED: list[tuple[str, str, dict[str, Any]]] = [
    ("8", CHAT, {"messages": [{"role": "user", "content": "a\x00b"}]}),
    ("26-second-name", COMPLETIONS, {"model": "org/tiny"}),
    ("31-parts", CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
    ("34-fits", COMPLETIONS, {"max_tokens": 62}),
    ("36-echo", COMPLETIONS, {"max_tokens": 0, "echo": True}),
    ("38-new-name", CHAT, {"max_completion_tokens": 2}),
    ("42", CHAT, {"temperature": 0}),
    ("43", CHAT, {"temperature": 1e-30}),
    ("43-denormal", CHAT, {"temperature": 5e-324}),
    ("43-minus-zero", CHAT, {"temperature": -0.0}),
    ("41-edge", CHAT, {"temperature": 2}),
    ("44", CHAT, {"top_p": 0}),
    ("46-edges", CHAT, {"frequency_penalty": 2, "presence_penalty": -2}),
    ("47-one", CHAT, {"n": 1}),
    ("47-sixteen", CHAT, {"n": 16}),
    ("47-fan-out-edge", COMPLETIONS, {"prompt": ["a"] * 8, "n": 8}),
    ("48", CHAT, {"n": 2, "stream": True}),
    ("49-one", COMPLETIONS, {"best_of": 1, "stream": True}),
    ("49-equal", COMPLETIONS, {"n": 2, "best_of": 2, "stream": True}),
    ("49-more", COMPLETIONS, {"n": 2, "best_of": 5}),
    ("49-chat", CHAT, {"best_of": 2}),
    ("59-n", COMPLETIONS, {"n": 2, "echo": True, "logprobs": 1}),
    ("salt", CHAT, {"cache_salt": "x" * 256}),
    ("salt-null", COMPLETIONS, {"cache_salt": None}),
    ("salt-nul", COMPLETIONS, {"cache_salt": "\x00"}),
    ("beam", COMPLETIONS, {"use_beam_search": True, "n": 4, "length_penalty": 0.5, "early_stopping": "never"}),
    ("beam-neutral", CHAT, {"use_beam_search": True, "temperature": 0, "top_p": 1, "top_k": -1, "logprobs": False,
                            "frequency_penalty": 0, "logit_bias": {}, "stop": [], "repetition_penalty": 1}),
    ("beam-stream", CHAT, {"use_beam_search": True, "n": 2, "stream": True}),
    ("50-negative", CHAT, {"seed": -5}),
    ("50-edges", CHAT, {"seed": 2**63 - 1}),
    ("51-four", CHAT, {"stop": list("vwxy")}),
    ("51-null", CHAT, {"stop": None}),
    ("54-edge", CHAT, {"logit_bias": {"267": 1}}),
    ("55-edges", CHAT, {"logit_bias": {"1": 100, "2": -100}}),
    ("56", CHAT, {"logit_bias": {str(i): -100 for i in range(268)}}),
    ("57-zero", CHAT, {"top_logprobs": 0}),
    ("58-edge", CHAT, {"logprobs": True, "top_logprobs": 20}),
    ("58-completions-edge", COMPLETIONS, {"logprobs": 5}),
    ("60", COMPLETIONS, {"prompt": ""}),
    ("60-in-list", COMPLETIONS, {"prompt": ["", "a"]}),
    ("62-edge", COMPLETIONS, {"prompt": [0, 267]}),
    ("63-edge", COMPLETIONS, {"prompt": ["a"] * 32}),
    ("65-null", CHAT, {"stream_options": None}),
    ("66-ignored", CHAT, {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
                          "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True}),
    ("67-neutral", CHAT, {"modalities": ["text"], "tools": [], "tool_choice": "none", "audio": None, "priority": 0,
                          "response_format": {"type": "text"}, "verbosity": "medium", "echo": False,
                          "length_penalty": 1, "use_beam_search": False, "early_stopping": False,
                          "spaces_between_special_tokens": True}),
    ("67-neutral-suffix", COMPLETIONS, {"suffix": None, "length_penalty": 1}),
    ("bad-words", COMPLETIONS, {"bad_words": ["hello"]}),
    ("arguments", CHAT, {"messages": [called('{"a": [1, {"b": "[[[["}]}'), *USER]}),
    ("arguments-edge", CHAT, {"messages": [called('{"a":' * 64 + "1" + "}" * 64)]}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "path", "fields"), SERVED, ids=ids_of(SERVED))
def test_neighbours_that_are_served(server: Any, row: str, path: str, fields: dict[str, Any]):
    answer = server.post(path, bodies(path, fields))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")])
def test_row_4_the_bound_is_exact(opening: str, closing: str):
    """Python's own recursion limit is not the bound: it differs from version to version."""
    width = opening.count("[") + opening.count("{")
    body = f'{{"x": {opening * 21}1{closing * 21}}}'.encode()
    decode(body, max_depth=21 * width + 1)
    with pytest.raises(ApiError):
        decode(body, max_depth=21 * width)
    brackets = '{"x": "' + "[" * 500 + '"}'  # in a string they nest nothing
    assert decode(brackets.encode(), max_depth=21)


def test_row_5_the_last_of_duplicate_keys_stands(server: Any):
    answer = server.post(
        COMPLETIONS, b'{"model": "nope", "prompt": "a", "max_tokens": 9, "max_tokens": 1, "model": "tiny"}'
    )
    assert answer.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/jsonp",
     "application/json; charset=utf-16"],
)  # fmt: skip
def test_row_12_only_json_is_read(server: Any, error_of: Any, content_type: str | None):
    headers = {} if content_type is None else {"content-type": content_type}
    answer = server.request("POST", CHAT, content=b'{"model": "tiny"}', headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON ; Charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_row_12_spellings_of_json(server: Any, content_type: str):
    body = json.dumps(bodies(COMPLETIONS, {})).encode()
    assert server.request("POST", COMPLETIONS, content=body, headers={"content-type": content_type}).status_code == 200


def test_row_60_without_a_first_token(make_server: Any, error_of: Any):
    """CVE-2024-8768: an empty prompt reached the engine and ended it."""
    with_bos = make_server()
    tokenizer = with_bos.serving.tokenizer

    class NoBos:
        bos_token_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    server = make_server(tokenizer=NoBos())
    answer = server.post(COMPLETIONS, bodies(COMPLETIONS, {"prompt": ""}))
    check(answer, error_of, (400, "invalid_value", "prompt", "empty"))
    with_bos.post(COMPLETIONS, bodies(COMPLETIONS, {"prompt": ""}))
    assert with_bos.engine.calls[0][0] == (tokenizer.token_to_id("<|bos|>"),)


def test_a_model_without_a_template_says_what_to_do(make_server: Any, error_of: Any):
    answer = make_server(chat_template=None).post(CHAT, bodies(CHAT, {}))
    check(answer, error_of, (400, "unsupported_value", "messages", "--chat-template"))


def test_the_bounds_of_a_request_are_checked_before_any_work(server: Any):
    """S-05: a billion of anything costs nothing."""
    began = time.process_time()
    for fields in ({"n": 10**9}, {"best_of": 10**9}, {"logprobs": 10**9}, {"prompt": ["a"] * 10_000}):
        assert server.post(COMPLETIONS, bodies(COMPLETIONS, fields)).status_code == 400
    assert time.process_time() - began < 0.5  # of which the HTTP client takes most
