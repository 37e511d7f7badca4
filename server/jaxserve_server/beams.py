"""From a typed request to BeamSearchParams: what a beam search takes, and what it cannot honour.

Knows the generation endpoints' fields; must not know how a request runs. Bounds of its own parameters are
BeamSearchParams' to check.
"""

from __future__ import annotations

from typing import Any, Final

from jaxserve.types import BeamSearchParams
from jaxserve_server.errors import ApiError, ErrorKind
from jaxserve_server.schemas import GenerationRequest

BEAM_FIELDS: Final = (
    "length_penalty",
    "early_stopping",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
)

# Fields that a beam search cannot honour, with the values that ask for nothing. Of temperature these are 1, whose
# logprobs it ranks by, and 0, which clients of vLLM send since its older versions asked for it.
NOT_HONOURED: Final[dict[str, tuple[Any, ...]]] = {
    "temperature": (0.0, 1.0),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": ({},),
    "seed": (),
    "stop": ([],),
    "min_tokens": (0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
}

# Fields that only a beam search has, with the values that ask for nothing.
ITS_OWN: Final[dict[str, tuple[Any, ...]]] = {"length_penalty": (1.0,), "early_stopping": (False,)}


def check_beam_search(request: GenerationRequest) -> None:
    """Raises ApiError for a field that asks a beam search for what it cannot do, or that only it has."""
    if not request.use_beam_search:
        for name, neutral in ITS_OWN.items():
            if asks(request, name, neutral):
                raise ApiError(ErrorKind.NEEDS_ANOTHER, name, condition="'use_beam_search' is enabled")
        return
    for name, neutral in NOT_HONOURED.items():
        if asks(request, name, neutral):
            values = " or ".join(str(value) for value in neutral)
            remedy = f"leave it out, or send {values}" if values else "leave it out"
            reason = f"A beam search cannot honour '{name}': {remedy}, or do not set 'use_beam_search'."
            raise ApiError(ErrorKind.INVALID_COMBINATION, name, reason=reason)


def asks(request: GenerationRequest, name: str, neutral: tuple[Any, ...]) -> bool:
    """Whether the request's `name`, if it has one, is given and not neutral."""
    value = getattr(request, name, None)
    # `0 == False` in Python: a completion's `logprobs` of 0 must not pass for chat's false.
    return value is not None and not any(type(value) is type(nothing) and value == nothing for nothing in neutral)


def beam_params(request: GenerationRequest, *, max_tokens: int) -> BeamSearchParams:
    """The search that is asked for. Its width is `n`, vLLM's meaning, or `best_of`, of which `n` are returned.

    Raises:
        ParameterError: what BeamSearchParams refuses.
    """
    given: dict[str, Any] = {name: value for name in BEAM_FIELDS if (value := getattr(request, name)) is not None}
    return BeamSearchParams(beam_width=request.best_of or request.n or 1, max_tokens=max_tokens, **given)
