"""From a typed request to the engine's parameters: bounds, combinations, and what is valid but not served.

Knows the two generation endpoints' rules; must not know how a request runs. What SamplingParams checks itself is
left to it: its errors carry OpenAI's codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jaxserve.checks import check_cache_salt
from jaxserve.results import ranked_params
from jaxserve.text.bad_words import resolve_bad_words
from jaxserve.types import MAX_LOGPROBS, MAX_STOP_STRING_CHARS, BeamSearchParams, SamplingParams
from jaxserve_server.beams import beam_params, check_beam_search
from jaxserve_server.errors import ApiError, ErrorKind, quote
from jaxserve_server.schemas import ChatRequest, CompletionRequest, GenerationRequest
from jaxserve_server.serving import Limits, Serving

DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's and vLLM's default of /v1/completions
SIMPLE_FIELDS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
)


def check_common(request: GenerationRequest, serving: Serving) -> None:
    """Raises ApiError for what neither endpoint takes, besides bounds that SamplingParams knows."""
    check_model(request.model, serving, required=True)
    check_counts(request, serving.limits)
    check_beam_search(request)
    check_cache_salt(request.cache_salt)
    check_stop(request.stop, serving.limits.max_stop)
    check_token_ids(request, serving.model_config.vocab_size)
    check_stream(request)
    check_response_format(request)
    check_range("max_tokens", request.max_tokens, None, serving.max_model_len)
    check_range("truncate_prompt_tokens", request.truncate_prompt_tokens, -1, serving.max_model_len)
    if request.truncate_prompt_tokens == 0:
        raise ApiError(ErrorKind.INTEGER_BELOW_MIN, "truncate_prompt_tokens", bound=1, value=0)
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise ApiError(ErrorKind.NEEDS_ANOTHER, "truncation_side", condition="'truncate_prompt_tokens' is given")
    if request.request_id is not None and not is_plain_id(request.request_id):
        reason = "expected 1 to 128 letters, digits, '.', '_' or '-'."
        raise ApiError(ErrorKind.INVALID_VALUE, "request_id", reason=reason)


def check_model(name: str | None, serving: Serving, *, required: bool) -> None:
    """Raises ApiError unless `name` is one that is served: an exact match, never a path."""
    if name is None:
        if required:
            raise ApiError(ErrorKind.MISSING_MODEL, "model")
    elif name not in serving.model_names:
        raise ApiError(ErrorKind.MODEL_NOT_FOUND, "model", model=quote(name))


def check_counts(request: GenerationRequest, limits: Limits) -> None:
    """Raises for `n` and `best_of`: out of bounds, or at odds with each other or with `stream`."""
    bound = limits.max_beam_width if request.use_beam_search else limits.max_n
    check_range("n", request.n, 1, bound)
    check_range("best_of", request.best_of, 1, bound)
    n, best_of = request.n or 1, request.best_of
    if best_of is not None and best_of < n:
        raise ApiError(ErrorKind.CONTRADICTION, "best_of", reason=f"'best_of' must be at least n={n}, got {best_of}.")
    if best_of is not None and best_of > n and request.stream:
        reason = f"'best_of' above n={n} cannot be streamed: which are the best is known at the end."
        raise ApiError(ErrorKind.CONTRADICTION, "best_of", reason=reason)


def check_fan_out(num_prompts: int, request: GenerationRequest, limits: Limits) -> None:
    """Raises for more continuations than one request may have: each takes a row (CVE-2026-34756, CVE-2026-73559)."""
    name = "n" if request.best_of is None else "best_of"
    each = getattr(request, name) or 1
    if num_prompts * each > limits.max_sequences:
        reason = (
            f"{num_prompts} prompts with {name}={each} make {num_prompts * each} continuations, and one request may "
            f"have at most {limits.max_sequences}. Send fewer prompts, or a smaller '{name}'."
        )
        raise ApiError(ErrorKind.INVALID_COMBINATION, name, reason=reason)


def check_stop(stop: str | list[str] | None, max_items: int) -> None:
    items = [stop] if isinstance(stop, str) else stop or []
    if len(items) > max_items:
        raise ApiError(ErrorKind.ARRAY_ABOVE_MAX, "stop", bound=max_items, value=len(items))
    for text in items:
        if not text:
            raise ApiError(ErrorKind.INVALID_VALUE, "stop", reason="a stop string must not be empty.")
        if len(text) > MAX_STOP_STRING_CHARS:
            raise ApiError(ErrorKind.STRING_ABOVE_MAX, "stop", bound=MAX_STOP_STRING_CHARS, value=len(text))


def check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    """Raises for ids outside of the vocabulary, which must never reach the device (it would clamp them)."""
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token_id in getattr(request, name) or ():
            if not 0 <= token_id < vocab_size:
                reason = f"token id {quote(token_id)} is not in [0, {vocab_size - 1}]."
                raise ApiError(ErrorKind.INVALID_VALUE, name, reason=reason)


def logit_bias(given: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    """`logit_bias` with its keys as token ids; raises ApiError in OpenAI's words for a key that is none."""
    biases = {}
    for key, bias in (given or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 19):
            remedy = "You should only be submitting non-negative integers."
            raise ApiError(ErrorKind.INVALID_LOGIT_BIAS_KEY, "logit_bias", key=quote(key), remedy=remedy)
        if int(key) >= vocab_size:
            remedy = f"Maximum value is {vocab_size - 1}."
            raise ApiError(ErrorKind.INVALID_LOGIT_BIAS_KEY, "logit_bias", key=key, remedy=remedy)
        biases[int(key)] = bias
    return biases


