"""Choosing the next token of each row, on the device, without sorting the vocabulary.

The order of changes to the logits is that of `types.SamplingParams`. Each change sits behind a
`lax.cond` on the step's feature bits, so that a greedy batch pays for none of them and one program
serves every mix. Within a step that has a feature, rows without it are left as they are: their scalars
are neutral, their wide tables are ignored.

Noise is a function of (request key, position of the sampled token) alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.layers.largest import largest
from jaxserve.layers.stable_sum import stable_exp, stable_sum
from jaxserve.state import (
    ALLOWED,
    BAD_WORDS,
    BIAS,
    MIN_TOKENS,
    PENALTIES,
    SAMPLED,
    TRUNCATED,
    DecodeState,
)
from jaxserve.types import GREEDY_TEMPERATURE

_CDF_BLOCK = 128  # tokens a block of the two-level inverse CDF
_CANDIDATES = 128  # likeliest tokens that truncated sampling looks at first


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
    highest = jnp.max(x, axis=-1)  # NaN if any logit is NaN
    greedy = _first_of(x, highest)
    temperature = state.sampling.temperature[rows]
    hot = temperature >= GREEDY_TEMPERATURE

    def draw(_: None) -> jax.Array:
        scaled = x / jnp.where(hot, temperature, 1.0)[:, None]
        bits = request_bits(state.sampling.key[rows], positions)
        nothing = jnp.zeros_like(greedy), jnp.zeros_like(hot), scaled
        likeliest, certain, left = jax.lax.cond(
            (features & TRUNCATED) != 0, lambda: _truncate(scaled, bits, state, rows, hot), lambda: nothing
        )
        drawn = jax.lax.cond(
            jnp.any(hot & ~certain), lambda: draw_categorical(left, bits), lambda: jnp.zeros_like(greedy)
        )
        return jnp.where(hot, jnp.where(certain, likeliest, drawn), greedy)

    tokens = jax.lax.cond((features & SAMPLED) != 0, draw, lambda _: greedy, None)
    return tokens, jnp.isfinite(highest)


def _first_of(x: Float[Array, "samples vocab"], value: Float[Array, " samples"]) -> Int[Array, " samples"]:
    """The first index at which each row equals `value`; 0 where none does (NaN).

    Max and this are two vectorised passes; XLA:CPU's argmax is one scalar pass (62 ms at 64 x 152k).
    """
    index = jnp.where(x == value[:, None], jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[1])
    first = jnp.min(index, axis=-1)
    return jnp.where(first < x.shape[1], first, 0)


def request_bits(key: UInt[Array, "samples 2"], positions: Int[Array, " samples"]) -> UInt[Array, "samples 2"]:
    """Two uint32 of noise for each (request key, position): the words of the folded key itself."""

    def one(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))

    return jax.vmap(one)(key, positions)


def draw_categorical(logits: Float[Array, "samples vocab"], bits: UInt[Array, "samples 2"]) -> Int[Array, " samples"]:
    """One draw from softmax(logits) a row, by inverting the CDF in two levels.

    The first word chooses a block of 128 tokens, the second a token within it: a vocabulary-wide sum
    instead of a vocabulary-wide noise tensor (64 x 150k Gumbels are 10 M threefry words a step). A token
    of probability 0 is never drawn. The resolution is 2^-24 at each level.
    """
    num_rows, vocab = logits.shape
    p = stable_exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -vocab % _CDF_BLOCK))).reshape(num_rows, -1, _CDF_BLOCK)
    uniforms = _uniforms(bits)
    block = _invert(stable_sum(p), uniforms[:, 0])
    inside = _invert(jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return (block * _CDF_BLOCK + inside).astype(jnp.int32)


def _uniforms(bits: UInt[Array, "samples 2"]) -> Float[Array, "samples 2"]:
    """In [0, 1), multiples of 2^-24."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


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


def _asks(state: DecodeState, rows: jax.Array, bit: int) -> Bool[Array, "samples 1"]:
    return ((state.sampling.features[rows] & bit) != 0)[:, None]


