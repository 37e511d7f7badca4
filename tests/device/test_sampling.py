"""The sampler against float64 references on the filtered distribution, and its noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxserve.ops import sampling
from jaxserve.state import (
    ALLOWED,
    BAD_WORDS,
    BIAS,
    HISTORY,
    MIN_TOKENS,
    SAMPLED,
    TRUNCATED,
    init_decode_state,
)

V = 300  # not a multiple of 128 or 32: the padding of both must never be drawn
DRAWS = 60_000
P_VALUE = 1e-9  # a test that fails by chance once in a billion runs


def make_logits(rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(0, 2.5, V).astype(np.float32)
    logits[[7, 130, 299]] = 6.0, 5.5, 5.0  # likely tokens in each block of the two-level draw, the last included
    return logits


def reference_distribution(logits: np.ndarray, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """float64 probabilities after temperature, min_p, top_k, top_p, by sorting (vLLM's order)."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    keep = p >= min_p * p.max()
    if top_k:
        kth = np.sort(np.where(keep, x, -np.inf))[::-1][top_k - 1]
        keep &= x >= kth
    p = np.where(keep, p, 0)
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        nucleus = np.zeros(V, bool)
        nucleus[order[before < max(top_p, 1e-12)]] = True
        p = np.where(nucleus, p, 0)
        p /= p.sum()
    return p


def draw(logits: np.ndarray, num: int, *, seed: int = 0, first_position: int = 1, **params: float) -> np.ndarray:
    """`num` draws at consecutive positions, through the whole sampler, 1,000 rows at a time."""
    rows = 1000
    state = init_decode_state(rows, 4, V)
    columns = {name: jnp.full((rows,), value, getattr(state.sampling, name).dtype) for name, value in params.items()}
    columns.setdefault("temperature", jnp.ones(rows))
    if "top_k" in params and not params["top_k"]:
        columns["top_k"] = jnp.full((rows,), V, jnp.int32)
    key = jnp.tile(jnp.asarray([seed, 0], jnp.uint32), (rows, 1))
    state = replace(state, sampling=replace(state.sampling, key=key, **columns))
    batch = jnp.tile(jnp.asarray(logits), (rows, 1))
    positions = [first_position + np.arange(i * rows, (i + 1) * rows) for i in range(num // rows)]
    features = np.int32(SAMPLED | TRUNCATED)
    return np.concatenate(
        [np.asarray(jitted_sample()(batch, state, np.arange(rows), p, features)[0]) for p in positions]
    )


@cache
def jitted_sample() -> Callable:
    return jax.jit(sampling.sample)


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    """p-value of the draws under p, cells that expect fewer than 5 pooled."""
    observed, expected = np.bincount(tokens, minlength=V).astype(float), p * len(tokens)
    small = expected < 5
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return (
        float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)
        if len(expected) > 1
        else 1.0
    )


CONFIGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50, "temperature": 1.5},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 1.5},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_draws_follow_the_filtered_distribution(config: dict) -> None:
    logits = make_logits(np.random.default_rng(1))
    p = reference_distribution(logits, **config)
    # The fast path looks at 128 candidates. Half of V flattened makes some configurations leave it.
    tokens = draw(logits, DRAWS, **config)
    assert set(tokens) <= set(np.flatnonzero(p)), "a token of probability 0 was drawn"
    assert chi_square(tokens, p) > P_VALUE


def test_the_chi_square_rejects_a_wrong_distribution() -> None:
    """Negative controls: the test above has the power to see what it is for."""
    logits = make_logits(np.random.default_rng(1))
    tokens = draw(logits, DRAWS)
    for temperature in (0.93, 1.07):
        assert chi_square(tokens, reference_distribution(logits, temperature=temperature)) < P_VALUE
    for cut in ({"top_p": 0.95}, {"min_p": 0.005}, {"top_k": 100}):
        assert not set(tokens) <= set(np.flatnonzero(reference_distribution(logits, **cut)))


def test_equal_logits_at_the_cut_are_all_kept() -> None:
    logits = np.full(V, -5.0, np.float32)
    logits[10:14] = 1.0
    tokens = draw(logits, 4000, top_k=2)
    assert set(tokens) == {10, 11, 12, 13}


