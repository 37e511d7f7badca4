"""From a request's `prompt` or `messages` to token ids that fit the model's context.

Owns the forms of `prompt`, the checks of messages, truncation and the context's bound. Long text is tokenised
on a worker thread, so that open streams do not stall.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from jaxserve.text.chat import ChatOptions, encode_chat
from jaxserve_server.body import NAMES, json_type, nests_deeper
from jaxserve_server.errors import ApiError, ErrorKind, context_length_error, quote
from jaxserve_server.sampling import check_fan_out
from jaxserve_server.schemas import ChatRequest, CompletionRequest, GenerationRequest, Message, TokenizeRequest
from jaxserve_server.serving import Serving

T = TypeVar("T")
MAX_ARGUMENTS_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """One input of the engine.

    Attributes:
        text: what the client sent, or None where it sent token ids or messages.
    """

    token_ids: tuple[int, ...]
    text: str | None = None


async def completion_prompts(request: CompletionRequest, serving: Serving) -> list[Prompt]:
    """The prompts of a completion request.

    Raises:
        ApiError: no prompt, a wrong form, an id outside of the vocabulary, or too many prompts or continuations.
    """
    given = request.prompt
    if given is None:
        raise ApiError(ErrorKind.MISSING_PARAMETER, "prompt")
    if not isinstance(given, str | list):
        expected = "a string, an array of strings, an array of token ids or an array of such arrays"
        raise ApiError(ErrorKind.INVALID_TYPE, "prompt", expected=expected, got=NAMES[json_type(given)])
    if given == []:
        raise ApiError(ErrorKind.EMPTY_ARRAY, "prompt")
    if isinstance(given, list) and not isinstance(given[0], str | list):
        return [Prompt(checked_ids(given, serving.model_config.vocab_size, "prompt"))]
    items = given if isinstance(given, list) else [given]
    if len(items) > serving.limits.max_prompts:
        raise ApiError(ErrorKind.ARRAY_ABOVE_MAX, "prompt", bound=serving.limits.max_prompts, value=len(items))
    check_fan_out(len(items), request, serving.limits)
    if len({type(item) for item in items}) > 1:
        raise ApiError(ErrorKind.INVALID_TYPE, "prompt", expected="an array of one type", got="an array of several")
    if isinstance(items[0], list):
        return [Prompt(checked_ids(item, serving.model_config.vocab_size, "prompt")) for item in items]
    special = request.add_special_tokens is not False
    tokenizer = serving.tokenizer
    size = sum(len(text) for text in items)
    rows = await off_loop(size, serving, lambda: tokenizer.encode_batch(items, add_special_tokens=special))
    return [Prompt(tuple(row or [beginning_of_sequence(serving)]), text) for row, text in zip(rows, items, strict=True)]


def beginning_of_sequence(serving: Serving) -> int:
    """What an empty prompt becomes: the model's first token; raises ApiError where it has none."""
    bos = serving.tokenizer.bos_token_id
    bos = serving.model_config.bos_token_id if bos is None else bos
    if bos is None:
        reason = "it is empty, and this model has no beginning-of-sequence token to start from."
        raise ApiError(ErrorKind.INVALID_VALUE, "prompt", reason=reason)
    return bos


def checked_ids(items: Sequence[Any], vocab_size: int, param: str) -> tuple[int, ...]:
    """`items` as token ids; raises ApiError for anything but integers in the vocabulary."""
    if not items:
        raise ApiError(ErrorKind.EMPTY_ARRAY, param)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float):
            raise ApiError(ErrorKind.INVALID_TYPE, param, expected="token ids", got=NAMES[json_type(item)])
        if isinstance(item, float) or not 0 <= item < vocab_size:
            reason = f"token id {quote(item)} is not an integer in [0, {vocab_size - 1}]."
            raise ApiError(ErrorKind.INVALID_VALUE, param, reason=reason)
    return tuple(items)


