"""What follows the hidden states of a step: logits, a token for each row that asks, and what the row's state says then.

Over several devices each has the logits of its part of the vocabulary for all rows. One all-to-all gives it whole rows
instead, a share of them, which it samples as one device would; a token a row is all that is gathered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxserve.models.decoder import logits
from jaxserve.ops.beams import no_beams, select_beams
from jaxserve.ops.logprobs import pack_logprobs
from jaxserve.ops.sampling import sample
from jaxserve.ops.tiles import in_tiles, past_last
from jaxserve.parallel.axis import ONE_DEVICE, Axis
from jaxserve.state import BEAM, LOGPROB_COLUMNS, LOGPROBS, BeamState, DecodeState, StepBatch, StepShape

# tokens with failures, logprobs, the state's last_token and ended, its beams, their answer
NextTokens = tuple[jax.Array, jax.Array, jax.Array, jax.Array, BeamState, jax.Array]


def sample_next_tokens(
    params: dict[str, Any],
    hidden: jax.Array,
    state: DecodeState,
    batch: StepBatch,
    shape: StepShape,
    vocab_size: int,
    axis: Axis = ONE_DEVICE,
) -> NextTokens:
    """Logits, tokens, and what follows from them, of the rows that ask."""
    index = axis.pad(jnp.minimum(batch.sample_index, shape.num_tokens - 1))
    positions = batch.positions[index] + 1
    num_asked = past_last(batch.sample_rows < shape.max_rows)
    raw = logits(params, hidden[index], num_asked[None])
    raw = axis.own_whole(raw, vocab_size)  # [S, V], or this device's share of S
    rows = axis.own(axis.pad(batch.sample_rows, shape.max_rows))

    def sample_rows(raw: jax.Array, rows: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sample(raw, state, rows, positions, batch.features)

    tile = shape.sample_tile
    own_tokens, own_finite = in_tiles(sample_rows, (raw, rows, axis.own(positions)), num_asked, tile)
    tokens, finite = _gathered(own_tokens, own_finite, shape.num_samples, axis)
    positions = positions[: shape.num_samples]
    tokens, beams, beam_answer = jax.lax.cond(
        (batch.features & BEAM) != 0,
        lambda: select_beams(raw, tokens, state, batch.sample_rows, axis, num_asked=num_asked, tile=tile),
        lambda: no_beams(tokens, state),
    )
    return (
        jnp.stack([tokens, (~finite).astype(jnp.int32)], axis=-1),
        jax.lax.cond(
            (batch.features & LOGPROBS) != 0,
            lambda: axis.gather(
                in_tiles(pack_logprobs, (raw, axis.own(axis.pad(tokens))), num_asked, tile), shape.num_samples
            ),
            lambda: jnp.zeros((shape.num_samples, LOGPROB_COLUMNS), jnp.int32),
        ),
        state.last_token.at[batch.sample_rows].set(tokens, mode="drop"),
        state.ended.at[batch.sample_rows].set(_ends(state, batch, tokens, positions, finite), mode="drop"),
        beams,
        beam_answer,
    )


def _gathered(
    tokens: Int[Array, " own"], finite: Bool[Array, " own"], num_samples: int, axis: Axis
) -> tuple[Int[Array, " samples"], Bool[Array, " samples"]]:
    """Every device's, in one all-gather."""
    if axis.size == 1:
        return tokens, finite
    columns = axis.gather(jnp.stack([tokens, finite.astype(jnp.int32)], axis=-1), num_samples)
    return columns[:, 0], columns[:, 1] != 0


def no_next_tokens(state: DecodeState, shape: StepShape) -> NextTokens:
    """What `sample_next_tokens` returns for a step that samples nothing."""
    none = jnp.zeros((shape.num_samples, 2), jnp.int32)
    logprobs = jnp.zeros((shape.num_samples, LOGPROB_COLUMNS), jnp.int32)
    _, beams, beam_answer = no_beams(none[:, 0], state)
    return none, logprobs, state.last_token, state.ended, beams, beam_answer


def _ends(
    state: DecodeState, batch: StepBatch, tokens: jax.Array, positions: jax.Array, finite: jax.Array
) -> Bool[Array, " samples"]:
    """Which rows' sequences end with what they sampled, as `scheduler.finish` will say of them a step later.

    Args:
        positions: where the tokens will stand.
    """
    row, s = jnp.minimum(batch.sample_rows, state.last_token.shape[0] - 1), state.sampling
    lengths = positions + 1
    stops = jnp.any(s.stop_ids[row] == tokens[:, None], axis=-1) & (lengths >= s.min_position[row])
    ends = stops | (lengths >= s.max_len[row]) | ~finite
    return ends & ((s.features[row] & BEAM) == 0)
