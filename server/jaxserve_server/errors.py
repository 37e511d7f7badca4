"""The one table of HTTP errors: status, type, code and message template of everything that can go wrong.

Every body is OpenAI's `{"error": {"message", "type", "param", "code"}}`. Owns how jaxserve's exceptions
become HTTP; must not know any endpoint. A message is a template of this table or the message of one of
jaxserve's own request errors, never the text of a foreign exception, so no path, address or traceback
can reach a client. `docs/errors.md` is generated from this table (`errors_doc.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final

import msgspec
from starlette.responses import Response

from jaxserve.errors import (
    ContextLengthError,
    DrainingError,
    JaxserveError,
    KVBudgetError,
    NumericalError,
    ParameterError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    UnavailableError,
)

INVALID_REQUEST: Final = "invalid_request_error"
SERVER_ERROR: Final = "server_error"
RATE_LIMIT: Final = "requests"
MAX_ECHO_CHARS: Final = 64  # of a client's own value, quoted back in a message
MAX_PARAM_CHARS: Final = 128  # a name inside of `param` may be the client's
MAX_MESSAGE_CHARS: Final = 1000
DEFAULT_RETRY_AFTER_S: Final = 1


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One row of the table.

    Attributes:
        template: the message, with `{param}` and the fields that the raiser gives.
        retry_after_s: seconds for a Retry-After header, or None for no such header.
        headers: further headers that go with the status.
        close: the connection is closed after the answer.
    """

    status: int
    code: str | None
    template: str
    type: str = INVALID_REQUEST
    retry_after_s: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False


_BEARER = (("www-authenticate", "Bearer"),)
_LONG = "This model's maximum context length is {limit} tokens. However, "


