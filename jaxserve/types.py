"""The values that cross the engine's seam: what a caller asks, and what comes back.

Token in, token out: nothing here knows text, HTTP or jax. All are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxserve.checks import check_integer, check_length, check_number
from jaxserve.errors import ParameterError

FinishReason = Literal["stop", "length", "abort", "error"]

# Bounds of what one request may ask of the device: its row in DecodeState has this many places.
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64  # stop_token_ids and end-of-sequence ids together
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16
MAX_N = 128  # continuations of one prompt
MAX_BEAM_WIDTH = 16
GREEDY_TEMPERATURE = 1e-5  # below this, dividing logits overflows float32: treated as greedy
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Names and defaults are vLLM's.

    Logits are changed in this order: allowed_token_ids, bad_words, min_tokens, logit_bias,
    repetition / frequency / presence penalties, temperature, min_p, top_k, top_p. Logprobs are of the
    raw logits, before any of these (vLLM's `raw_logprobs`).

    Attributes:
        n: continuations of the prompt, at most 128. The prompt is computed once. The first has the
            request's seed, each other one a seed derived from it.
        best_of: continuations to generate, of which the n with the highest logprob a token are returned;
            at least n; None means n.
        temperature: in [0, 2]; below 1e-5 the most likely token is taken.
        top_k: keep the k most likely tokens; 0 or -1 keeps all. Ties of the k-th are kept.
        top_p: keep the smallest set whose probability reaches top_p, in [0, 1]; ties of the last are
            kept; 0 keeps the most likely token.
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens that stand
            in the prompt or the output.
        frequency_penalty, presence_penalty: in [-2, 2]; over output tokens.
        logit_bias: token id to an addend in [-100, 100]; at most 1,024 entries.
        seed: any int64; None draws one. Noise is a function of (seed, position) alone.
        max_tokens: at least 1; None means up to the model's context.
        min_tokens: no stop token is sampled, and no stop string ends the text, before this many.
        stop: strings that end the text; at most 16 of at most 256 characters.
        stop_token_ids: tokens that end it, besides the model's end-of-sequence ids.
        ignore_eos: the model's end-of-sequence ids do not end it.
        allowed_token_ids: only these may be sampled.
        bad_words: strings that must not be generated; the caller who has a tokenizer turns them into
            `bad_words_token_ids` (`jaxserve.text`): at most 64 of at most 16 tokens.
        logprobs: report the sampled token's logprob and this many of the likeliest (0..20).
        prompt_logprobs: the same for each prompt token but the first.
        include_stop_str_in_output, skip_special_tokens, detokenize: how text is made of the tokens.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(self, "bad_words_token_ids", tuple(tuple(w) for w in self.bad_words_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        self._check()

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_sequences(self) -> int:
        """Continuations that are generated, be they returned or not."""
        return self.n if self.best_of is None else self.best_of

    def _check(self) -> None:
        check_integer("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            check_integer("best_of", self.best_of, self.n, MAX_N)
        check_number("temperature", self.temperature, 0.0, 2.0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        check_integer("top_k", self.top_k, -1, INT32_MAX)
        check_integer("min_tokens", self.min_tokens, 0, INT32_MAX)
        for name, low, high in (
            ("seed", INT64_MIN, INT64_MAX),
            ("max_tokens", 1, INT32_MAX),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low, high)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                f"'min_tokens' must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.",
                param="min_tokens",
                code="integer_above_max_value",
            )
        self._check_lists()

    def _check_lists(self) -> None:
        check_length("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ParameterError("'stop' must hold non-empty strings.", param="stop")
            if len(text) > MAX_STOP_STRING_CHARS:
                raise ParameterError(
                    f"'stop' strings must have at most {MAX_STOP_STRING_CHARS} characters, got {len(text)}.",
                    param="stop",
                    code="string_above_max_length",
                )
        check_length("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS - 16)
        check_length("bad_words", self.bad_words, MAX_BAD_WORDS)
        check_length("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for bias in self.logit_bias.values():
            check_number("logit_bias", bias, -100.0, 100.0)
        for token_id in (*self.logit_bias, *self.stop_token_ids, *(self.allowed_token_ids or ())):
            check_integer("token id", token_id, 0, INT32_MAX)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError(
                "'allowed_token_ids' must not be empty.", param="allowed_token_ids", code="empty_array"
            )
        if any(not word for word in self.bad_words):
            raise ParameterError("'bad_words' must hold non-empty strings.", param="bad_words")


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How a beam search goes, and when it ends. The semantics are those of Hugging Face's `generate`.

    In each step the continuations of all beams together are ranked by the sum of their logprobs. Those among the
    first beam_width that end in a stop token become hypotheses; the likeliest beam_width that do not go on. A
    hypothesis' score is the sum of its logprobs over the power `length_penalty` of its number of output tokens, the
    stop token included; the beam_width best hypotheses are kept. Logprobs are of the raw logits, temperature 1.

    Attributes:
        beam_width: 1 to 16; also how many sequences are returned. 1 is a search over one beam; Hugging Face takes
            it for greedy decoding.
        max_tokens: in the step that reaches it, the likeliest beam_width continuations become hypotheses as they are.
        length_penalty: above 0 favours long sequences, below 0 short ones; in [-10, 10].
        early_stopping: True ends the search with the beam_width-th hypothesis. False ends it once there are so many
            and the likeliest beam, scored at its present length, is no better than the worst of them. "never" scores
            it at the greatest length where length_penalty is above 0: it ends only when no beam can become better.
        ignore_eos: the model's end-of-sequence ids do not end a beam.
        stop_token_ids: tokens that end it, besides those.
        include_stop_str_in_output, skip_special_tokens, detokenize: how text is made of the tokens.
    """

    beam_width: int
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        check_integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        check_integer("max_tokens", self.max_tokens, 1, INT32_MAX)
        check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ParameterError(
                f"Invalid 'early_stopping': expected true, false or 'never', got {self.early_stopping!r}.",
                param="early_stopping",
            )
        check_length("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS - 16)
        for token_id in self.stop_token_ids:
            check_integer("token id", token_id, 0, INT32_MAX)

    @property
    def num_sequences(self) -> int:
        """Sequences that are returned."""
        return self.beam_width


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs at one position: the token that stands there, and the likeliest ones.

    Attributes:
        token_id, logprob: the token and its natural-log probability.
        rank: how many tokens are at least as likely, itself included (1: the most likely).
        top: (token id, logprob) of the likeliest, most likely first; as many as were asked.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one continuation of a request gained since its last delta.

    A request ends when each of its `num_sequences` continuations (of a beam search: `beam_width`) has had a
    finish_reason; "error" and "abort" end all of them with one delta. The deltas of a beam search come at its
    end, one a sequence with all its tokens, the best first.

    Attributes:
        index: which continuation, from 0.
        token_ids: new tokens, the stop token included where one ended it.
        logprobs: one entry a token in `token_ids`, or None if not asked.
        prompt_logprobs: one entry a prompt token (None for the first), in the first delta only.
        finish_reason: None until the last delta. "stop": a stop token (`stop_reason` names it, None
            for the model's end-of-sequence); "length"; "abort"; "error" (`error` says why).
        num_cached_tokens: prompt tokens whose KV came from a cache; in the request's first delta only.
        cumulative_logprob: sum of all its tokens' logprobs, in the delta with its finish_reason; None unless
            logprobs were asked, best_of exceeds n, or it is a beam.
        score: of a beam, what it is ranked by: cumulative_logprob / length ** length_penalty.
        error: for finish_reason "error", the exception.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None
    index: int = 0
    cumulative_logprob: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation, as `LLM.generate` returns it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One hypothesis, as `LLM.beam_search` returns it.

    Attributes:
        token_ids: its output, the stop token that ended it included.
        cum_logprob: sum of the tokens' logprobs.
        score: cum_logprob / len(token_ids) ** length_penalty.
        finish_reason: "stop" or "length".
    """

    token_ids: tuple[int, ...]
    text: str
    cum_logprob: float
    score: float
    finish_reason: FinishReason
    stop_reason: int | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """One prompt's hypotheses, the best first, as `LLM.beam_search` returns them; none if its search failed."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sequences: tuple[BeamSearchSequence, ...]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request's result, as `LLM.generate` returns it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A reading of the engine, cheap enough for every health check.

    Attributes:
        num_running, num_waiting: requests.
        num_blocks, num_free_blocks: KV blocks that can be handed out, and those that are free; blocks that
            only the prefix cache holds are free.
        num_cached_blocks: free blocks whose content the prefix cache still knows.
        num_swapped_blocks, num_swap_blocks: host memory's blocks in use, and in all.
        num_preemptions, num_steps, num_compilations_after_ready: since start.
        last_commit_age_s: seconds since a step was last answered while work existed; 0 when idle.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int
    num_compilations_after_ready: int
    last_commit_age_s: float
    num_cached_blocks: int = 0
    num_swapped_blocks: int = 0
    num_swap_blocks: int = 0
