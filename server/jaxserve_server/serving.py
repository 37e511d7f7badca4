"""What the routes serve with: the engine's seam, the text tools and the limits, as one frozen value.

`app.state.serving` holds it. Knows no HTTP. Whoever assembles the app builds it once, after the model is loaded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxserve.config import ModelConfig
from jaxserve.types import MAX_BEAM_WIDTH, BeamSearchParams, Delta, EngineStats, FinishReason, SamplingParams


class AsyncEngineLike(Protocol):
    """Tokens in, tokens out: what the routes need of `jaxserve.engine`'s AsyncEngine, or of a test's script."""

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        ...

    def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yields the deltas of the request's continuations; closing it aborts them all and frees their blocks.

        Raises:
            RequestError, UnavailableError: from the first `anext`, before any delta.
        """
        ...

    def abort(self, request_id: str, reason: FinishReason = "abort", index: int | None = None) -> None:
        """Ends a request, or one of its continuations, early; `reason` is "stop" where a stop string ended its text."""
        ...

    async def reset_prefix_cache(self) -> int:
        """Forgets the KV of past requests; returns how many blocks of it there were."""
        ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request that are the server's, not the engine's.

    Attributes:
        max_prompts: prompts of one completion request; each is a request to the engine (CVE-2026-73559).
        max_stop: OpenAI's bound of `stop`; the engine could take 16.
        max_n: bound of `n` and `best_of`.
        max_sequences: continuations of one HTTP request, of all its prompts together.
        max_beam_width: bound of `n` and `best_of` of a beam search, which needs so many rows at once.
        max_completion_logprobs: bound of `logprobs` in /v1/completions.
        max_tools, max_messages: bounds of these arrays.
        max_json_depth: nesting of the body; deeper is refused as malformed.
        inline_text_chars: text up to this is tokenised on the event loop (4 KB: well under 1 ms); longer
            text goes to a thread, so that open streams do not stall.
    """

    max_prompts: int = 32
    max_stop: int = 4
    max_n: int = 16
    max_sequences: int = 64
    max_beam_width: int = MAX_BEAM_WIDTH
    max_completion_logprobs: int = 5
    max_tools: int = 128
    max_messages: int = 4096
    max_json_depth: int = 1024
    inline_text_chars: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Everything that the API's routes read.

    Attributes:
        tokenizer: a `jaxserve.text.tokenizer.Tokenizer`.
        chat_template: a `jaxserve.text.chat.ChatTemplate`, or None where the model has none.
        model_names: the names served; the first is the canonical one, which answers carry.
        max_model_len: longest prompt + output, tokens.
        default_sampling: defaults of SamplingParams' fields from the model's generation_config; a field
            of the request, when present, goes before these.
        system_fingerprint: names the weights and the numerics; equal fingerprints give equal text.
        created: Unix seconds when the model was loaded.
    """

    engine: AsyncEngineLike
    tokenizer: Any
    chat_template: Any
    model_names: tuple[str, ...]
    model_config: ModelConfig
    max_model_len: int
    system_fingerprint: str
    created: int
    default_sampling: Mapping[str, float | int] = field(default_factory=dict)
    limits: Limits = Limits()

    @property
    def model_name(self) -> str:
        return self.model_names[0]
