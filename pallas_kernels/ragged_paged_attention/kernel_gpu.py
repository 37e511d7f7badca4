"""The GPU's attention in Mosaic GPU: one kernel for decode and chunks, one to merge splits."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu
from pallas_kernels.common import as_scale
from pallas_kernels.gpu_generations import Generation, generation_here
from pallas_kernels.mosaic_gpu import ROWS, Registers, type_of
from pallas_kernels.mosaic_gpu_copies import Copies
from pallas_kernels.ragged_paged_attention.kernel_gpu_fold import attention_body
from pallas_kernels.ragged_paged_attention.kernel_gpu_merge import WARPGROUPS, MergeRefs, merge_body
from pallas_kernels.ragged_paged_attention.kernel_gpu_ring import Scratch, scratch_of
from pallas_kernels.ragged_paged_attention.kernel_gpu_state import LOG2_E
from pallas_kernels.ragged_paged_attention.kernel_gpu_work import Sizes, list_work
from pallas_kernels.ragged_paged_attention.tuning_gpu import Tiles, check_tiles, default_tiles


class Refs(NamedTuple):
    """Device memory of the attention kernel."""

    q: Any
    pool: Any
    tables: Any
    items: Any
    num_items: Any
    scales: Any
    sinks: Any
    out: Any
    values: Any = None
    tops: Any = None
    totals: Any = None


def attention_gpu(
    q: jax.Array,
    cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
    generation: Generation | None = None,
) -> jax.Array:
    """`api.ragged_paged_attention`, whose checks have been made.

    Args:
        generation: whose instructions run; None: this process's GPU's.
    """
    generation = generation or generation_here("ragged_paged_attention", interpreted=bool(interpret))
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = cache.shape
    tiles = tiles or default_tiles(head_dim, q.dtype, cache.dtype, generation)
    check_tiles(tiles, head_dim, q.dtype, cache.dtype, generation)
    sizes = Sizes(
        num_tokens, num_heads, num_kv_heads, head_dim, num_blocks, block_size, block_tables.shape[1],
        block_tables.shape[0], q.dtype, cache.dtype, scale, window, softcap, sinks is not None, tiles, generation,
    )  # fmt: skip
    work = list_work(sizes, seq_lens, cu_q_lens, num_seqs, num_decode)
    operands = (
        rows_by_kv_head(sizes, q),
        cache.reshape(num_blocks * block_size, num_kv_heads * 2 * head_dim),
        block_tables,
        work.items,
        work.num_items,
        jnp.concatenate([as_scale(k_scale), as_scale(v_scale)]),
        sinks_by_row(sizes, sinks),
    )
    out, *states = _attend(sizes, operands, interpret)
    if states:
        out = _merge(sizes, (work.cut, num_decode, *states, *operands[-2:]), out, interpret)
    return out.reshape(num_tokens, num_heads, head_dim)


@partial(jax.jit, static_argnames=("sizes", "interpret"))
def _attend(sizes: Sizes, operands: tuple[Any, ...], interpret: Any) -> Any:
    registers, copies = Registers(bool(interpret), sizes.generation), Copies(bool(interpret), sizes.generation)

    def body(*refs: Any) -> None:
        count = len(operands) + len(out_type)
        attention_body(sizes, registers, copies, Refs(*refs[:count]), Scratch(*refs[count:]))

    rows = sizes.splits_held * sizes.num_heads
    groups = sizes.splits_held * sizes.num_kv_heads
    out_type = [type_of((sizes.num_tokens * sizes.num_heads, sizes.head_dim), sizes.q_dtype)]
    if sizes.splits_held:
        out_type += [type_of((rows, sizes.head_dim), jnp.float32)] + 2 * [type_of((groups, ROWS), jnp.float32)]
    return mosaic_gpu.call(
        body,
        operands,
        out_type=out_type,
        scratch=scratch_of(sizes, copies),
        num_ctas=sizes.tiles.num_ctas,
        warpgroups=2 * sizes.tiles.lanes,
        interpret=interpret,
        name="ragged_paged_attention",
    )


@partial(jax.jit, static_argnames=("sizes", "interpret"))
def _merge(sizes: Sizes, operands: tuple[Any, ...], out: jax.Array, interpret: Any) -> jax.Array:
    def body(*refs: Any) -> None:
        merge_body(sizes, Registers(bool(interpret), sizes.generation), MergeRefs(*refs))

    target = mosaic_gpu.in_place(out)
    mosaic_gpu.call(
        body,
        (*operands, target),
        num_ctas=sizes.tiles.num_ctas,
        warpgroups=WARPGROUPS,
        interpret=interpret,
        name="ragged_paged_attention_merge",
    )
    return jax.freeze(target)


def rows_by_kv_head(sizes: Sizes, q: jax.Array) -> jax.Array:
    """[K T G + 64, H]: the query heads of a kv head beside each other for token after token, so that a tile of
    queries is 64 rows; 64 rows of 0 at the end, so that each tile is whole."""
    grouped = q.reshape(sizes.num_tokens, sizes.num_kv_heads, sizes.group, sizes.head_dim).transpose(1, 0, 2, 3)
    return jnp.pad(grouped.reshape(-1, sizes.head_dim), ((0, ROWS), (0, 0)))


def sinks_by_row(sizes: Sizes, sinks: jax.Array | None) -> jax.Array:
    """f32[K, 64] each row's sink times log2 e."""
    if sinks is None:
        return jnp.zeros((1, ROWS), jnp.float32)
    per_head = sinks.reshape(sizes.num_kv_heads, sizes.group) * jnp.float32(LOG2_E)
    return per_head[:, jnp.arange(ROWS) % sizes.group]
