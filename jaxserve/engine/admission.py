"""What one request means for the device: checked against the model, then laid out for its row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.checks import check_cache_salt
from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.engine.pack import pack_fields
from jaxserve.errors import ContextLengthError, ParameterError
from jaxserve.scheduler.plan import Admitted
from jaxserve.state import (
    ALLOWED,
    BAD_WORDS,
    BEAM,
    BIAS,
    HISTORY,
    LOGPROBS,
    MIN_TOKENS,
    PENALTIES,
    PROMPT_LOGPROBS,
    SAMPLED,
    TRUNCATED,
)
from jaxserve.steps import count_fields, row_fields, table_fields
from jaxserve.types import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    BeamSearchParams,
    SamplingParams,
)

TABLE_FEATURES = BIAS | ALLOWED | BAD_WORDS


@dataclass(frozen=True, slots=True, eq=False)
class AdmittedParams:
    """A request's parameters, checked and resolved against the model.

    Attributes:
        params: as asked.
        sampling: how its rows sample; of a beam search the neutral parameters, since it does not.
        stop_ids: every id that ends a sequence, end-of-sequence included unless ignored.
        seeds: int64, one a sequence: the first as asked or drawn, the others derived from it.
        prompt: int32 [num_prompt].
        max_total_len: prompt and output together, tokens.
        features: bits of `jaxserve.state` that its rows need.
        cache_salt: empty for no salt only.
    """

    params: SamplingParams | BeamSearchParams
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    prompt: np.ndarray
    num_prompt: int
    max_total_len: int
    features: int
    cache_salt: bytes

    @property
    def beam(self) -> BeamSearchParams | None:
        """How to search, if it is a beam search."""
        return self.params if isinstance(self.params, BeamSearchParams) else None

    @property
    def is_scored(self) -> bool:
        """Whether the sum of its tokens' logprobs is wanted."""
        return bool(self.features & LOGPROBS)


def admit(
    token_ids: Sequence[int],
    params: SamplingParams | BeamSearchParams,
    model: ModelConfig,
    limits: EngineLimits,
    drawn_seed: int,
    cache_salt: str | None = None,
) -> AdmittedParams:
    """Checks a request against the model and the engine's sizes.

    Args:
        drawn_seed: its seed if it brings none.
        cache_salt: the prefix cache shows the request only what was computed under the same one.

    Raises:
        ParameterError, ContextLengthError: what cannot be served, and why.
    """
    prompt = check_prompt(token_ids, model.vocab_size)
    num_prompt = len(prompt)
    if num_prompt >= limits.max_model_len:
        raise ContextLengthError(max_model_len=limits.max_model_len, num_prompt_tokens=num_prompt, max_tokens=None)
    if params.max_tokens is not None and num_prompt + params.max_tokens > limits.max_model_len:
        raise ContextLengthError(
            max_model_len=limits.max_model_len, num_prompt_tokens=num_prompt, max_tokens=params.max_tokens
        )
    max_total_len = limits.max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
    check_cache_salt(cache_salt)
    sampling = _sampling(params, limits.max_num_seqs)
    eos = () if params.ignore_eos else model.eos_token_ids
    stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
    _check_ids(sampling, stop_ids, model.vocab_size)
    is_beam = isinstance(params, BeamSearchParams)
    return AdmittedParams(
        params=params,
        sampling=sampling,
        stop_ids=stop_ids,
        seeds=_seeds(drawn_seed if sampling.seed is None else sampling.seed, params.num_sequences),
        prompt=prompt,
        num_prompt=num_prompt,
        max_total_len=max_total_len,
        features=BEAM if is_beam else _features(sampling, stop_ids, model.vocab_size),
        cache_salt=b"" if cache_salt is None else b"salt " + cache_salt.encode(),
    )


def _sampling(params: SamplingParams | BeamSearchParams, max_num_seqs: int) -> SamplingParams:
    """How the request's rows sample."""
    if isinstance(params, SamplingParams):
        return params
    if params.beam_width > max_num_seqs:
        raise ParameterError(
            f"'beam_width' must be at most max_num_seqs={max_num_seqs}, because all beams run together, got "
            f"{params.beam_width}. Lower it, or raise max_num_seqs.",
            param="beam_width",
            code="integer_above_max_value",
        )
    return SamplingParams(temperature=0.0, max_tokens=params.max_tokens, stop_token_ids=params.stop_token_ids)


def _seeds(seed: int, count: int) -> tuple[int, ...]:
    """The request's own seed, and for each other sequence 64 bits that depend on it and the sequence's index alone."""
    digests = (hashlib.sha256(f"{seed} {index}".encode()).digest() for index in range(1, count))
    return (seed, *(int.from_bytes(digest[:8], "little", signed=True) for digest in digests))