async def chat_prompt(request: ChatRequest | TokenizeRequest, serving: Serving) -> Prompt:
    """The conversation as token ids, by the model's chat template.

    Raises:
        ApiError: no messages, a message that no template could render, or options that contradict each other.
        RequestError: the template refused them.
    """
    messages = checked_messages(request.messages, serving.limits.max_messages)
    add_generation_prompt = request.add_generation_prompt
    if request.continue_final_message:
        if add_generation_prompt:
            reason = "'continue_final_message' and 'add_generation_prompt' cannot both be true."
            raise ApiError(ErrorKind.INVALID_COMBINATION, "continue_final_message", reason=reason)
        add_generation_prompt = False
    options = ChatOptions(
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=template_kwargs(request, serving),
    )
    size = sum(len(str(message.get("content"))) for message in messages)
    ids = await off_loop(
        size,
        serving,
        lambda: encode_chat(
            serving.tokenizer,
            serving.chat_template,
            messages,
            options,
            add_special_tokens=bool(request.add_special_tokens),
        ),
    )
    if not ids:
        raise ApiError(ErrorKind.INVALID_PROMPT, "messages")
    return Prompt(tuple(ids))


def template_kwargs(request: ChatRequest | TokenizeRequest, serving: Serving) -> dict[str, Any]:
    """The request's values for the template's variables; `reasoning_effort` is one where the template reads it."""
    kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        if serving.chat_template is not None and "reasoning_effort" not in serving.chat_template.variables:
            remedy = " This model's chat template does not read it."
            raise ApiError(ErrorKind.UNSUPPORTED_PARAMETER, "reasoning_effort", remedy=remedy)
        kwargs["reasoning_effort"] = request.reasoning_effort
    return kwargs


def checked_messages(messages: list[Message] | None, bound: int) -> list[dict[str, Any]]:
    """The messages as a template reads them."""
    if messages is None:
        raise ApiError(ErrorKind.MISSING_PARAMETER, "messages")
    if not messages:
        raise ApiError(ErrorKind.EMPTY_ARRAY, "messages")
    if len(messages) > bound:
        raise ApiError(ErrorKind.ARRAY_ABOVE_MAX, "messages", bound=bound, value=len(messages))
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: Message, at: str) -> dict[str, Any]:
    """`message` without what is absent; its content and its role are the template layer's to check."""
    for name in ("audio", "function_call", "refusal"):
        if getattr(message, name) is not None:
            raise ApiError(ErrorKind.UNSUPPORTED_PARAMETER, f"{at}.{name}", remedy="")
    for part in message.content if isinstance(message.content, list) else ():
        extra = sorted(part.keys() - {"type", "text"}) if isinstance(part, dict) and part.get("type") == "text" else ()
        if extra:
            raise ApiError(ErrorKind.UNKNOWN_PARAMETER, name=f"{at}.content.{quote(extra[0])}")
    for index, call in enumerate(message.tool_calls or ()):
        if nests_too_deep(call.function.arguments):
            reason = f"expected a JSON object in a string, nested at most {MAX_ARGUMENTS_DEPTH} deep."
            raise ApiError(ErrorKind.INVALID_VALUE, f"{at}.tool_calls[{index}].function.arguments", reason=reason)
    turn = msgspec.to_builtins(message)
    turn.pop("annotations", None)  # of a reply that comes back: where it cited from, nothing for a template
    return turn


def nests_too_deep(spelled: str) -> bool:
    """Whether arguments that a template may walk through nest deeper than it, and Python, can follow."""
    if spelled.count("[") + spelled.count("{") <= MAX_ARGUMENTS_DEPTH:
        return False
    try:
        return nests_deeper(msgspec.json.decode(spelled), MAX_ARGUMENTS_DEPTH)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True


async def off_loop(size: int, serving: Serving, work: Callable[[], T]) -> T:
    """`work()`, on a worker thread when the text it reads, of `size` characters, is long."""
    if size <= serving.limits.inline_text_chars:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


def fit(prompt: Prompt, request: GenerationRequest, serving: Serving, max_tokens: int | None, *, what: str) -> Prompt:
    """`prompt`, truncated if the request asks for it.

    Raises:
        ApiError: it, or it and `max_tokens`, exceeds the context.
    """
    limit, ids, keep = serving.max_model_len, prompt.token_ids, request.truncate_prompt_tokens
    if keep is not None:
        keep = max(1, limit - (max_tokens if max_tokens is not None else 1)) if keep == -1 else keep
        ids = ids[:keep] if request.truncation_side == "right" else ids[-keep:]
    if len(ids) > limit:
        raise context_length_error(limit, len(ids), None, what=what)
    wanted = 1 if max_tokens is None else max_tokens
    if len(ids) + wanted > limit:
        raise context_length_error(limit, len(ids), wanted, what=what)
    return prompt if ids is prompt.token_ids else Prompt(ids)