def test_noise_is_a_function_of_seed_and_position() -> None:
    logits = make_logits(np.random.default_rng(2))
    a, b = draw(logits, 2000, seed=5), draw(logits, 2000, seed=5, first_position=501)
    assert (a[500:] == b[:1500]).all()
    c = draw(logits, 2000, seed=6)
    # Neighbouring seeds must not agree more often than independent draws do.
    p = reference_distribution(logits)
    agreement = (p**2).sum()
    assert stats.binomtest(int((a == c).sum()), 2000, agreement).pvalue > P_VALUE


def test_neighbouring_positions_are_independent() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1] + [1e-12] * (V - 4), np.float32))
    tokens = draw(logits, DRAWS, seed=9)
    pairs = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).astype(float)
    p = np.outer([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]).ravel()
    assert stats.chisquare(pairs, p * pairs.sum()).pvalue > P_VALUE


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 5e-324, 9e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = make_logits(np.random.default_rng(3))
    assert set(draw(logits, 1000, temperature=temperature)) == {int(logits.argmax())}


def greedy_after(change: dict, features: int, logits: np.ndarray, position: int = 50, **tables: object) -> int:
    """The greedy token of row 1 of 3 with the change; rows 0 and 2 hold the same as leftovers of others."""
    state = init_decode_state(3, 4, V)
    leftover = {"stop_ids", "bias_ids", "bias_values", "allowed", "bad_words"}
    fields = {
        k: getattr(state.sampling, k).at[jnp.arange(3) if k in leftover else 1].set(v)
        for k, v in {**change, "features": features}.items()
    }
    rest = {k: getattr(state, k).at[:].set(v) for k, v in tables.items()}
    state = replace(state, sampling=replace(state.sampling, **fields), **rest)
    batch = jnp.tile(jnp.asarray(logits), (3, 1))
    tokens, finite = jitted_sample()(batch, state, jnp.arange(3), jnp.full(3, position), jnp.int32(features))
    assert bool(finite.all())
    assert int(tokens[0]) == int(tokens[2]) == int(logits.argmax()), "a neighbour was changed"
    return int(tokens[1])


@pytest.fixture
def ranked() -> np.ndarray:
    """Logits whose order is token 0 > 1 > 2 ..., one unit apart, around zero."""
    return (5.0 - np.arange(V)).astype(np.float32)


def test_allowed_ids_mask_all_others(ranked: np.ndarray) -> None:
    bits = np.zeros(320, np.uint8)
    bits[[31, 32, 299]] = 1
    words = np.packbits(bits, bitorder="little").view("<u4")
    assert greedy_after({"allowed": words}, ALLOWED, ranked) == 31


def test_stop_ids_are_banned_before_min_position(ranked: np.ndarray) -> None:
    stops = np.full(64, V, np.int32)
    stops[:2] = 0, 1
    change = {"stop_ids": stops, "min_position": 51}
    assert greedy_after(change, MIN_TOKENS, ranked, position=50) == 2
    assert greedy_after(change, MIN_TOKENS, ranked, position=51) == 0


def test_bias_is_added(ranked: np.ndarray) -> None:
    ids, values = np.full(1024, V, np.int32), np.zeros(1024, np.float32)
    ids[:2], values[:2] = (0, 9), (-100.0, 7.5)
    assert greedy_after({"bias_ids": ids, "bias_values": values}, BIAS, ranked) == 1
    values[1] = 8.5
    assert greedy_after({"bias_ids": ids, "bias_values": values}, BIAS, ranked) == 9


def test_banning_every_token_by_bias_keeps_the_order(ranked: np.ndarray) -> None:
    """-100 is a bias, not a ban: OpenAI's semantics."""
    ids, values = np.full(1024, V, np.int32), np.zeros(1024, np.float32)
    ids[:V], values[:V] = np.arange(V), -100.0
    assert greedy_after({"bias_ids": ids, "bias_values": values}, BIAS, ranked) == 0


