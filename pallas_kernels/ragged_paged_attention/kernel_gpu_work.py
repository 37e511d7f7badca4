"""What the GPU attention kernel works on: its static sizes, and the list of work of one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import is_fp8
from pallas_kernels.gpu_generations import Generation
from pallas_kernels.mosaic_gpu import ROWS
from pallas_kernels.ragged_paged_attention.tuning_gpu import Tiles, columns_of_slot, terms_of


class Sizes(NamedTuple):
    """Static sizes and options of one attention kernel."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    block_size: int
    table_width: int
    num_rows: int
    q_dtype: Any
    kv_dtype: Any
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool
    tiles: Tiles
    generation: Generation

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def queries_of_tile(self) -> int:
        return ROWS // self.group

    @property
    def columns(self) -> int:
        """Of a slot of the ring."""
        return columns_of_slot(self.head_dim, self.kv_dtype)

    @property
    def parts(self) -> int:
        """Slots that a head's keys take, and pieces that its values are worked on in, each with all keys."""
        return self.head_dim // self.columns

    @property
    def rows_of_copy(self) -> int:
        """What of a tile's keys lies in one block."""
        return min(self.block_size, self.tiles.kv_tile)

    @property
    def copies_of_slot(self) -> int:
        return self.tiles.kv_tile // self.rows_of_copy

    @property
    def q_terms(self) -> int:
        return terms_of(self.q_dtype)

    @property
    def kv_terms(self) -> int:
        return terms_of(self.kv_dtype)

    @property
    def converts(self) -> bool:
        """Whether keys and values are turned into bfloat16 before they are multiplied."""
        return jnp.dtype(self.kv_dtype) != jnp.bfloat16

    @property
    def has_scales(self) -> bool:
        """Whether stored keys and values are to be multiplied by scales."""
        return is_fp8(self.kv_dtype)

    @property
    def max_splits(self) -> int:
        """Splits of the longest sequence that a row of the tables holds."""
        return -(-self.table_width * self.block_size // self.tiles.kv_split)

    @property
    def splits_held(self) -> int:
        """Places for states of splits; none where no sequence has two."""
        return min(self.tiles.max_splits_held, self.num_rows * self.max_splits) if self.max_splits > 1 else 0


# Fields of an item of work, i32[8].
ROW, TOKEN, QUERIES, POSITION, FIRST_SPLIT, END_SPLIT, PLACE, LENGTH = range(8)


class Work(NamedTuple):
    """The list of work of one call.

    Attributes:
        items: i32[W, 8], see the names of its columns: queries TOKEN ... TOKEN + QUERIES - 1 of the stream, the
            first at POSITION of the sequence in ROW, which has LENGTH keys, over splits FIRST_SPLIT ... END_SPLIT - 1.
            PLACE is where its state goes, or -1 for an output. Padding of the stream has no splits and gives zeros.
        num_items: i32[1] how many of them there are.
        cut: i32[2, S] by row, how many splits it was cut into, 0 if it was not, and the place of the first.
    """

    items: jax.Array
    num_items: jax.Array
    cut: jax.Array


def list_work(
    sizes: Sizes, seq_lens: jax.Array, cu_q_lens: jax.Array, num_seqs: jax.Array, num_decode: jax.Array
) -> Work:
    """Tiles of queries, and, for decoding sequences while there is little else to do, their splits one by one.

    Whether a sequence is cut does not change a bit: uncut, its splits are summed and merged in the same order.
    """
    tiles, per_tile = sizes.tiles, sizes.queries_of_tile
    rows = jnp.arange(sizes.num_rows, dtype=jnp.int32)
    lengths = jnp.where(rows < num_seqs[0], cu_q_lens[1:] - cu_q_lens[:-1], 0)
    query_tiles = _up(lengths, per_tile)
    first = _first_split(sizes, seq_lens - 1)
    splits = jnp.where((rows < num_decode[0]) & (lengths > 0), _up(seq_lens, tiles.kv_split) - first, 0)
    splits = jnp.where(splits > 1, splits, 0)
    uncut_jobs = jnp.sum(query_tiles) * (sizes.num_kv_heads * sizes.parts)
    cutting = (uncut_jobs < tiles.cut_below * tiles.workers) & (jnp.sum(splits) <= sizes.splits_held)
    splits = jnp.where(cutting, splits, 0)
    places = jnp.cumsum(splits) - splits
    padding = sizes.num_tokens - cu_q_lens[-1]
    counts = jnp.append(jnp.where(splits > 0, splits, query_tiles), _up(padding, per_tile)).astype(jnp.int32)
    ends = jnp.cumsum(counts).astype(jnp.int32)

    most = sizes.num_tokens // per_tile + sizes.num_rows + 1 + sizes.splits_held
    item = jnp.arange(most, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(ends, item, side="right", method="compare_all"), sizes.num_rows)
    nth = item - (ends - counts)[owner]
    row = jnp.minimum(owner, sizes.num_rows - 1)
    is_padding, is_cut = owner == sizes.num_rows, (splits[row] > 0) & (owner < sizes.num_rows)
    later = jnp.where(is_padding, nth, query_tiles[row] - 1 - nth)  # a chunk's last tiles see the most keys: first
    begin = jnp.where(is_cut, 0, later * per_tile)
    queries = jnp.where(is_padding, padding, lengths[row]) - begin
    queries = jnp.minimum(queries, per_tile)
    position = seq_lens[row] - lengths[row] + begin
    first_split = jnp.where(is_cut, first[row] + nth, _first_split(sizes, position))
    end_split = jnp.where(is_cut, first_split + 1, _up(position + queries, tiles.kv_split))
    none = jnp.zeros_like(item)
    columns = (
        row,
        cu_q_lens[owner] + begin,
        queries,
        jnp.where(is_padding, 0, position),
        jnp.where(is_padding, none, first_split),
        jnp.where(is_padding, none, end_split),
        jnp.where(is_cut, places[row] + nth, -1),
        jnp.where(is_padding, 1, seq_lens[row]),
    )
    items = jnp.stack([column.astype(jnp.int32) for column in columns], axis=-1)
    cut = jnp.stack([splits, places]).astype(jnp.int32)
    return Work(items, ends[-1:], cut)


def _first_split(sizes: Sizes, position: jax.Array) -> jax.Array:
    """The first split of which a query at `position`, or one after it, sees a key."""
    if sizes.window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - sizes.window + 1, 0) // sizes.tiles.kv_split


def _up(number: jax.Array, by: int) -> jax.Array:
    return (number + by - 1) // by
