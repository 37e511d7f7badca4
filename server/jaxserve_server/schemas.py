"""What a request may hold: one msgspec Struct an endpoint, and the fields that are refused by name.

Types only; bounds and combinations are `sampling.py`'s and `prompts.py`'s. None means: not given. A field that is in
neither a Struct nor REFUSED is unknown, and refused too: no parameter is ever ignored in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

Role = Literal["system", "developer", "user", "assistant", "tool"]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object that holds these fields and no others."""


class StreamOptions(Request):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Function(Request):
    """A tool's signature."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Request):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class JsonSchema(Request):
    """`response_format.json_schema`."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Request):
    """`response_format`; only "text" is served."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None


class CalledFunction(Request):
    """What an earlier assistant turn called: `arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(Request):
    """One entry of an assistant message's `tool_calls`."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Request, omit_defaults=True):
    """One turn of a conversation, as clients send it and as SDKs send back what they received."""

    role: Role
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None


class GenerationRequest(Request):
    """What completions and chat have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    cache_salt: str | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    # Accepted, with no effect: bookkeeping of hosted services that SDKs send.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None  # no effect: there are no tool calls to be parallel


class TokenizeRequest(Request):
    """`POST /tokenize`: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Request):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int] | None = None


class ResetRequest(Request):
    """`POST /reset_prefix_cache`: nothing, or an empty object."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that we know and do not serve.

    Attributes:
        neutral: values that ask for nothing, which are accepted.
        remedy: what to do instead.
    """

    neutral: tuple[Any, ...] = (None,)
    remedy: str = ""


_GUIDED = Refused(remedy=" vLLM renamed it to 'structured_outputs', which is not supported here yet either.")
_SERVER_TEMPLATE = Refused(remedy=" Start the server with --chat-template to set the template.")
_TEXT_ONLY = Refused(remedy=" This server takes and gives text only.")

REFUSED: Final[dict[str, Refused]] = {
    "audio": _TEXT_ONLY,
    "chat_template": _SERVER_TEMPLATE,
    "documents": Refused((None, []), " Put the documents into a message."),
    "ec_transfer_params": Refused(),
    "echo": Refused((None, False), " Use /v1/completions."),
    "function_call": Refused((None, "none")),
    "functions": Refused((None, [])),
    "guided_choice": _GUIDED,
    "guided_decoding_backend": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_whitespace_pattern": _GUIDED,
    "include_reasoning": Refused((None, True)),
    "kv_transfer_params": Refused(),
    "logprob_token_ids": Refused(remedy=" Use 'logprobs' or 'top_logprobs'."),
    "media_io_kwargs": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "modalities": Refused((None, ["text"]), _TEXT_ONLY.remedy),
    "prediction": Refused(),
    "priority": Refused((None, 0), " Requests are served in order of arrival."),
    "prompt_embeds": Refused(remedy=" Send text or token ids in 'prompt'."),
    "repetition_detection": Refused(),
    "return_prompt_text": Refused((None, False), " Use 'echo' of /v1/completions, or /tokenize and /detokenize."),
    "session_id": Refused(remedy=" Sessions are not kept: send the whole conversation."),
    "spaces_between_special_tokens": Refused((None, True)),
    "structured_outputs": Refused(),
    "suffix": Refused((None, "")),
    "thinking_token_budget": Refused(),
    "tool_choice": Refused((None, "none"), " Tools are not supported yet."),
    "tools": Refused((None, []), " Tools are not supported yet."),
    "verbosity": Refused((None, "medium"), " Ask for it in a message."),
    "vllm_xargs": Refused((None, {})),
    "watermarking": Refused((None, False)),
    "web_search_options": Refused(),
}