def test_bad_words_are_banned_only_after_their_beginning(ranked: np.ndarray) -> None:
    words = np.full((64, 16), -1, np.int32)
    words[0, -1:] = 0  # a word of one token is always banned
    words[1, -3:] = 40, 41, 1
    history = np.full(HISTORY, -1, np.int32)
    history[-3:] = 9, 40, 41
    assert greedy_after({"bad_words": words}, BAD_WORDS, ranked, history=history) == 2
    history[-3:] = 40, 41, 9
    assert greedy_after({"bad_words": words}, BAD_WORDS, ranked, history=history) == 1
    history[:] = -1  # shorter than the word: an unset place matches nothing
    history[-1] = 41
    assert greedy_after({"bad_words": words}, BAD_WORDS, ranked, history=history) == 1


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"), [(1.5, 0, 0), (0.7, 0, 0), (1, 1.2, 0), (1, 0, 1.9), (1.3, -0.4, 0.6)]
)
def test_penalties_equal_the_formula(repetition: float, frequency: float, presence: float) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (2, V)).astype(np.float32)
    seen = rng.integers(0, 2, V).astype(np.uint8)
    counts = rng.integers(0, 3, V).astype(np.int32)
    state = init_decode_state(2, 4, V)
    set_row = lambda array, value: array.at[1].set(value)  # noqa: E731
    state = replace(
        state,
        prompt_seen=jnp.tile(seen, (2, 1)),  # row 0 has leftovers and no penalties
        output_counts=jnp.tile(counts, (2, 1)),
        sampling=replace(
            state.sampling,
            repetition_penalty=set_row(state.sampling.repetition_penalty, repetition),
            frequency_penalty=set_row(state.sampling.frequency_penalty, frequency),
            presence_penalty=set_row(state.sampling.presence_penalty, presence),
        ),
    )
    got = np.asarray(sampling._penalise(jnp.asarray(logits), state, jnp.arange(2)))
    want = logits[1].astype(np.float64)
    touched = (seen > 0) | (counts > 0)
    want = np.where(touched, np.where(want > 0, want / repetition, want * repetition), want)
    want = want - frequency * counts - presence * (counts > 0)
    np.testing.assert_allclose(got[1], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[0], logits[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_reported_for_their_row_alone(poison: float) -> None:
    logits = np.zeros((3, V), np.float32)
    logits[1, 77] = poison
    state = init_decode_state(3, 4, V)
    _, finite = sampling.sample(jnp.asarray(logits), state, jnp.arange(3), jnp.arange(3), jnp.int32(0))
    assert finite.tolist() == [True, False, True]


def test_thresholds_by_bisection_equal_sorting() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(0, 3, (40, V)).astype(np.float32)
    x[0, :5] = [0.0, -0.0, np.inf, -np.inf, 1e-40]
    keys = sampling._ordered(jnp.asarray(x))
    ks = rng.integers(1, V, 40)
    found = sampling._largest_threshold(keys, partial(lambda k, kept: kept.sum(-1) >= k, jnp.asarray(ks)))
    want = np.array([np.sort(row)[::-1][k - 1] for row, k in zip(x, ks, strict=True)])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(sampling._ordered(jnp.asarray(want))))


def test_an_empty_cell_is_never_drawn() -> None:
    """Parallel cumulative sums may differ by an ulp across an empty cell; scan uniforms that sit on the borders."""
    rng = np.random.default_rng(6)
    mass = rng.random((2000, 64)).astype(np.float32)
    mass[rng.random(mass.shape) < 0.5] = 0
    mass[:, 0], mass[:, -1] = 0, 0
    cdf = np.asarray(jnp.cumsum(jnp.asarray(mass), axis=-1))
    border = cdf[np.arange(2000), rng.integers(0, 64, 2000)] / cdf[:, -1]
    for nudge in (-6e-8, 0, 6e-8):
        uniform = np.clip(border + nudge, 0, np.float32(1 - 2**-24)).astype(np.float32)
        index = np.asarray(sampling._invert(jnp.asarray(mass), jnp.asarray(uniform)))
        assert (mass[np.arange(2000), index] > 0).all()
