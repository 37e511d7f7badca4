"""From the bytes of a request to a checked Struct: strict JSON, strict types, every fault named.

Owns the mapping from msgspec's complaints to the table of errors. Knows no endpoint and no bound of a value.
"""

from __future__ import annotations

import re
from types import NoneType
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec
from starlette.requests import Request as HttpRequest

from jaxserve.types import INT64_MAX, INT64_MIN
from jaxserve_server.errors import ApiError, ErrorKind, quote
from jaxserve_server.schemas import REFUSED, Request

T = TypeVar("T", bound=Request)

# What a JSON type is called in a message.
NAMES: Final = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_AT = re.compile(r" - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_WRONG_TYPE = re.compile(r"^Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)


async def read_request(request: HttpRequest, kind: type[T], *, max_depth: int) -> T:
    """The request's body as a `kind`.

    Raises:
        ApiError: the body is not a JSON object in UTF-8, or not one of these fields and types.
    """
    check_content_type(request.headers.get("content-type"))
    return convert(decode(await request.body(), max_depth=max_depth), kind)


def check_content_type(value: str | None) -> None:
    """Raises ApiError unless `value` is application/json in UTF-8.

    A browser sends any other type across origins without asking first (S-29).
    """
    media_type, _, parameters = (value or "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w-]+)", parameters, re.IGNORECASE)
    if media_type.strip().lower() != "application/json" or (
        charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii")
    ):
        raise ApiError(ErrorKind.UNSUPPORTED_MEDIA_TYPE)


def decode(body: bytes, *, max_depth: int) -> dict[str, Any]:
    """The JSON object that `body` spells. Of duplicate keys the last one stands.

    Raises:
        ApiError: malformed, not UTF-8, NaN, a number beyond float64, a lone surrogate, nesting deeper than
            `max_depth`, or not an object.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError(ErrorKind.INVALID_JSON) from None
    # Fewer brackets than the bound cannot nest deeper than it; counting bytes is a thousand times cheaper.
    if body.count(b"[") + body.count(b"{") > max_depth and nests_deeper(value, max_depth):
        raise ApiError(ErrorKind.INVALID_JSON)
    if not isinstance(value, dict):
        raise ApiError(ErrorKind.NOT_AN_OBJECT, got=NAMES[json_type(value)])
    return value


def nests_deeper(value: Any, bound: int) -> bool:
    """Whether arrays and objects stand more than `bound` deep in `value`."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(bound):
        if not level:
            return False
        children = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in children if isinstance(item, dict | list)]
    return bool(level)


def convert(raw: dict[str, Any], kind: type[T]) -> T:
    """`raw` as a `kind`; raises ApiError for a refused or unknown field, or a wrong type."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    given = {}
    for name, value in raw.items():
        if name in fields:
            given[name] = value
            check_integer_width(name, value, fields[name])
        else:
            refuse(name, value)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as exc:
        raise explain(str(exc), kind) from None


def refuse(name: str, value: Any) -> None:
    """Raises for a field that no Struct has, unless it is a known one that asks for nothing."""
    known = REFUSED.get(name)
    if known is None:
        raise ApiError(ErrorKind.UNKNOWN_PARAMETER, name=quote(name))
    # `1 == True` in Python: a neutral 1 must not let `true` pass.
    if not any(type(value) is type(neutral) and value == neutral for neutral in known.neutral):
        raise ApiError(ErrorKind.UNSUPPORTED_PARAMETER, name, remedy=known.remedy)


def check_integer_width(name: str, value: Any, annotation: Any) -> None:
    """Raises for an int beyond 64 bits where an int belongs; a number may be as large as float64 is."""
    if type(value) is int and not INT64_MIN <= value <= INT64_MAX and annotation in (int, int | None):
        kind, bound = (
            (ErrorKind.INTEGER_ABOVE_MAX, INT64_MAX) if value > 0 else (ErrorKind.INTEGER_BELOW_MIN, INT64_MIN)
        )
        raise ApiError(kind, name, bound=bound, value=quote(value))


def explain(complaint: str, kind: type[Request]) -> ApiError:
    """msgspec's complaint about a `kind` as an error of the table."""
    at = _AT.search(complaint)
    path = at["path"].replace("[...]", "") if at else ""
    reason = complaint[: at.start()] if at else complaint
    if match := _WRONG_TYPE.match(reason):
        expected = " or ".join(NAMES[name] for name in match["expected"].split(" | ") if name != "null")
        got = "a decimal number" if match["got"] == "float" else NAMES[match["got"]]
        return ApiError(ErrorKind.INVALID_TYPE, path, expected=expected, got=got)
    if match := _MISSING.match(reason):
        return ApiError(ErrorKind.MISSING_PARAMETER, f"{path}.{match['name']}")
    if match := _UNKNOWN.match(reason):
        return ApiError(ErrorKind.UNKNOWN_PARAMETER, name=f"{path}.{quote(match['name'])}")
    if reason.startswith("Number out of range"):
        return ApiError(ErrorKind.DECIMAL_ABOVE_MAX, path, bound="1.8e308", value="a larger one")
    if reason.startswith("Invalid enum value"):
        choices = ", ".join(f"'{choice}'" for choice in choices_at(kind, path))
        value = quote(reason.removeprefix("Invalid enum value "))
        return ApiError(ErrorKind.INVALID_CHOICE, path, value=value, choices=choices)
    return ApiError(ErrorKind.INVALID_VALUE, path, reason="it does not have the form that is expected.")


def choices_at(kind: type[Request], path: str) -> tuple[str, ...]:
    """The values that the Literal at `path`, such as `messages[0].role`, allows."""
    annotation: Any = kind
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        annotation = {field.name: field.type for field in msgspec.structs.fields(annotation)}[name]
        while not isinstance(annotation, type) and get_origin(annotation) is not Literal:
            annotation = next(arg for arg in get_args(annotation) if arg is not NoneType)
        if get_origin(annotation) is list:
            (annotation,) = get_args(annotation)
    return get_args(annotation)


def json_type(value: Any) -> str:
    """The key of NAMES for a decoded JSON value."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "array"
    return "object" if isinstance(value, dict) else type(value).__name__
