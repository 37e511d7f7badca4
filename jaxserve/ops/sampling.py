"""Choosing the next token of each row, on the device, without sorting the vocabulary.

The order of changes to the logits is that of `types.SamplingParams`. Each change sits behind a
`lax.cond` on the step's feature bits, so that a greedy batch pays for none of them and one program
serves every mix. Within a step that has a feature, rows without it hold neutral values.

Noise is a function of (request key, position of the sampled token) alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.state import (
    ALLOWED,
    BAD_WORDS,
    BIAS,
    MIN_P,
    MIN_TOKENS,
    PENALTIES,
    SAMPLED,
    TRUNCATED,
    DecodeState,
)
from jaxserve.types import GREEDY_TEMPERATURE

_CDF_BLOCK = 128  # tokens a block of the two-level inverse CDF


def sample(
    logits: Float[Array, "samples vocab"],
    state: DecodeState,
    rows: Int[Array, " samples"],
    positions: Int[Array, " samples"],
    features: Int[Array, ""],
) -> tuple[Int[Array, " samples"], Bool[Array, " samples"]]:
    """The token sampled for each row, and whether its logits were finite.

    Args:
        logits: raw, float32.
        rows: each sample's row; R for padding.
        positions: where the sampled token will stand.
        features: OR of the rows' feature bits.
    """
    rows = jnp.minimum(rows, state.last_token.shape[0] - 1)

    def when(bit: int, change: Callable[[jax.Array], jax.Array], value: jax.Array) -> jax.Array:
        return jax.lax.cond((features & bit) != 0, change, lambda x: x, value)

    x = when(ALLOWED, lambda x: _allow(x, state, rows), logits)
    x = when(BAD_WORDS, lambda x: _ban_words(x, state, rows), x)
    x = when(MIN_TOKENS, lambda x: _ban_stops(x, state, rows, positions), x)
    x = when(BIAS, lambda x: _add_bias(x, state, rows), x)
    x = when(PENALTIES, lambda x: _penalise(x, state, rows), x)
    greedy = jnp.argmax(x, axis=-1).astype(jnp.int32)
    highest = jnp.take_along_axis(x, greedy[:, None], axis=-1)[:, 0]  # NaN if any logit is NaN

    def draw(_: None) -> jax.Array:
        temperature = state.sampling.temperature[rows]
        hot = temperature >= GREEDY_TEMPERATURE
        scaled = x / jnp.where(hot, temperature, 1.0)[:, None]
        scaled = when(MIN_P, lambda y: _cut_min_p(y, state.sampling.min_p[rows]), scaled)
        scaled = when(TRUNCATED, lambda y: _cut_top(y, state.sampling.top_k[rows], state.sampling.top_p[rows]), scaled)
        bits = request_bits(state.sampling.key[rows], positions)
        return jnp.where(hot, draw_categorical(scaled, bits), greedy)

    tokens = jax.lax.cond((features & SAMPLED) != 0, draw, lambda _: greedy, None)
    return tokens, jnp.isfinite(highest)


def request_bits(key: UInt[Array, "samples 2"], positions: Int[Array, " samples"]) -> UInt[Array, "samples 2"]:
    """Two uint32 of noise for each (request key, position)."""

    def one(key: jax.Array, position: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.bits(folded, (2,), jnp.uint32)

    return jax.vmap(one)(key, positions)


def draw_categorical(logits: Float[Array, "samples vocab"], bits: UInt[Array, "samples 2"]) -> Int[Array, " samples"]:
    """One draw from softmax(logits) a row, by inverting the CDF in two levels.

    The first word chooses a block of 128 tokens, the second a token within it: a vocabulary-wide sum
    instead of a vocabulary-wide noise tensor (64 x 150k Gumbels are 10 M threefry words a step). A token
    of probability 0 is never drawn. The resolution is 2^-24 at each level.
    """
    num_rows, vocab = logits.shape
    p = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -vocab % _CDF_BLOCK))).reshape(num_rows, -1, _CDF_BLOCK)
    uniforms = (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)  # [0, 1)
    block = _invert(p.sum(-1), uniforms[:, 0])
    inside = _invert(jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return (block * _CDF_BLOCK + inside).astype(jnp.int32)


def _invert(mass: Float[Array, "samples cells"], uniform: Float[Array, " samples"]) -> Int[Array, " samples"]:
    """The cell in whose share of the cumulated mass `uniform` falls; never an empty one."""
    cdf = jnp.cumsum(mass, axis=-1)
    target = uniform * cdf[:, -1]
    index = jnp.sum(cdf <= target[:, None], axis=-1)
    # Rounding in a parallel sum may leave `index` on an empty cell or past the end: step back to the
    # nearest cell with mass, or else forward to the first.
    cells = jnp.arange(mass.shape[-1])
    full = mass > 0
    back = jnp.max(jnp.where(full & (cells <= index[:, None]), cells, -1), axis=-1)
    return jnp.where(back >= 0, back, jnp.argmax(full, axis=-1))


def _allow(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    words = state.sampling.allowed[rows]  # [S, W]
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(x.shape[0], -1)[:, : x.shape[1]] != 0, x, -jnp.inf)


def _ban_words(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    """Bans a bad word's last token where the output ends with the tokens before it."""
    words = state.sampling.bad_words[rows]  # [S, W, 16]
    before, last = words[..., :-1], words[..., -1]
    matches = jnp.all((before == -1) | (before == state.history[rows][:, None, :]), axis=-1) & (last >= 0)
    return _set_tokens(x, jnp.where(matches, last, x.shape[1]))