@unique
class ErrorKind(Enum):
    """Every error that the server can answer with; the value is its row."""

    # The body as a whole.
    INVALID_JSON = ErrorRow(
        400,
        None,
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
        "library correctly. The server expects a JSON payload in UTF-8, but what was sent was not valid JSON.)",
    )
    NOT_AN_OBJECT = ErrorRow(400, None, "Invalid body: it must be a JSON object, but got {got} instead.")
    UNSUPPORTED_MEDIA_TYPE = ErrorRow(
        415,
        "unsupported_media_type",
        "Unsupported content type. This API method only accepts 'application/json' requests in UTF-8: set the "
        "'Content-Type: application/json' header.",
    )
    UNSUPPORTED_ENCODING = ErrorRow(
        415, "unsupported_content_encoding", "Unsupported Content-Encoding: send the body uncompressed."
    )
    REQUEST_TOO_LARGE = ErrorRow(
        413, "request_too_large", "The request's body is larger than the maximum of {limit} bytes.", close=True
    )
    REQUEST_TIMEOUT = ErrorRow(408, "request_timeout", "The request's body did not arrive in time.", close=True)
    AMBIGUOUS_FRAMING = ErrorRow(
        400, None, "A request must not have both Content-Length and Transfer-Encoding.", close=True
    )
    BAD_HTTP = ErrorRow(400, None, "The HTTP request is malformed.", close=True)
    INVALID_HOST = ErrorRow(421, "invalid_host", "This server does not answer for the host that the request names.")

    # Where it went, and who sent it.
    UNKNOWN_URL = ErrorRow(404, None, "Invalid URL ({method} {path})")
    METHOD_NOT_ALLOWED = ErrorRow(405, None, "Not allowed to {method} on {path} (HINT: Perhaps you meant {allowed}.)")
    MISSING_API_KEY = ErrorRow(
        401,
        None,
        "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
        "auth (i.e. Authorization: Bearer YOUR_KEY).",
        headers=_BEARER,
    )
    INVALID_API_KEY = ErrorRow(401, "invalid_api_key", "Incorrect API key provided.", headers=_BEARER)
    INSUFFICIENT_PERMISSIONS = ErrorRow(
        403, "insufficient_permissions", "You have insufficient permissions for this operation."
    )
    MISSING_MODEL = ErrorRow(400, None, "you must provide a model parameter")
    MODEL_NOT_FOUND = ErrorRow(
        404, "model_not_found", "The model '{model}' does not exist or you do not have access to it."
    )

    # One parameter.
    UNKNOWN_PARAMETER = ErrorRow(400, "unknown_parameter", "Unrecognized request argument supplied: {name}")
    MISSING_PARAMETER = ErrorRow(400, "missing_required_parameter", "Missing required parameter: '{param}'.")
    INVALID_TYPE = ErrorRow(
        400, "invalid_type", "Invalid type for '{param}': expected {expected}, but got {got} instead."
    )
    INVALID_VALUE = ErrorRow(400, "invalid_value", "Invalid value for '{param}': {reason}")
    INVALID_CHOICE = ErrorRow(400, "invalid_value", "Invalid value: {value}. Supported values are: {choices}.")
    INVALID_PROMPT = ErrorRow(
        400,
        "invalid_prompt",
        "The model's chat template does not accept these messages. Many templates ask that the roles alternate "
        "between user and assistant, and that at most one system message stands first.",
    )
    EMPTY_ARRAY = ErrorRow(
        400,
        "empty_array",
        "Invalid '{param}': empty array. Expected an array with minimum length 1, but got an empty array instead.",
    )
    ARRAY_ABOVE_MAX = ErrorRow(
        400,
        "array_above_max_length",
        "Invalid '{param}': array too long. Expected an array with maximum length {bound}, but got an array with "
        "length {value} instead.",
    )
    STRING_ABOVE_MAX = ErrorRow(
        400,
        "string_above_max_length",
        "Invalid '{param}': string too long. Expected a string with maximum length {bound}, but got a string with "
        "length {value} instead.",
    )
    INTEGER_BELOW_MIN = ErrorRow(
        400,
        "integer_below_min_value",
        "Invalid '{param}': integer below minimum value. Expected a value >= {bound}, but got {value} instead.",
    )
    INTEGER_ABOVE_MAX = ErrorRow(
        400,
        "integer_above_max_value",
        "Invalid '{param}': integer above maximum value. Expected a value <= {bound}, but got {value} instead.",
    )
    DECIMAL_BELOW_MIN = ErrorRow(
        400,
        "decimal_below_min_value",
        "Invalid '{param}': decimal below minimum value. Expected a value >= {bound}, but got {value} instead.",
    )
    DECIMAL_ABOVE_MAX = ErrorRow(
        400,
        "decimal_above_max_value",
        "Invalid '{param}': decimal above maximum value. Expected a value <= {bound}, but got {value} instead.",
    )
    INVALID_LOGIT_BIAS_KEY = ErrorRow(400, None, "Invalid key in 'logit_bias': {key}. {remedy}")
    INVALID_COMBINATION = ErrorRow(400, "invalid_parameter_combination", "{reason}")
    CONTRADICTION = ErrorRow(400, None, "{reason}")
    NEEDS_ANOTHER = ErrorRow(400, None, "The '{param}' parameter is only allowed when {condition}.")
    UNSUPPORTED_PARAMETER = ErrorRow(
        400, "unsupported_parameter", "Unsupported parameter: '{param}' is not supported by this server.{remedy}"
    )
    UNSUPPORTED_VALUE = ErrorRow(400, "unsupported_value", "Unsupported value for '{param}': {reason}")

    # Size against the model and the pool.
    CONTEXT_LENGTH = ErrorRow(
        400,
        "context_length_exceeded",
        _LONG + "your {what} resulted in {prompt} tokens. Please reduce the length of the {what}.",
    )
    CONTEXT_LENGTH_WITH_OUTPUT = ErrorRow(
        400,
        "context_length_exceeded",
        _LONG + "you requested {total} tokens ({prompt} in the {what}, {output} in the completion). Please reduce "
        "the length of the {what} or completion.",
    )
    KV_BUDGET = ErrorRow(
        400,
        "kv_budget_exceeded",
        "The request can never fit this server's KV cache. Make the prompt or max_tokens less, or the beams fewer.",
    )

    # Not now.
    RATE_LIMIT_EXCEEDED = ErrorRow(
        429, "rate_limit_exceeded", "Rate limit reached. Please try again later.", RATE_LIMIT, DEFAULT_RETRY_AFTER_S
    )
    SERVER_OVERLOADED = ErrorRow(
        503,
        "server_overloaded",
        "The server is overloaded: its queue is full. Please retry your request later.",
        SERVER_ERROR,
        DEFAULT_RETRY_AFTER_S,
    )
    SERVER_STARTING = ErrorRow(
        503,
        "server_starting",
        "The server is starting and not ready yet. Please retry your request later.",
        SERVER_ERROR,
        DEFAULT_RETRY_AFTER_S,
    )
    SERVER_DRAINING = ErrorRow(
        503,
        "server_draining",
        "The server is shutting down and takes no more work. Please retry your request on another server.",
        SERVER_ERROR,
        DEFAULT_RETRY_AFTER_S,
        close=True,
    )
    QUEUE_TIMEOUT = ErrorRow(
        503,
        "queue_timeout",
        "The request waited too long in the queue. Please retry your request later.",
        SERVER_ERROR,
        DEFAULT_RETRY_AFTER_S,
    )

    # Our fault.
    NUMERICAL_ERROR = ErrorRow(
        500, "internal_error", "The model produced invalid numbers for this request.", SERVER_ERROR
    )
    INTERNAL_ERROR = ErrorRow(
        500, "internal_error", "The server had an error while processing your request. Sorry about that!", SERVER_ERROR
    )


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        kind: its row of the table.
        message: what the client reads.
        param: the request's parameter at fault, such as `messages[0].role`, or None.
        retry_after_s: seconds for Retry-After, or None.
        headers: headers that this answer needs besides its row's, such as Allow.
    """

    def __init__(
        self,
        kind: ErrorKind,
        param: str | None = None,
        *,
        message: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: object,
    ) -> None:
        """`fields` fill the row's template, unless `message`, a text of jaxserve's own, takes its place."""
        row = kind.value
        self.kind = kind
        self.param = param if param is None else param[:MAX_PARAM_CHARS]
        self.message = (message or row.template.format(param=self.param, **fields))[:MAX_MESSAGE_CHARS]
        self.retry_after_s = row.retry_after_s if retry_after_s is None else max(1, retry_after_s)
        self.headers = dict(headers or {})
        super().__init__(self.message)

    @property
    def status(self) -> int:
        return self.kind.value.status

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        row = self.kind.value
        return {"error": {"message": self.message, "type": row.type, "param": self.param, "code": row.code}}


def quote(value: object) -> str:
    """A client's own value as it may stand in a message: at most 64 characters of it."""
    text = str(value)
    return text if len(text) <= MAX_ECHO_CHARS else text[:MAX_ECHO_CHARS] + "…"


