"""Choosing and continuing the beams of every search, on the device, so that the next step need not wait.

A search's k beams are k rows; all of them are fed in the same step. `select_beams` ranks their continuations within
the step. `follow_beams` runs before the next step: each row takes over the blocks of the beam that it continues.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers.largest import largest
from jaxserve.layers.stable_sum import log_sum_exp
from jaxserve.ops.tiles import in_tiles
from jaxserve.parallel.axis import ONE_DEVICE, Axis
from jaxserve.state import BEAM, BEAM_COLUMNS, BeamState, DecodeState, KVCache
from jaxserve.types import MAX_BEAM_WIDTH

# The first step's beams are equal: all but one are put so far behind that each token is chosen once. A finite number,
# so that a real continuation always goes before a place that pads a narrow search.
_BEHIND = -1e9
_TOP_BLOCK = 128  # tokens a block of the two-level search for the likeliest


def select_beams(
    logits: Float[Array, "own vocab"],
    tokens: Int[Array, " samples"],
    state: DecodeState,
    rows: Int[Array, " samples"],
    axis: Axis = ONE_DEVICE,
    *,
    num_asked: Int[Array, ""] | None = None,
    tile: int | None = None,
) -> tuple[Int[Array, " samples"], BeamState, Int[Array, "samples columns"]]:
    """Each search's likeliest continuations that do not stop become its beams, the likeliest in the row of beam 0.

    Equal sums rank by beam, then by logprob, then by token id, wherever the rows lie.

    Args:
        logits: raw, float32, of all samples or of this device's share of them.
        tokens: what rows without beams sampled.
        rows: each sample's row; R for padding. All beams of a search are among them.
        axis: the devices that share the samples.
        num_asked, tile: how many rows, at the beginning, hold a sample, and how many are looked at at once; None for
            all.

    Returns:
        The tokens, those of beams replaced; scores and parents brought up to date; and an answer for the host,
        `BEAM_COLUMNS` wide: parent row, bits of the score, the tokens with which the beam before the step is likeliest
        to stop (-1 pads), bits of the scores with them.
    """
    num_rows = state.last_token.shape[0]
    row = jnp.minimum(rows, num_rows - 1)
    is_beam = (rows < num_rows) & ((state.sampling.features[row] & BEAM) != 0)
    continuations = in_tiles(
        lambda logits, row: _continuations(logits, state, row),
        (logits, axis.own(axis.pad(row))),
        jnp.int32(len(rows)) if num_asked is None else num_asked,
        tile,
    )
    sums, ids, stop_sums, stop_tokens = (axis.gather(found, len(rows)) for found in continuations)
    slot, place, score = _rank(sums, state, row, rows)
    parent = jnp.take_along_axis(state.beams.peers[row], slot[:, None], axis=-1)[:, 0]
    parent = jnp.where(is_beam & (parent >= 0), parent, row)  # only NaN can lead past the search's beams
    token = ids[_sample_of(rows, num_rows)[parent], place]
    target = jnp.where(is_beam, rows, num_rows)
    beams = replace(
        state.beams,
        scores=state.beams.scores.at[target].set(score, mode="drop"),
        parents=state.beams.parents.at[target].set(parent, mode="drop"),
    )
    answer = jnp.concatenate([parent[:, None], _bits(score)[:, None], stop_tokens, _bits(stop_sums)], axis=-1)
    return jnp.where(is_beam, token, tokens), beams, answer


def _continuations(
    logits: Float[Array, "own vocab"], state: DecodeState, row: Int[Array, " own"]
) -> tuple[Array, Array, Array, Array]:
    """Each beam's likeliest ways to go on, sums and tokens, and to stop, the same."""
    before = state.beams.scores[row]
    norm = log_sum_exp(logits)
    stop_ids = state.sampling.stop_ids[row]
    going = logits.at[jnp.arange(len(row))[:, None], stop_ids].set(-jnp.inf, mode="drop")
    values, ids = likeliest(going, MAX_BEAM_WIDTH)
    stop_tokens, stop_values = _likeliest_stops(logits, stop_ids)
    sums, stop_sums = (before[:, None] + (found - norm[:, None]) for found in (values, stop_values))
    return sums, ids, stop_sums, stop_tokens


def no_beams(
    tokens: Int[Array, " samples"], state: DecodeState
) -> tuple[Int[Array, " samples"], BeamState, Int[Array, "samples columns"]]:
    """What `select_beams` returns for a step without beams."""
    return tokens, state.beams, jnp.zeros((len(tokens), BEAM_COLUMNS), jnp.int32)


def _sample_of(rows: Int[Array, " samples"], num_rows: int) -> Int[Array, " rows"]:
    """Which sample is each row's."""
    return jnp.zeros((num_rows,), jnp.int32).at[rows].set(jnp.arange(len(rows), dtype=jnp.int32), mode="drop")


