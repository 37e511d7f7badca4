"""A chat's messages, checked and brought into the shape that templates expect.

Owns roles, content parts and the fields' names. Must not know templates' syntax or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.checks import check_length
from jaxserve.errors import ParameterError

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096  # templates may take a time that is quadratic in their number
# Names that this code or OpenAI gives to fields: never a client's text.
FIELD_NAMES = frozenset(
    (
        *("role", "content", "name", "type", "text", "id", "reasoning_content", "reasoning", "thinking"),
        *("tool_calls", "tool_call_id", "function", "arguments", "parameters", "properties", "required"),
        "description",
    )
)
# A message's reasoning comes under several names; templates read the first, or gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages: content as one string, no field that is None, arguments as objects.

    Raises:
        ParameterError: no messages, too many, a role that is not one of `ROLES`, or content of another
            kind than text.
    """
    if not messages:
        raise ParameterError(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            param="messages",
            code="empty_array",
        )
    check_length("messages", messages, MAX_MESSAGES)
    return [_normalize(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalize(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _invalid(where, f"expected an object, but got {type(message).__name__} instead.", "invalid_type")
    normal = {str(key): value for key, value in message.items() if value is not None}
    role = normal.get("role")
    if role not in ROLES:
        supported = ", ".join(f"'{name}'" for name in ROLES)
        raise _invalid(f"{where}.role", f"{str(role)[:64]!r}. Supported values are: {supported}.")
    if "content" in normal:
        normal["content"] = _text(normal["content"], f"{where}.content")
    elif role != "assistant" or not normal.get("tool_calls"):
        raise _invalid(f"{where}.content", f"a message of the role '{role}' must have content, but got null.")
    if normal.get("tool_calls"):
        normal["tool_calls"] = _tool_calls(normal["tool_calls"], f"{where}.tool_calls")
    reasoning = next((normal[name] for name in _REASONING if name in normal), None)
    return normal if reasoning is None else {"thinking": reasoning, **normal, "reasoning_content": reasoning}


def _text(content: Any, where: str) -> str:
    """One string; parts are joined by a newline, as vLLM does for templates that know no parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise _invalid(where, f"expected a string or an array of parts, but got {type(content).__name__}.")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _invalid(where, f"this model takes parts of the type 'text' only, but got {str(kind)[:64]!r}.")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Arguments come as JSON text; templates print them as objects."""
    if not isinstance(calls, list | tuple):
        raise _invalid(where, f"expected an array, but got {type(calls).__name__}.")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}
        parsed.append(call)
    return parsed


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _invalid(param: str, reason: str, code: str = "invalid_value") -> ParameterError:
    return ParameterError(f"Invalid value for '{param}': {reason}", param=param, code=code)