def check_stream(request: GenerationRequest) -> None:
    if request.stream_options is not None:
        if not request.stream:
            raise ApiError(ErrorKind.NEEDS_ANOTHER, "stream_options", condition="'stream' is enabled")
        if request.stream_options.include_obfuscation:
            reason = "obfuscation of the stream is not supported: send false."
            raise ApiError(ErrorKind.UNSUPPORTED_VALUE, "stream_options.include_obfuscation", reason=reason)
    check_range("stream_interval", request.stream_interval, 1, None)
    if request.prompt_logprobs is not None and request.stream:
        reason = "'prompt_logprobs' cannot be streamed: set 'stream' to false."
        raise ApiError(ErrorKind.INVALID_COMBINATION, "prompt_logprobs", reason=reason)


def check_response_format(request: GenerationRequest) -> None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise ApiError(ErrorKind.MISSING_PARAMETER, "response_format.json_schema")
    if wanted.type == "json_schema" and wanted.json_schema and wanted.json_schema.schema is None:
        raise ApiError(ErrorKind.MISSING_PARAMETER, "response_format.json_schema.schema")
    reason = f"'{wanted.type}' is not supported yet. Supported values are: 'text'."
    raise ApiError(ErrorKind.UNSUPPORTED_VALUE, "response_format.type", reason=reason)


def check_range(name: str, value: int | None, low: int | None, high: int | None) -> None:
    """Raises ApiError unless `value` is None or in [low, high]; a bound of None is no bound."""
    if value is not None and low is not None and value < low:
        raise ApiError(ErrorKind.INTEGER_BELOW_MIN, name, bound=low, value=value)
    if value is not None and high is not None and value > high:
        raise ApiError(ErrorKind.INTEGER_ABOVE_MAX, name, bound=high, value=value)


def is_plain_id(text: str) -> bool:
    return 0 < len(text) <= 128 and text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").isalnum()


def check_completion(request: CompletionRequest, serving: Serving) -> None:
    """Raises ApiError for what only /v1/completions checks."""
    check_common(request, serving)
    check_range("logprobs", request.logprobs, 0, serving.limits.max_completion_logprobs)
    if not (request.echo and request.max_tokens == 0):
        check_range("max_tokens", request.max_tokens, 1, None)


def check_chat(request: ChatRequest, serving: Serving) -> None:
    """Raises ApiError for what only /v1/chat/completions checks."""
    check_common(request, serving)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        reason = "Give 'max_completion_tokens' or the older 'max_tokens', not both."
        raise ApiError(ErrorKind.INVALID_COMBINATION, "max_tokens", reason=reason)
    for name in ("max_tokens", "max_completion_tokens"):
        check_range(name, getattr(request, name), 1, serving.max_model_len)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(ErrorKind.NEEDS_ANOTHER, "top_logprobs", condition="'logprobs' is enabled")
    check_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    if request.tools:
        if len(request.tools) > serving.limits.max_tools:
            bound, length = serving.limits.max_tools, len(request.tools)
            raise ApiError(ErrorKind.ARRAY_ABOVE_MAX, "tools", bound=bound, value=length)
        raise ApiError(ErrorKind.UNSUPPORTED_PARAMETER, "tools", remedy=" Tools are not supported yet.")


def completion_params(
    request: CompletionRequest, serving: Serving, *, max_tokens: int
) -> SamplingParams | BeamSearchParams:
    """What the engine is asked; with `echo` the prompt's logprobs come along with the completion's."""
    if request.use_beam_search:
        return beam_params(request, max_tokens=max_tokens)
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    return _params(request, serving, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs)


def chat_params(request: ChatRequest, serving: Serving, *, max_tokens: int) -> SamplingParams | BeamSearchParams:
    """What the engine is asked."""
    if request.use_beam_search:
        return beam_params(request, max_tokens=max_tokens)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, serving, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=request.prompt_logprobs)


def _params(request: GenerationRequest, serving: Serving, **fixed: Any) -> SamplingParams:
    """Raises ParameterError for what SamplingParams refuses."""
    given = {name: value for name in SIMPLE_FIELDS if (value := getattr(request, name)) is not None}
    defaults = {name: value for name, value in serving.default_sampling.items() if name in SIMPLE_FIELDS}
    params = SamplingParams(
        **{**defaults, **given},
        **fixed,
        n=request.n or 1,
        best_of=request.best_of,
        logit_bias=logit_bias(request.logit_bias, serving.model_config.vocab_size),
        bad_words_token_ids=resolve_bad_words(serving.tokenizer, request.bad_words or ()),
    )
    return ranked_params(params)
