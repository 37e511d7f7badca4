"""Logprobs of the raw logits, packed as int32 columns so that one array brings ids and floats.

Columns: 0 the token's logprob (float bits), 1 its rank, 2..21 the likeliest ids, 22..41 their
logprobs (float bits). A token's logprob is the same float wherever it appears: clients compare them
with `==`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.layers.largest import largest
from jaxserve.layers.stable_sum import log_sum_exp
from jaxserve.models.decoder import logits as compute_logits
from jaxserve.ops.tiles import in_tiles, past_last
from jaxserve.parallel.axis import ONE_DEVICE, Axis
from jaxserve.types import MAX_LOGPROBS, TokenLogprobs

_PROMPT_TILE = 64  # prompt positions whose logits exist at once: 64 x 150k float32 are 39 MB


def pack_logprobs(
    logits: Float[Array, "samples vocab"], tokens: Int[Array, " samples"]
) -> Int[Array, "samples columns"]:
    """int32 [S, 42] for the given token of each row."""
    log_total = log_sum_exp(logits)[:, None]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = jnp.sum(logits >= chosen, axis=-1, keepdims=True, dtype=jnp.int32)
    num_top = min(MAX_LOGPROBS, logits.shape[-1])
    values, ids = largest(logits, num_top)
    pad = ((0, 0), (0, MAX_LOGPROBS - num_top))
    as_bits = lambda x: jax.lax.bitcast_convert_type(x - log_total, jnp.int32)  # noqa: E731
    return jnp.concatenate([as_bits(chosen), rank, jnp.pad(ids, pad), jnp.pad(as_bits(values), pad)], axis=-1)


def pack_prompt_logprobs(
    params: dict[str, Any],
    hidden: Float[Array, "tokens hidden"],
    targets: Int[Array, " tokens"],
    vocab_size: int,
    axis: Axis = ONE_DEVICE,
) -> Int[Array, "tokens columns"]:
    """int32 [T, 42]: for each token of the stream, the logprobs of the token that follows it; anything where none does.

    Args:
        axis: the devices that the vocabulary is cut over; each takes a share of the tokens.
    """
    num_tokens = len(hidden)
    tile = min(_PROMPT_TILE, num_tokens)
    tile += -tile % axis.size
    pad = -num_tokens % tile

    def pack(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = axis.own_whole(compute_logits(params, hidden), vocab_size)
        return axis.gather(pack_logprobs(logits, axis.own(jnp.maximum(targets, 0))), len(targets))

    arrays = jnp.pad(hidden, ((0, pad), (0, 0))), jnp.pad(targets, (0, pad))
    return in_tiles(pack, arrays, past_last(targets >= 0), tile)[:num_tokens]


def unpack_logprobs(packed: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """One row of packed columns (host side) as a value with its `num_top` likeliest tokens."""
    floats = packed.view(np.float32)
    first = 2 + MAX_LOGPROBS
    ids = packed[2 : 2 + num_top].tolist()
    values = floats[first : first + num_top].tolist()
    return TokenLogprobs(token_id, float(floats[0]), int(packed[1]), tuple(zip(ids, values, strict=True)))