def _rank(
    sums: Float[Array, "samples places"], state: DecodeState, row: Int[Array, " samples"], rows: Int[Array, " samples"]
) -> tuple[Int[Array, " samples"], Int[Array, " samples"], Float[Array, " samples"]]:
    """Of its search's candidates, the one that each row's beam gets: which beam's, which of that, and its sum."""
    num_places = sums.shape[1]
    peers = state.beams.peers[row]
    samples = _sample_of(rows, state.last_token.shape[0])[jnp.maximum(peers, 0)]
    pool = jnp.where(peers[:, :, None] >= 0, sums[samples], -jnp.inf).reshape(len(rows), -1)
    best, index = largest(pool, num_places)
    mine = jnp.minimum(state.beams.index[row], num_places - 1)[:, None]
    index = jnp.take_along_axis(index, mine, axis=-1)[:, 0]
    return index // num_places, index % num_places, jnp.take_along_axis(best, mine, axis=-1)[:, 0]


def likeliest(
    x: Float[Array, "samples vocab"], num: int
) -> tuple[Float[Array, "samples num"], Int[Array, "samples num"]]:
    """The `num` largest of each row, descending, and where they stand; equal ones in ascending order of index.

    The `num` blocks of 128 with the largest maxima hold them: any other block's elements are no larger than each of
    these maxima, and where equal, later. So a top-k runs over V / 128 maxima and num * 128 elements, and one
    vectorised pass over the rest.
    """
    num_rows, vocab = x.shape
    if vocab <= 2 * num * _TOP_BLOCK:
        return largest(x, min(num, vocab))
    blocks = jnp.pad(x, ((0, 0), (0, -vocab % _TOP_BLOCK)), constant_values=-jnp.inf)
    blocks = blocks.reshape(num_rows, -1, _TOP_BLOCK)
    _, chosen = largest(jnp.max(blocks, axis=-1), num)
    chosen = jnp.sort(chosen, axis=-1)
    inside = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(num_rows, -1)
    values, index = largest(inside, num)
    block = jnp.take_along_axis(chosen, index // _TOP_BLOCK, axis=-1)
    return values, block * _TOP_BLOCK + index % _TOP_BLOCK


def _likeliest_stops(
    logits: Float[Array, "samples vocab"], stop_ids: Int[Array, "samples stops"]
) -> tuple[Int[Array, "samples places"], Float[Array, "samples places"]]:
    """Each row's likeliest stop tokens and their logits; as many as the widest search makes hypotheses in a step."""
    vocab = logits.shape[1]
    found = jnp.take_along_axis(logits, jnp.minimum(stop_ids, vocab - 1), axis=-1)
    values, index = largest(jnp.where(stop_ids < vocab, found, -jnp.inf), MAX_BEAM_WIDTH)
    return jnp.where(values > -jnp.inf, jnp.take_along_axis(stop_ids, index, axis=-1), -1), values


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def start_beams(state: DecodeState, rows: Int[Array, " width"]) -> DecodeState:
    """Makes rows the beams of one search, before the step that first selects.

    Args:
        rows: [16] in order of the beams; -1 pads.

    Donates: state.
    """
    num_rows = state.last_token.shape[0]
    target = jnp.where(rows >= 0, rows, num_rows)
    index = jnp.arange(MAX_BEAM_WIDTH, dtype=jnp.int32)
    peers = jnp.broadcast_to(rows, (MAX_BEAM_WIDTH, MAX_BEAM_WIDTH))
    return replace(
        state,
        beams=BeamState(
            peers=state.beams.peers.at[target].set(peers, mode="drop"),
            index=state.beams.index.at[target].set(index, mode="drop"),
            scores=state.beams.scores.at[target].set(jnp.where(index == 0, 0.0, _BEHIND), mode="drop"),
            parents=state.beams.parents.at[target].set(rows, mode="drop"),
        ),
    )


def follow_beams(
    kv: KVCache, state: DecodeState, packed: Int[Array, " packed"], *, block_size: int
) -> tuple[KVCache, DecodeState]:
    """Gives each row the tokens of the beam that it continues: full blocks are shared, the last one is copied.

    A row keeps the block that its next token goes to, if there is one; the host sees to it that this is the row's own.

    Args:
        packed: int32 [2n]: rows (R pads), whole searches of them, then the position that each feeds next.

    Donates: kv, state.
    """
    num_rows, num_blocks = state.last_token.shape[0], kv.num_blocks
    rows, positions = packed.reshape(2, -1)
    row = jnp.minimum(rows, num_rows - 1)
    parent = state.beams.parents[row]
    col = positions // block_size
    own, parents = state.block_tables[row], state.block_tables[parent]
    tables = jnp.where(jnp.arange(own.shape[1]) < col[:, None], parents, own)
    source = jnp.take_along_axis(parents, col[:, None], axis=-1)[:, 0]
    target = jnp.take_along_axis(own, col[:, None], axis=-1)[:, 0]
    target = jnp.where((rows < num_rows) & (positions % block_size != 0), target, num_blocks)
    source, target = kv.places(source), kv.places(target)
    layers = tuple(layer.at[target].set(layer[source], mode="drop") for layer in kv.layers)
    tables = state.block_tables.at[rows].set(tables, mode="drop")
    return replace(kv, layers=layers), replace(state, block_tables=tables)