def _ban_stops(x: jax.Array, state: DecodeState, rows: jax.Array, positions: jax.Array) -> jax.Array:
    early = positions < state.sampling.min_position[rows]
    return _set_tokens(x, jnp.where(early[:, None], state.sampling.stop_ids[rows], x.shape[1]))


def _set_tokens(x: jax.Array, token_ids: jax.Array) -> jax.Array:
    """x with each row's `token_ids` at -inf; ids past the vocabulary are dropped."""
    return x.at[jnp.arange(x.shape[0])[:, None], token_ids].set(-jnp.inf, mode="drop")


def _add_bias(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    index = (jnp.arange(x.shape[0])[:, None], state.sampling.bias_ids[rows])
    return x.at[index].add(state.sampling.bias_values[rows], mode="drop")


def _penalise(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    """Repetition (Keskar et al., arXiv:1909.05858 §4.1), frequency and presence penalties."""
    s = state.sampling
    counts = state.output_counts[rows]
    penalised = rows_penalised(state, rows)
    seen = ((state.prompt_seen[rows] != 0) | (counts > 0)) & penalised
    repetition = s.repetition_penalty[rows][:, None]
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    counts = jnp.where(penalised, counts, 0)  # other rows hold leftovers
    x = x - s.frequency_penalty[rows][:, None] * counts
    return x - s.presence_penalty[rows][:, None] * (counts > 0)


def rows_penalised(state: DecodeState, rows: jax.Array) -> Bool[Array, "samples 1"]:
    s = state.sampling
    return ((s.repetition_penalty[rows] != 1) | (s.frequency_penalty[rows] != 0) | (s.presence_penalty[rows] != 0))[
        :, None
    ]


def _cut_min_p(x: jax.Array, min_p: jax.Array) -> jax.Array:
    floor = jnp.max(x, axis=-1) + jnp.log(min_p)  # log(0) = -inf cuts nothing
    return jnp.where(x >= floor[:, None], x, -jnp.inf)


def _cut_top(x: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Top-k, then the nucleus of what is left (Holtzman et al., arXiv:1904.09751 §3.1)."""
    keys = _ordered(x)
    kth = _largest_threshold(keys, lambda kept: jnp.sum(kept, axis=-1) >= top_k)
    keys = jnp.where(keys >= kth[:, None], keys, jnp.iinfo(jnp.int32).min)
    p = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    p = jnp.where(keys >= kth[:, None], p, 0.0)
    target = top_p * jnp.sum(p, axis=-1)

    def enough(kept: jax.Array) -> jax.Array:
        mass = jnp.sum(jnp.where(kept, p, 0.0), axis=-1)
        return (mass >= target) & (mass > 0)

    nucleus = _largest_threshold(keys, enough)
    nucleus = jnp.where(top_p >= 1, kth, nucleus)  # off: rounding must not cut the tail
    return jnp.where(keys >= nucleus[:, None], x, -jnp.inf)


def _ordered(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """int32 that order as the floats do (both zeros as one)."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(
    keys: Int[Array, "samples vocab"], enough: Callable[[jax.Array], jax.Array]
) -> Int[Array, " samples"]:
    """The largest t such that `enough(keys >= t)`, by bisection over the 32 bits of a key.

    `enough` must hold for the smallest t and, once false, stay false as t grows.
    """

    def step(i: jax.Array, low: jax.Array) -> jax.Array:
        # low is an offset from int32's minimum, held as uint32
        candidate = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        threshold = jax.lax.bitcast_convert_type(candidate ^ jnp.uint32(0x80000000), jnp.int32)
        return jnp.where(enough(keys >= threshold[:, None]), candidate, low)

    low = jax.lax.fori_loop(0, 32, step, jnp.zeros(keys.shape[0], jnp.uint32))
    return jax.lax.bitcast_convert_type(low ^ jnp.uint32(0x80000000), jnp.int32)
