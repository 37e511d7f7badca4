"""Tokens whose keys and values are there already: what is fed of them leaves no trace, what is not is counted."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import steps
from jaxserve.config import ModelConfig
from jaxserve.engine.admission import pack_stored
from jaxserve.engine.pack import pack_fields
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import init_arrays
from jaxserve.state import DecodeState, StepShape, init_decode_state, init_kv_cache
from jaxserve.steps import admit_row, count_fields, count_stored, row_fields, step

VOCAB, ROWS, MAX_LEN, C = 60, 3, 32, 4
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=MAX_LEN,
)
SHAPE = StepShape(num_tokens=16, max_rows=ROWS, max_blocks=8, block_size=C, q_tile=8, kv_tile=16)


def admitted(row: int, num_prompt: int, table: list[int]) -> DecodeState:
    """A state with one row given out, penalties on."""
    values = dict.fromkeys(row_fields(SHAPE.max_blocks), 0)
    values |= {
        **{"row": row, "num_prompt": num_prompt, "reset_counts": 1, "key": np.zeros(2), "temperature": 0.0},
        **{"history": np.full(15, -1), "stop_ids": np.full(64, VOCAB), "top_k": VOCAB, "top_p": 1.0},
        "block_table": np.array(table + [0] * (SHAPE.max_blocks - len(table))),
    }
    packed = pack_fields(row_fields(SHAPE.max_blocks), values)
    return admit_row(init_decode_state(ROWS, SHAPE.max_blocks, VOCAB), jnp.asarray(packed))


def fed(row: int, tokens: list[int], start: int, stored: int) -> jax.Array:
    """A step that feeds one chunk and samples after it."""
    packed = np.zeros(SHAPE.packed_len, np.int32)
    f = {name: packed[at : at + n] for name, (at, n) in SHAPE.fields().items()}
    for name in ("rows", "sample_rows", "update_rows"):
        f[name].fill(ROWS)
    n = len(tokens)
    f["tokens"][:n], f["rows"][:n], f["stored"][:n] = tokens, row, stored
    f["positions"][:n] = np.arange(start, start + n)
    f["sample_index"][0], f["sample_rows"][0] = n - 1, row
    tiles = range(0, n, SHAPE.q_tile)
    for i, at in enumerate(tiles):
        f["tile_start"][i], f["tile_len"][i] = at, min(SHAPE.q_tile, n - at)
    f["header"][:] = 0, len(tiles), 0, 1
    return jnp.asarray(packed)


def test_a_stored_token_is_read_and_never_written() -> None:
    """Its block may be another's too: the last prompt token of a fork is fed for its logits alone."""
    params = init_arrays(decoder_specs(MODEL), jax.random.key(0))
    run = jax.jit(partial(step, config=MODEL, shape=SHAPE, max_model_len=MAX_LEN))
    kv = init_kv_cache(MODEL, 12, C, "float32", as_bits=True)
    prompt = [5, 9, 2, 40, 41, 7, 7, 13, 30, 31]
    kv, _, first = run(params, kv, admitted(0, len(prompt), [4, 2, 9]), fed(0, prompt, 0, 0))
    other = admitted(2, len(prompt), [4, 2, 9])  # another row, the same blocks
    after, _, again = run(params, kv, other, fed(2, prompt[-1:], len(prompt) - 1, 1))
    assert np.asarray(again.sampled)[0, 0].tolist() == np.asarray(first.sampled)[0, 0].tolist()
    for layer, before in zip(after.layers, kv.layers, strict=True):
        np.testing.assert_array_equal(np.asarray(layer), np.asarray(before))
    # Fed as a token of its own it is written: the test would see it.
    poisoned = jax.tree.map(lambda layer: layer.at[9, 1].set(np.float32(7.0)), kv)
    written, _, _ = run(params, poisoned, other, fed(2, prompt[-1:], len(prompt) - 1, 0))
    left, _, _ = run(params, poisoned, other, fed(2, prompt[-1:], len(prompt) - 1, 1))
    assert all((np.asarray(layer)[9, 1] != 7.0).any() for layer in written.layers)
    assert all((np.asarray(layer)[9, 1] == 7.0).all() for layer in left.layers)


@pytest.mark.parametrize("num_stored", [0, 1, 5, 9, 13])
def test_counting_equals_feeding(num_stored: int) -> None:
    rng = np.random.default_rng(num_stored)
    num_prompt, known = 9, rng.integers(0, VOCAB, 14).tolist()
    fields = count_fields(MAX_LEN)
    tokens = np.full(fields["tokens"], 3, np.int32)  # what is past the count must not be counted
    tokens[:num_stored] = known[:num_stored]
    values = {"row": 1, "start": 0, "count": num_stored, "num_prompt": num_prompt, "tokens": tokens}
    state = count_stored(admitted(1, num_prompt, [1]), jnp.asarray(pack_fields(fields, values)), max_model_len=MAX_LEN)
    seen, counts = np.zeros((ROWS, VOCAB), np.uint8), np.zeros((ROWS, VOCAB), np.int32)
    seen[1, known[: min(num_stored, num_prompt)]] = 1
    np.add.at(counts[1], known[num_prompt:num_stored], 1)
    np.testing.assert_array_equal(np.asarray(state.prompt_seen), seen)
    np.testing.assert_array_equal(np.asarray(state.output_counts), counts)


def test_long_prompts_are_counted_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MAX_COUNTED", 4)
    known = np.array([1, 2, 3, 3, 2, 5, 5, 5, 6, 1], np.int32)
    state = admitted(0, 6, [1])
    calls = list(pack_stored(0, 6, known, MAX_LEN))
    for packed in calls:
        state = count_stored(state, jnp.asarray(packed), max_model_len=MAX_LEN)
    assert len(calls) == 3
    assert np.flatnonzero(np.asarray(state.prompt_seen)[0]).tolist() == [1, 2, 3, 5]
    assert np.asarray(state.output_counts)[0][[1, 5, 6]].tolist() == [1, 2, 1]
    assert np.asarray(state.output_counts).sum() == 4
