"""The one exception tree of jaxserve.

    JaxserveError
    ├── ConfigError              a flag, file or combination that cannot be served     (ValueError)
    ├── CheckpointError          weights or metadata on disk that cannot be trusted
    │   ├── UnsupportedModelError    an architecture or feature that we do not have
    │   ├── WeightsError             missing, unexpected, ill-shaped or truncated tensors
    │   └── ManifestError            bytes that do not match their SHA-256 manifest
    ├── RequestError             what one request asked for cannot be done            (ValueError)
    │   ├── ParameterError           a parameter out of its bounds; `param` names it
    │   ├── ContextLengthError       prompt (+ max_tokens) longer than the model's context
    │   └── KVBudgetError            fits the context, can never fit the KV pool
    ├── UnavailableError         the engine cannot take it now; `retry_after_s` says when
    │   ├── QueueFullError
    │   ├── QueueTimeoutError
    │   └── DrainingError
    └── EngineError              the engine failed; not the caller's fault
        ├── NumericalError           the model produced NaN for this request
        └── EngineDeadError          the step loop is gone

Raised at the edges; inside, invariants are asserted. Every message names the value, the bound and the
remedy. The server maps these classes to HTTP in one table (`jaxserve_server/errors.py`).
"""

from __future__ import annotations


class JaxserveError(Exception):
    """Base of everything that jaxserve raises on purpose."""


class ConfigError(JaxserveError, ValueError):
    """A configuration that cannot be served."""


class CheckpointError(JaxserveError):
    """A checkpoint that cannot be read or trusted."""


class UnsupportedModelError(CheckpointError):
    """An architecture, or a feature of one, that jaxserve does not implement."""


class WeightsError(CheckpointError):
    """Tensors that are missing, unexpected, ill-shaped or truncated."""


class ManifestError(CheckpointError):
    """Files whose bytes differ from their SHA-256 manifest."""


class RequestError(JaxserveError, ValueError):
    """A request that can never be served as asked.

    Attributes:
        param: the request's parameter at fault, in the API's spelling, or None.
    """

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.param = param


class ParameterError(RequestError):
    """A parameter out of its bounds, or a combination that is not served.

    Attributes:
        code: the machine-readable reason in OpenAI's vocabulary, e.g. `integer_below_min_value`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message, param=param)
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or prompt plus max_tokens, exceeds the model's context.

    Attributes:
        max_model_len, num_prompt_tokens, max_tokens: the three numbers, in tokens.
    """

    def __init__(self, *, max_model_len: int, num_prompt_tokens: int, max_tokens: int | None):
        self.max_model_len = max_model_len
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        wanted = num_prompt_tokens + (max_tokens or 0)
        split = "" if max_tokens is None else f" ({num_prompt_tokens} in the prompt, {max_tokens} in the completion)"
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {wanted} "
            f"tokens{split}. Please reduce the length of the prompt or of the completion.",
            param="prompt",
        )


class KVBudgetError(RequestError):
    """The request fits the context but can never fit the KV pool."""


class UnavailableError(JaxserveError):
    """The engine cannot take the request now.

    Attributes:
        retry_after_s: seconds after which a retry is worth it.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(UnavailableError):
    """The waiting queue is at its bound."""


class QueueTimeoutError(UnavailableError):
    """The request waited for its first step longer than it may."""


class DrainingError(UnavailableError):
    """The engine is shutting down and takes no new requests."""


class EngineError(JaxserveError):
    """The engine failed; the request was not at fault."""


class NumericalError(EngineError):
    """The model produced a NaN or an infinity for this request's logits."""


class EngineDeadError(EngineError):
    """The step loop has ended; nothing can be served until the engine is restarted."""