def _allow(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    words = state.sampling.allowed[rows]  # [S, W]
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(x.shape[0], -1)[:, : x.shape[1]] != 0
    return jnp.where(allowed | ~_asks(state, rows, ALLOWED), x, -jnp.inf)


def _ban_words(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    """Bans a bad word's last token where the output ends with the tokens before it."""
    words = state.sampling.bad_words[rows]  # [S, W, 16]
    before, last = words[..., :-1], words[..., -1]
    matches = jnp.all((before == -1) | (before == state.history[rows][:, None, :]), axis=-1)
    matches &= (last >= 0) & _asks(state, rows, BAD_WORDS)
    return _set_tokens(x, jnp.where(matches, last, x.shape[1]))


def _ban_stops(x: jax.Array, state: DecodeState, rows: jax.Array, positions: jax.Array) -> jax.Array:
    early = positions < state.sampling.min_position[rows]
    return _set_tokens(x, jnp.where(early[:, None], state.sampling.stop_ids[rows], x.shape[1]))


def _set_tokens(x: jax.Array, token_ids: jax.Array) -> jax.Array:
    """x with each row's `token_ids` at -inf; ids past the vocabulary are dropped."""
    return x.at[jnp.arange(x.shape[0])[:, None], token_ids].set(-jnp.inf, mode="drop")


def _add_bias(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    ids = jnp.where(_asks(state, rows, BIAS), state.sampling.bias_ids[rows], x.shape[1])
    index = (jnp.arange(x.shape[0])[:, None], ids)
    return x.at[index].add(state.sampling.bias_values[rows], mode="drop")


def _penalise(x: jax.Array, state: DecodeState, rows: jax.Array) -> jax.Array:
    """Repetition (Keskar et al., arXiv:1909.05858 §4.1), frequency and presence penalties."""
    s = state.sampling
    counts = state.output_counts[rows].astype(jnp.float32)
    present = (counts > 0).astype(jnp.float32)
    seen = (state.prompt_seen[rows] != 0) | (counts > 0)
    repetition = s.repetition_penalty[rows][:, None]
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - s.frequency_penalty[rows][:, None] * counts
    return x - s.presence_penalty[rows][:, None] * present


def _truncate(
    x: Float[Array, "samples vocab"],
    bits: UInt[Array, "samples 2"],
    state: DecodeState,
    rows: Int[Array, " samples"],
    hot: Bool[Array, " samples"],
) -> tuple[Int[Array, " samples"], Bool[Array, " samples"], Float[Array, "samples vocab"]]:
    """min_p, then top-k, then the nucleus (Holtzman et al., arXiv:1904.09751 §3.1).

    What is kept is nearly always among the 128 likeliest tokens: then those are all that is looked at. A
    row for which that is not certain takes the exact path over the whole vocabulary. Which path a row
    takes depends on that row alone.

    Returns:
        A draw from the likeliest, whether it is certain that they hold all that is kept, and for rows
        where it is not, the logits with what is dropped at -inf.
    """
    num_kept = min(_CANDIDATES, x.shape[1])
    top_k, top_p = state.sampling.top_k[rows], state.sampling.top_p[rows]
    values, ids = largest(x, num_kept)
    last = jnp.full_like(top_p, -jnp.inf) if num_kept == x.shape[1] else values[:, -1]
    floor = values[:, 0] + jnp.log(state.sampling.min_p[rows])  # log(0) = -inf drops nothing
    kth = jnp.take_along_axis(values, jnp.minimum(top_k, num_kept)[:, None] - 1, axis=-1)[:, 0]
    no_k = top_k >= x.shape[1]
    base = jnp.maximum(floor, jnp.where(no_k, -jnp.inf, kth))
    kept = jnp.where(values >= base[:, None], stable_exp(values - values[:, :1]), 0.0)
    total = stable_sum(jnp.where(x >= base[:, None], stable_exp(x - values[:, :1]), 0.0))
    index = jnp.sum(jnp.cumsum(kept, axis=-1) < (top_p * total)[:, None], axis=-1)
    nucleus = jnp.take_along_axis(values, jnp.minimum(index, num_kept - 1)[:, None], axis=-1)[:, 0]
    threshold = jnp.where(top_p < 1, jnp.maximum(base, nucleus), base)
    # Strictly above the last candidate: an equal token may stand outside.
    certain = (no_k | (kth > last)) & ((top_p >= 1) | (index < num_kept)) & (threshold > last)
    choice = _invert(jnp.where(values >= threshold[:, None], kept, 0.0), _uniforms(bits)[:, 0])
    likeliest = jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
    left = jnp.where(x >= floor[:, None], x, -jnp.inf)
    cuts = ~certain & hot & ~(no_k & (top_p >= 1))
    left = jax.lax.cond(jnp.any(cuts), lambda: _cut_top(left, top_k, top_p), lambda: left)
    return likeliest, certain, left


def _cut_top(x: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """x with what top-k and then top-p drop at -inf, by bisection: exact for any k and p.

    Cost: 64 passes over the logits.
    """
    keys = _ordered(x)
    kth = _largest_threshold(keys, lambda kept: jnp.sum(kept, axis=-1) >= top_k)
    p = stable_exp(x - jnp.max(x, axis=-1, keepdims=True))
    p = jnp.where(keys >= kth[:, None], p, 0.0)
    target = top_p * stable_sum(p)

    def enough(kept: jax.Array) -> jax.Array:
        mass = stable_sum(jnp.where(kept, p, 0.0))
        return (mass >= target) & (mass > 0)

    nucleus = jnp.maximum(_largest_threshold(keys, enough), kth)
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