def check_prompt(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The prompt as int32, every id inside the vocabulary: JAX would clamp a wrong one silently."""
    prompt = np.asarray(token_ids)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ParameterError("The prompt must hold at least one token.", param="prompt", code="empty_array")
    if prompt.dtype.kind not in "iu":
        raise ParameterError("The prompt must hold integer token ids.", param="prompt", code="invalid_type")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        raise ParameterError(
            f"Token id {low if low < 0 else high} is out of the vocabulary: ids go from 0 to {vocab_size - 1}.",
            param="prompt",
        )
    return prompt.astype(np.int32)


def _check_ids(params: SamplingParams, stop_ids: tuple[int, ...], vocab_size: int) -> None:
    highest = vocab_size - 1
    for token_id in params.logit_bias:
        if token_id > highest:
            raise ParameterError(
                f"Invalid key in 'logit_bias': {token_id}. Maximum value is {highest}.", param="logit_bias"
            )
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token_id in getattr(params, name) or ():
            if token_id > highest:
                raise ParameterError(f"Invalid id in '{name}': {token_id}. Maximum value is {highest}.", param=name)
    if len(stop_ids) > MAX_STOP_TOKEN_IDS:
        raise ParameterError(
            f"'stop_token_ids' and the model's end-of-sequence ids are {len(stop_ids)}, at most "
            f"{MAX_STOP_TOKEN_IDS} are served.",
            param="stop_token_ids",
            code="array_above_max_length",
        )
    if params.allowed_token_ids and params.min_tokens and set(params.allowed_token_ids) <= set(stop_ids):
        raise ParameterError(
            "'min_tokens' bans every token of 'allowed_token_ids': all of them end the sequence.", param="min_tokens"
        )
    _check_bad_words(params, vocab_size)


def _check_bad_words(params: SamplingParams, vocab_size: int) -> None:
    words = params.bad_words_token_ids
    if params.bad_words and not words:
        raise ParameterError(
            "'bad_words' are strings and the engine takes tokens. Set 'bad_words_token_ids' "
            "(jaxserve.text resolves one to the other).",
            param="bad_words",
        )
    if len(words) > MAX_BAD_WORDS:
        raise ParameterError(
            f"'bad_words' make {len(words)} token sequences, at most {MAX_BAD_WORDS} are served.",
            param="bad_words",
            code="array_above_max_length",
        )
    for word in words:
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS or min(word) < 0 or max(word) >= vocab_size:
            raise ParameterError(
                f"A bad word must have 1 to {MAX_BAD_WORD_TOKENS} tokens from 0 to {vocab_size - 1}, "
                f"got {len(word)} tokens.",
                param="bad_words",
            )


def _features(params: SamplingParams, stop_ids: tuple[int, ...], vocab_size: int) -> int:
    p = params
    truncated = 0 < p.top_k < vocab_size or p.top_p < 1 or p.min_p > 0
    penalised = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
    wanted = {
        SAMPLED: not p.greedy,
        TRUNCATED: truncated and not p.greedy,
        PENALTIES: penalised,
        BIAS: bool(p.logit_bias),
        MIN_TOKENS: p.min_tokens > 0 and bool(stop_ids),
        ALLOWED: p.allowed_token_ids is not None,
        BAD_WORDS: bool(p.bad_words_token_ids),
        LOGPROBS: p.logprobs is not None or p.num_sequences > p.n,
        PROMPT_LOGPROBS: p.prompt_logprobs is not None,
    }
    return sum(bit for bit, on in wanted.items() if on)


def pack_row(
    admitted: Admitted,
    params: AdmittedParams,
    known: np.ndarray,
    index: int,
    features: int,
    vocab_size: int,
    max_blocks: int,
) -> np.ndarray:
    """The array of `steps.admit_row`.

    Args:
        known: every token of the sequence that the host knows, prompt first.
        index: which of the request's sequences.
        max_blocks: entries of a block table.
    """
    p = params.sampling
    output = known[params.num_prompt :][-HISTORY:]
    history = np.full(HISTORY, -1, np.int32)
    history[HISTORY - len(output) :] = output
    stop_ids = np.full(MAX_STOP_TOKEN_IDS, vocab_size, np.int32)
    stop_ids[: len(params.stop_ids)] = params.stop_ids
    block_table = np.zeros(max_blocks, np.int32)
    block_table[: len(admitted.block_ids)] = admitted.block_ids
    values = {
        "row": admitted.row,
        "features": features,
        "temperature": p.temperature,
        "top_k": p.top_k if 0 < p.top_k < vocab_size else vocab_size,
        "top_p": p.top_p,
        "min_p": p.min_p,
        "repetition_penalty": p.repetition_penalty,
        "frequency_penalty": p.frequency_penalty,
        "presence_penalty": p.presence_penalty,
        "key": np.asarray([params.seeds[index]], np.int64).view(np.uint32).view(np.int32),
        "num_prompt": params.num_prompt,
        "min_position": params.num_prompt + p.min_tokens,
        "max_len": params.max_total_len,
        "reset_counts": bool(features & PENALTIES),
        "history": history,
        "stop_ids": stop_ids,
        "block_table": block_table,
    }
    return pack_fields(row_fields(max_blocks), values)


def pack_stored(row: int, num_prompt: int, stored: np.ndarray, max_model_len: int) -> Iterator[np.ndarray]:
    """The arrays of `steps.count_stored`, as many as it takes.

    Args:
        stored: the row's first tokens, which are not fed.
    """
    fields = count_fields(max_model_len)
    size = fields["tokens"]
    for start in range(0, len(stored), size):
        part = stored[start : start + size]
        tokens = np.zeros(size, np.int32)
        tokens[: len(part)] = part
        values = {"row": row, "start": start, "count": len(part), "num_prompt": num_prompt, "tokens": tokens}
        yield pack_fields(fields, values)


def pack_tables(row: int, params: SamplingParams, vocab_size: int) -> np.ndarray:
    """The array of `steps.set_row_tables`; what the request leaves out is neutral."""
    bias_ids = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_ids[: len(params.logit_bias)] = list(params.logit_bias)
    bias_values[: len(params.logit_bias)] = list(params.logit_bias.values())
    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for i, word in enumerate(params.bad_words_token_ids):
        bad_words[i, MAX_BAD_WORD_TOKENS - len(word) :] = word
    values = {
        "row": row,
        "bias_ids": bias_ids,
        "bias_values": bias_values,
        "bad_words": bad_words.reshape(-1),
        "allowed": _allowed_bits(params, vocab_size),
    }
    return pack_fields(table_fields(vocab_size), values)


def _allowed_bits(params: SamplingParams, vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[slice(None) if params.allowed_token_ids is None else list(params.allowed_token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").view(np.int32)
