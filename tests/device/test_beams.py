"""Beams on the device against plain numpy: what is selected, by which rank, and what the rows take over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ModelConfig
from jaxserve.ops.beams import follow_beams, likeliest, select_beams, start_beams
from jaxserve.state import BEAM, DecodeState, KVCache, init_decode_state, init_kv_cache
from jaxserve.types import MAX_BEAM_WIDTH

V = 5000  # the two-level search for the likeliest begins at 4,097
R = 24
C = 4
TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=V,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_position=64,
    eos_token_ids=(),
)


@cache
def jitted(function: Any, **static: Any) -> Any:
    return jax.jit(partial(function, **static))


@dataclass
class Search:
    """One search: rows in order of the beams, and what the host would know of it."""

    rows: Sequence[int]
    stop_ids: Sequence[int]
    scores: np.ndarray | None = None  # None: it is about to start


def make_state(searches: Sequence[Search], *, num_rows: int = R, vocab: int = V, max_blocks: int = 8) -> DecodeState:
    state = init_decode_state(num_rows, max_blocks, vocab)
    features, stop_ids = np.zeros(num_rows, np.int32), np.full((num_rows, 64), vocab, np.int32)
    for search in searches:
        features[list(search.rows)] = BEAM
        stop_ids[list(search.rows), : len(search.stop_ids)] = search.stop_ids
    state = replace(state, sampling=replace(state.sampling, features=features, stop_ids=stop_ids))
    for search in searches:
        padded = np.full(MAX_BEAM_WIDTH, -1, np.int32)
        padded[: len(search.rows)] = search.rows
        state = jitted(start_beams)(state, padded)
        if search.scores is not None:
            scores = np.asarray(state.beams.scores).copy()
            scores[list(search.rows)] = search.scores
            state = replace(state, beams=replace(state.beams, scores=scores))
    return state


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def ranked(sums: np.ndarray, banned: Sequence[int]) -> list[tuple[float, int, int]]:
    """(sum, beam, token) of all continuations that do not stop, best first, by sorting all of them."""
    sums = sums.copy()
    sums[:, list(banned)] = -np.inf
    order = np.argsort(-sums.reshape(-1), kind="stable")[: len(sums) * 2]
    return [(float(sums.reshape(-1)[i]), int(i) // sums.shape[1], int(i) % sums.shape[1]) for i in order]


def select(logits: np.ndarray, state: DecodeState, rows: Sequence[int]) -> tuple[np.ndarray, Any, np.ndarray]:
    tokens = np.arange(len(rows), dtype=np.int32) + 7_000
    found = jitted(select_beams)(logits, tokens, state, np.asarray(rows, np.int32))
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("vocab", [V, 700, 18])
def test_selects_what_sorting_all_continuations_selects(vocab: int):
    rng = np.random.default_rng(vocab)
    searches = [
        Search([9, 2, 14, 5], [3], rng.normal(-20, 1, 4).astype(np.float32)),
        Search([0, 23], [3, 8, 11], rng.normal(-5, 1, 2).astype(np.float32)),
        Search(list(range(6, 9)), [], None),
    ]
    state = make_state(searches, vocab=vocab)
    rows = [23, 1, 14, 5, 0, 9, 2, 6, 7, 8, R, R]  # searches interleaved, a row of a sampled sequence, padding
    logits = rng.normal(0, 3, (len(rows), vocab)).astype(np.float32)
    logits[rows.index(7)] = logits[rows.index(8)] = logits[rows.index(6)]  # a search starts on equal beams
    tokens, beams, answer = select(logits, state, rows)
    assert tokens[rows.index(1)] == 7_001
    for search in searches:
        at = [rows.index(row) for row in search.rows]
        before = np.where(np.arange(len(at)) == 0, 0.0, -1e9) if search.scores is None else search.scores
        sums = before[:, None] + log_softmax(logits[at])
        expected = ranked(sums, search.stop_ids)[: len(at)]
        for i, (row, sample) in enumerate(zip(search.rows, at, strict=True)):
            score, beam, token = expected[i]
            assert (answer[sample, 0], tokens[sample]) == (search.rows[beam], token)
            assert beams.parents[row] == search.rows[beam]
            # Three roundings of numbers below 64, each at most 2^-18 * 64 / 64.
            assert abs(beams.scores[row] - score) < 2e-5
            assert answer[sample, 1:2].view(np.float32)[0] == beams.scores[row]
            check_stops(answer[sample, 2:], sums[i], search.stop_ids)


def check_stops(columns: np.ndarray, sums: np.ndarray, stop_ids: Sequence[int]) -> None:
    """The answer's stop tokens are the search's, the likeliest first, and padded."""
    tokens, scores = columns[:MAX_BEAM_WIDTH], columns[MAX_BEAM_WIDTH:].view(np.float32)
    num = min(len(stop_ids), MAX_BEAM_WIDTH)
    expected = sorted(stop_ids, key=lambda token: -sums[token])[:num]
    assert tokens.tolist() == expected + [-1] * (MAX_BEAM_WIDTH - num)
    assert np.allclose(scores[:num], sums[expected], rtol=1e-6, atol=2e-5)
    assert (scores[num:] == -np.inf).all()


def test_of_many_stop_tokens_the_likeliest_are_told():
    rng = np.random.default_rng(1)
    stop_ids = rng.choice(V, 40, replace=False).tolist()
    state = make_state([Search([3, 4], stop_ids, np.float32([-1, -2]))])
    logits = rng.normal(0, 3, (2, V)).astype(np.float32)
    _, _, answer = select(logits, state, [3, 4])
    for i in range(2):
        check_stops(answer[i, 2:], -1.0 - i + log_softmax(logits[i]), stop_ids)


def test_equal_sums_rank_by_beam_then_token_wherever_rows_lie():
    flat = np.zeros(V, np.float32)
    flat[[4800, 40, 900]] = 9.0
    logits = np.stack([flat] * 4)
    expected = [(0, 40), (0, 900), (0, 4800), (1, 40)]  # (beam, token)
    for rows in ([0, 1, 2, 3], [17, 3, 11, 0], [2, 1, 0, 23]):
        state = make_state([Search(rows, [], np.zeros(4, np.float32))])
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            sampled = [rows[i] for i in order]
            tokens, _, answer = select(logits, state, sampled)
            found = {sampled[i]: (rows.index(answer[i, 0]), int(tokens[i])) for i in range(4)}
            assert [found[row] for row in rows] == expected


def test_the_widest_search_and_another_of_width_one():
    rng = np.random.default_rng(3)
    wide = rng.permutation(R)[:16].tolist()
    single = next(row for row in range(R) if row not in wide)
    scores = np.sort(rng.normal(-30, 2, 16).astype(np.float32))[::-1]
    state = make_state([Search(wide, [5], scores), Search([single], [5], np.float32([-4]))])
    rows = sorted([*wide, single])
    logits = rng.normal(0, 1, (17, V)).astype(np.float32)
    logits[rows.index(wide[3]), :14] += 12  # one beam has nearly all of the likeliest
    tokens, _, answer = select(logits, state, rows)
    at = [rows.index(row) for row in wide]
    expected = ranked(scores[:, None] + log_softmax(logits[at]), [5])[:16]
    assert [(wide.index(answer[i, 0]), tokens[i]) for i in at] == [(beam, token) for _, beam, token in expected]
    assert sum(beam == 3 for _, beam, _ in expected) > 8
    alone = rows.index(single)
    without_stop = np.where(np.arange(V) == 5, -np.inf, logits[alone])
    assert (answer[alone, 0], tokens[alone]) == (single, without_stop.argmax())


def test_a_nan_stays_in_its_search():
    rng = np.random.default_rng(4)
    state = make_state([Search([0, 1], [3], np.float32([-1, -2])), Search([4, 5], [3], np.float32([-1, -2]))])
    logits = rng.normal(0, 3, (4, V)).astype(np.float32)
    clean, clean_beams, clean_answer = select(logits, state, [0, 1, 4, 5])
    logits[1] = np.nan
    tokens, beams, answer = select(logits, state, [0, 1, 4, 5])
    assert (tokens[2:] == clean[2:]).all()
    assert (answer[2:] == clean_answer[2:]).all()
    assert (beams.scores[4:6] == clean_beams.scores[4:6]).all()
    assert np.isin(answer[:2, 0], [0, 1]).all()
    assert ((tokens >= 0) & (tokens < V)).all()


@pytest.mark.parametrize("vocab", [16, 4096, 4097, 50_001])
def test_likeliest_equals_a_stable_sort(vocab: int):
    rng = np.random.default_rng(vocab)
    x = rng.normal(0, 2, (6, vocab)).astype(np.float32)
    x[1] = np.round(x[1]) + 0.0  # no -0, which top_k puts behind 0; many equal ones, over the borders of blocks
    x[2] = 1.0
    x[3, : vocab // 2] = -np.inf
    x[4] = -np.inf
    x[4, -1] = 0.0
    values, ids = jax.tree.map(np.asarray, jitted(likeliest, num=16)(x))
    expected = np.argsort(-x, axis=-1, kind="stable")[:, :16]
    assert (values == np.take_along_axis(x, expected, axis=-1)).all()
    assert (ids == expected).all()


def make_kv(num_blocks: int, dtype: str, rng: np.random.Generator) -> KVCache:
    kv = init_kv_cache(TINY, num_blocks, C, dtype, as_bits=True)
    whole = [rng.integers(0, 2**16, layer.shape) for layer in kv.layers]
    return replace(
        kv, layers=tuple(jnp.asarray(bits, layer.dtype) for bits, layer in zip(whole, kv.layers, strict=True))
    )


def contents(kv: KVCache, table: np.ndarray, num_tokens: int) -> np.ndarray:
    """[layers, tokens, K, 2H] of the first tokens of a row."""
    layers = [np.asarray(layer)[table[: -(-num_tokens // C)]] for layer in kv.layers]
    return np.stack([blocks.reshape(-1, *blocks.shape[2:])[:num_tokens] for blocks in layers])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", [8, 9, 11])  # a new block; one of its tokens there; all but one
def test_rows_take_over_the_tokens_of_the_beams_they_continue(position: int, dtype: str):
    rng = np.random.default_rng(position)
    rows, parents = [5, 1, 9, 3], [1, 9, 9, 5]  # a permutation, and one that is lost
    tables = np.zeros((R, 8), np.int32)
    num_blocks = position // C + 1
    tables[rows, :num_blocks] = rng.permutation(np.arange(1, 60))[: 4 * num_blocks].reshape(4, -1)
    tables[[12, 13], :3] = [[60, 61, 62], [63, 60, 61]]
    state = init_decode_state(R, 8, V)
    pointers = np.arange(R, dtype=np.int32)
    pointers[rows] = parents
    pointers[12] = 13  # a leftover of another search: row 12 is nobody's beam in this step
    state = replace(state, block_tables=tables, beams=replace(state.beams, parents=pointers))
    kv = make_kv(64, dtype, rng)
    before = {row: contents(kv, tables[row], position) for row in rows}
    untouched = np.setdiff1d(np.arange(64), tables[rows, position // C])
    packed = np.full((2, 16), R, np.int32)
    packed[0, :4], packed[1, :] = rows, 0
    packed[1, :4] = position
    new_kv, new_state = jitted(follow_beams, block_size=C)(kv, state, packed.reshape(-1))
    new_tables = np.asarray(new_state.block_tables)
    full = position // C
    for row, parent in zip(rows, parents, strict=True):
        assert (new_tables[row, :full] == tables[parent, :full]).all()
        assert (new_tables[row, full:] == tables[row, full:]).all()
        assert np.array_equal(contents(new_kv, new_tables[row], position), before[parent])
    others = np.setdiff1d(np.arange(R), rows)
    assert (new_tables[others] == tables[others]).all()
    for layer, new in zip(kv.layers, new_kv.layers, strict=True):
        assert np.array_equal(np.asarray(layer)[untouched], np.asarray(new)[untouched])


def test_following_needs_no_second_cache():
    kv = init_kv_cache(TINY, 4096, 16, "float32", as_bits=True)
    state = init_decode_state(R, 8, V)
    packed = np.zeros(32, np.int32)
    lowered = jax.jit(partial(follow_beams, block_size=16), donate_argnums=(0, 1)).lower(kv, state, packed)
    memory = lowered.compile().memory_analysis()
    one_layer = kv.layers[0].nbytes
    assert memory.alias_size_in_bytes >= 2 * one_layer
    assert memory.temp_size_in_bytes < one_layer / 10