def error_response(err: ApiError) -> Response:
    """`err` as an HTTP answer, with the headers that its row asks for."""
    row = err.kind.value
    headers = {**dict(row.headers), **err.headers}
    if err.retry_after_s is not None:
        headers["retry-after"] = str(err.retry_after_s)
    if row.close:
        headers["connection"] = "close"
    return Response(msgspec.json.encode(err.body()), row.status, headers, media_type="application/json")


def error_event(err: ApiError) -> bytes:
    """`err` as the last event of a stream that has begun; no `[DONE]` follows it."""
    return b"data: " + msgspec.json.encode(err.body()) + b"\n\n"


def from_exception(exc: BaseException, *, what: str = "prompt") -> ApiError:
    """The answer to an exception; anything that is not jaxserve's own is an internal error without details.

    Args:
        what: how the request spells its input, "prompt" or "messages"; used by context-length errors.
    """
    match exc:
        case ApiError():
            return exc
        case ContextLengthError():
            return context_length_error(exc.max_model_len, exc.num_prompt_tokens, exc.max_tokens, what=what)
        case KVBudgetError():
            return ApiError(ErrorKind.KV_BUDGET, what)
        case ParameterError():
            kind = kind_of_code(exc.code)
            return ApiError(kind, exc.param, message=str(exc) if kind is not ErrorKind.INVALID_PROMPT else None)
        case RequestError():
            return ApiError(ErrorKind.INVALID_VALUE, exc.param, message=str(exc))
        case QueueFullError():
            return ApiError(ErrorKind.SERVER_OVERLOADED, retry_after_s=exc.retry_after_s)
        case QueueTimeoutError():
            return ApiError(ErrorKind.QUEUE_TIMEOUT, retry_after_s=exc.retry_after_s)
        case DrainingError():
            return ApiError(ErrorKind.SERVER_DRAINING, retry_after_s=exc.retry_after_s)
        case UnavailableError():
            return ApiError(ErrorKind.SERVER_OVERLOADED, retry_after_s=exc.retry_after_s)
        case NumericalError():
            return ApiError(ErrorKind.NUMERICAL_ERROR)
        case JaxserveError() | _:
            return ApiError(ErrorKind.INTERNAL_ERROR)


def context_length_error(limit: int, prompt: int, output: int | None, *, what: str) -> ApiError:
    """The answer to `prompt` (+ `output`) tokens that pass the context of `limit` tokens."""
    if output is None:
        return ApiError(ErrorKind.CONTEXT_LENGTH, what, what=what, limit=limit, prompt=prompt)
    return ApiError(
        ErrorKind.CONTEXT_LENGTH_WITH_OUTPUT,
        what,
        what=what,
        limit=limit,
        prompt=prompt,
        output=output,
        total=prompt + output,
    )


def kind_of_code(code: str) -> ErrorKind:
    """The 400 row with this code; INVALID_VALUE for a code that the table does not have."""
    for kind in ErrorKind:
        if kind.value.code == code and kind.value.status == 400:
            return kind
    return ErrorKind.INVALID_VALUE
