"""The pure step functions, unjitted. `engine.compiled` compiles them with their donations.

A prefill chunk, a decode token and, later, a drafted token are the same thing: a token of the ragged
stream with a row and a position.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Heads, OneOf, forward
from jaxserve.models.params import are_in_panels
from jaxserve.ops.kernel_attention import attend_heads, kernel_attention, kernel_write, stream_sequences
from jaxserve.ops.logprobs import pack_prompt_logprobs
from jaxserve.ops.next_tokens import no_next_tokens, sample_next_tokens
from jaxserve.ops.paged_attention import decode_order, paged_attention, write_kv
from jaxserve.ops.tiles import past_last
from jaxserve.parallel.axis import ONE_DEVICE, Axis
from jaxserve.state import (
    BEAM_COLUMNS,
    HISTORY,
    LOGPROB_COLUMNS,
    PROMPT_LOGPROBS,
    DecodeState,
    KVCache,
    SamplingState,
    StepBatch,
    StepOutput,
    StepShape,
    unpack,
)
from jaxserve.types import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

_Loop = tuple[jax.Array, KVCache, DecodeState, StepBatch, StepOutput]  # index of the step first


def step(
    params: dict[str, Any],
    kv: KVCache,
    state: DecodeState,
    packed: Int[Array, " packed"],
    *,
    config: ModelConfig,
    shape: StepShape,
    max_model_len: int,
    axis: Axis = ONE_DEVICE,
) -> tuple[KVCache, DecodeState, StepOutput]:
    """Feeds one stream of tokens and samples one token for each row that asks.

    If the stream is decode rows alone, it can go on with the sampled tokens for `num_steps` steps in one loop on the
    device. A row leaves it with a stop token, at its longest, or when its logits are not finite; the loop ends
    early when no row is left.

    Over several devices, `params` and `kv` are one device's parts, all else is the same on each, and so is what comes
    back but for `kv`.

    Donates: kv, state.
    Static: config, shape, max_model_len, axis.
    """
    batch = unpack(packed, shape)
    tables = state.block_tables.at[batch.update_rows, batch.update_cols].set(batch.update_ids, mode="drop")
    state = replace(state, block_tables=tables)
    batch = _without_ended(state, batch, shape)
    run = partial(_step, params, config=config, shape=shape, max_model_len=max_model_len, axis=axis)
    if shape.max_steps == 1:
        kv, state, _, out = run(kv, state, batch)
        return kv, state, out

    def is_wanted(carry: _Loop) -> jax.Array:
        index, _, _, batch, _ = carry
        is_left = jnp.any(batch.sample_rows < shape.max_rows)
        return (index == 0) | ((index < batch.num_steps) & is_left)

    def body(carry: _Loop) -> _Loop:
        index, kv, state, batch, out = carry
        kv, state, batch, one = run(kv, state, batch)
        place = lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, index, axis=0)  # noqa: E731
        out = replace(one, sampled=place(out.sampled, one.sampled), logprobs=place(out.logprobs, one.logprobs))
        return index + 1, kv, state, batch, out

    _, kv, state, _, out = jax.lax.while_loop(is_wanted, body, (jnp.int32(0), kv, state, batch, _no_output(shape)))
    return kv, state, out


def _no_output(shape: StepShape) -> StepOutput:
    num_steps, num_samples = shape.max_steps, shape.num_samples
    return StepOutput(
        sampled=jnp.zeros((num_steps, num_samples, 2), jnp.int32),
        logprobs=jnp.zeros((num_steps, num_samples, LOGPROB_COLUMNS), jnp.int32),
        prompt_logprobs=jnp.zeros((shape.num_tokens, LOGPROB_COLUMNS), jnp.int32),
        beams=jnp.zeros((num_samples, BEAM_COLUMNS), jnp.int32),
    )


def _step(
    params: dict[str, Any],
    kv: KVCache,
    state: DecodeState,
    batch: StepBatch,
    *,
    config: ModelConfig,
    shape: StepShape,
    max_model_len: int,
    axis: Axis,
) -> tuple[KVCache, DecodeState, StepBatch, StepOutput]:
    """One pass over the stream. The batch that comes back feeds what decode rows sampled; of others it is nothing."""
    last_token = state.last_token[jnp.minimum(batch.rows, shape.max_rows - 1)]
    batch = replace(batch, tokens=jnp.where(batch.tokens < 0, last_token, batch.tokens))
    hidden, kv = _forward(params, kv, state, batch, config, shape, max_model_len, axis)
    state = _record_fed(state, batch, shape)
    # Of a long prompt most steps sample nothing; the head and the sampler of 64 rows are 4 % of a step of 256 tokens.
    sampled, sampled_logprobs, last_token, ended, beams, beam_answer = jax.lax.cond(
        jnp.any(batch.sample_rows < shape.max_rows),  # in a loop, rows that have ended stand among the others
        lambda: sample_next_tokens(params, hidden, state, batch, shape, config.vocab_size, axis),
        lambda: no_next_tokens(state, shape),
    )
    state = replace(state, last_token=last_token, ended=ended, beams=beams)
    out = StepOutput(
        sampled=sampled[None],
        logprobs=sampled_logprobs[None],
        prompt_logprobs=jax.lax.cond(
            (batch.features & PROMPT_LOGPROBS) != 0,
            lambda: pack_prompt_logprobs(params, hidden, batch.targets, config.vocab_size, axis),
            lambda: jnp.zeros((shape.num_tokens, LOGPROB_COLUMNS), jnp.int32),
        ),
        beams=beam_answer,
    )
    following = replace(batch, tokens=jnp.full_like(batch.tokens, -1), positions=batch.positions + 1)
    return kv, state, _without_ended(state, following, shape), out


def _without_ended(state: DecodeState, batch: StepBatch, shape: StepShape) -> StepBatch:
    """The batch without the tokens of rows that have ended: they write nothing, and their attention is short."""
    ended = state.ended[jnp.minimum(batch.rows, shape.max_rows - 1)]
    sample_ended = state.ended[jnp.minimum(batch.sample_rows, shape.max_rows - 1)]
    return replace(
        batch,
        positions=jnp.where(ended, 0, batch.positions),
        rows=jnp.where(ended, shape.max_rows, batch.rows),
        sample_rows=jnp.where(sample_ended, shape.max_rows, batch.sample_rows),
    )


def _forward(
    params: dict[str, Any],
    kv: KVCache,
    state: DecodeState,
    batch: StepBatch,
    config: ModelConfig,
    shape: StepShape,
    max_model_len: int,
    axis: Axis = ONE_DEVICE,
) -> tuple[jax.Array, KVCache]:
    slots, tables = _slots(state, batch, shape, kv.num_blocks), state.block_tables
    if shape.attention == "xla":
        order = decode_order(tables, batch, shape)
    else:
        sequences = stream_sequences(tables, batch, shape)

    def attend(window: int | None, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        if isinstance(cache, OneOf):  # blocks of layer l begin at l * P of the one array
            out, caches = attend_in(cache.caches, cache.layer * kv.num_blocks, kv.num_blocks, window, q, k, v)
            return out, cache._replace(caches=caches)
        return attend_in(cache, 0, None, window, q, k, v)

    def attend_in(
        cache: jax.Array, first: jax.Array | int, num: int | None, window: int | None, q: Any, k: Any, v: Any
    ) -> tuple[jax.Array, jax.Array]:
        if shape.attention in ("xla", "cpu"):
            cache = write_kv(cache, k, v, slots, kv.dtype, first_block=first, num_blocks=num)
        else:
            cache = kernel_write(cache, k, v, slots, shape, first_block=first, num_blocks=num)
        if shape.attention == "xla":
            here, ordered = tables + first, order._replace(tables=order.tables + first)
            out = paged_attention(q, cache, here, batch, shape, dtype=kv.dtype, window=window, order=ordered)
        else:
            here = sequences._replace(tables=sequences.tables + first)
            out = kernel_attention(q, cache, here, shape, dtype=kv.dtype, window=window)
        return out, cache

    # A row that has ended in a loop stands among the others: padding is what is past the last of all.
    last = past_last(batch.rows < shape.max_rows)[None]

    def attend_fused(window: int | None, cache: jax.Array, heads: Heads) -> tuple[jax.Array, jax.Array]:
        return attend_heads(heads, cache, slots, last, sequences, dtype=kv.dtype, config=config, window=window)

    hidden, layers = forward(
        params,
        kv.layers,
        batch.tokens,
        batch.positions,
        attend,
        config,
        max_model_len=max_model_len,
        num_tokens=last,
        attend_heads=attend_fused if shape.attention == "cpu" and are_in_panels(params) else None,
        axis=axis,
    )
    return hidden, replace(kv, layers=layers)


def _slots(state: DecodeState, batch: StepBatch, shape: StepShape, num_blocks: int) -> jax.Array:
    """Where each token's key and value go: block * C + offset; past the cache's end for stored ones and padding."""
    rows = jnp.minimum(batch.rows, shape.max_rows - 1)
    blocks = state.block_tables[rows, batch.positions // shape.block_size]
    slots = blocks * shape.block_size + batch.positions % shape.block_size
    is_written = (batch.rows < shape.max_rows) & (batch.stored == 0)
    return jnp.where(is_written, slots, num_blocks * shape.block_size)


def _record_fed(state: DecodeState, batch: StepBatch, shape: StepShape) -> DecodeState:
    """Counts every fed token as prompt or output, and shifts it into its row's history.

    Only decode rows shift: a prefilled row's history was set when the row was given out.
    """
    num_prompt = state.sampling.num_prompt[jnp.minimum(batch.rows, shape.max_rows - 1)]
    is_prompt = batch.positions < num_prompt
    prompt_rows = jnp.where(is_prompt, batch.rows, shape.max_rows)
    output_rows = jnp.where(is_prompt, shape.max_rows, batch.rows)
    rows = jnp.where(jnp.arange(shape.num_samples) < batch.num_decode, batch.rows[: shape.num_samples], shape.max_rows)
    shifted = jnp.concatenate(
        [
            state.history[jnp.minimum(rows, shape.max_rows - 1)][:, 1:],
            batch.tokens[: shape.num_samples, None],
        ],
        axis=-1,
    )
    return replace(
        state,
        prompt_seen=state.prompt_seen.at[prompt_rows, batch.tokens].set(jnp.uint8(1), mode="drop"),
        output_counts=state.output_counts.at[output_rows, batch.tokens].add(1, mode="drop"),
        history=state.history.at[rows].set(shifted, mode="drop"),
    )


MAX_COUNTED = 2048  # tokens a call of `count_stored`: 8 KB, and one call for most prompts

# The packed arrays of the admission programs: name -> length, in order.
FLOAT_FIELDS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "bias_values",
    }
)
LIST_FIELDS = frozenset({"history", "stop_ids", "block_table", "tokens"})  # arrays even where their length is 1


def row_fields(max_blocks: int) -> dict[str, int]:
    """What `admit_row` takes."""
    return {
        "row": 1,
        "features": 1,
        "temperature": 1,
        "top_k": 1,
        "top_p": 1,
        "min_p": 1,
        "repetition_penalty": 1,
        "frequency_penalty": 1,
        "presence_penalty": 1,
        "key": 2,
        "num_prompt": 1,
        "min_position": 1,
        "max_len": 1,
        "reset_counts": 1,
        "history": HISTORY,
        "stop_ids": MAX_STOP_TOKEN_IDS,
        "block_table": max_blocks,
    }


def count_fields(max_model_len: int) -> dict[str, int]:
    """What `count_stored` takes: `count` tokens of a row from position `start` on."""
    return {"row": 1, "start": 1, "count": 1, "num_prompt": 1, "tokens": min(MAX_COUNTED, max_model_len)}


def table_fields(vocab_size: int) -> dict[str, int]:
    """What `set_row_tables` takes."""
    return {
        "row": 1,
        "bias_ids": MAX_LOGIT_BIAS,
        "bias_values": MAX_LOGIT_BIAS,
        "bad_words": MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS,
        "allowed": -(-vocab_size // 32),
    }


def _split(packed: jax.Array, fields: dict[str, int]) -> dict[str, jax.Array]:
    parts, offset = {}, 0
    for name, length in fields.items():
        part = packed[offset] if length == 1 and name not in LIST_FIELDS else packed[offset : offset + length]
        parts[name] = jax.lax.bitcast_convert_type(part, jnp.float32) if name in FLOAT_FIELDS else part
        offset += length
    return parts


def admit_row(state: DecodeState, packed: Int[Array, " packed"]) -> DecodeState:
    """Gives a row to a sequence: scalars of its sampling, history, stop ids, its whole block table.

    Args:
        packed: int32, `row_fields` one after the other, floats as bits.

    Donates: state.
    """
    parts = _split(packed, row_fields(state.block_tables.shape[1]))
    row, reset, history = parts.pop("row"), parts.pop("reset_counts"), parts.pop("history")
    block_table = parts.pop("block_table")
    parts["key"] = jax.lax.bitcast_convert_type(parts["key"], jnp.uint32)

    def clear(array: jax.Array) -> jax.Array:
        return array.at[jnp.where(reset != 0, row, array.shape[0])].set(0, mode="drop")

    return replace(
        state,
        ended=state.ended.at[row].set(False),
        block_tables=state.block_tables.at[row].set(block_table),
        history=state.history.at[row].set(history),
        prompt_seen=clear(state.prompt_seen),
        output_counts=clear(state.output_counts),
        sampling=_set_row(state.sampling, row, parts),
    )


def count_stored(state: DecodeState, packed: Int[Array, " packed"], *, max_model_len: int) -> DecodeState:
    """Counts tokens of a row as fed that will not be, because their keys and values are stored.

    Only for rows with penalties, after `admit_row`.

    Args:
        packed: int32, `count_fields` one after the other.

    Donates: state.
    Static: max_model_len.
    """
    parts = _split(packed, count_fields(max_model_len))
    tokens, num_rows = parts["tokens"], state.last_token.shape[0]
    place = jnp.arange(len(tokens), dtype=jnp.int32)
    row = jnp.where(place < parts["count"], parts["row"], num_rows)
    is_prompt = parts["start"] + place < parts["num_prompt"]
    prompt_row, output_row = jnp.where(is_prompt, row, num_rows), jnp.where(is_prompt, num_rows, row)
    return replace(
        state,
        prompt_seen=state.prompt_seen.at[prompt_row, tokens].set(jnp.uint8(1), mode="drop"),
        output_counts=state.output_counts.at[output_row, tokens].add(1, mode="drop"),
    )


def set_row_tables(state: DecodeState, packed: Int[Array, " packed"]) -> DecodeState:
    """Fills a row's wide tables: logit bias, bad words, allowed ids. Only for rows that ask for one.

    Args:
        packed: int32, `table_fields(vocab_size)` one after the other, floats as bits.

    Donates: state.
    """
    parts = _split(packed, table_fields(state.prompt_seen.shape[1]))
    row = parts.pop("row")
    parts["allowed"] = jax.lax.bitcast_convert_type(jnp.atleast_1d(parts["allowed"]), jnp.uint32)
    parts["bad_words"] = parts["bad_words"].reshape(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
    return replace(state, sampling=_set_row(state.sampling, row, parts))


def _set_row(sampling: SamplingState, row: jax.Array, values: dict[str, jax.Array]) -> SamplingState:
    return replace(sampling, **{name: getattr(sampling, name).at[row].set(value) for name, value in values.items()})
