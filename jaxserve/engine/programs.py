"""The programs of an engine: which there are, for which shapes, and over which devices. Nothing is compiled here.

A fixed set: one program for each token bucket, three for admission, and for beams and for moving blocks one or a few
by size. Over several devices each is the same function under `jax.shard_map`: parameters and cache are cut, all else is
on every device, and what collectives there are stand in the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.engine.beams import follow_sizes
from jaxserve.models.params import decoder_specs
from jaxserve.ops.beams import follow_beams, start_beams
from jaxserve.ops.blocks import copy_blocks, gather_blocks, scatter_blocks
from jaxserve.parallel.axis import Axis
from jaxserve.parallel.mesh import mesh_of
from jaxserve.parallel.rules import MESH_AXIS, partition_spec
from jaxserve.parallel.specs import map_specs
from jaxserve.state import DecodeState, KVCache, StepShape, init_decode_state, init_kv_cache
from jaxserve.steps import admit_row, count_fields, count_stored, row_fields, set_row_tables, step, table_fields
from jaxserve.types import MAX_BEAM_WIDTH
from pallas_kernels.common import tpu_pool_format

SAMPLE_TILE = 8  # rows of the sampler: XLA:CPU sums and computes exp of fewer otherwise, and one stream pays for all

Programs = dict[str, partial[Any]]  # name -> lowering, with the arguments' shapes

_WHOLE = PartitionSpec()
_CACHE = PartitionSpec(None, None, MESH_AXIS, None)  # of each layer [P, C, K, 2H], or of all in one array
_PAYLOAD = PartitionSpec(None, None, None, MESH_AXIS, None)  # of blocks [n, L, C, K, 2H]


def step_shape(limits: EngineLimits, num_tokens: int) -> StepShape:
    return StepShape(
        num_tokens=num_tokens,
        max_rows=limits.max_num_seqs,
        max_blocks=limits.max_blocks_per_row,
        block_size=limits.block_size,
        q_tile=min(limits.q_tile, num_tokens),
        kv_tile=limits.kv_tile,
        sample_tile=SAMPLE_TILE if limits.skips_padding else None,
        max_steps=limits.max_decode_steps if num_tokens <= limits.decode_bucket else 1,
        attention=limits.attention,
    )


def copy_sizes(limits: EngineLimits) -> tuple[int, ...]:
    """Numbers of blocks that copies are compiled for: a few, and one for each row."""
    return tuple(sorted({min(8, limits.max_num_seqs), limits.max_num_seqs}))


def engine_programs(params: Any, model: ModelConfig, limits: EngineLimits) -> Programs:
    """Every program of an engine, the longest compilations first.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings: their shapes and devices are what is compiled for.
    """
    memory = _Memory.of(params, model, limits)
    params = jax.tree.map(_abstract, params)
    return (
        _step_programs(params, memory, model, limits)
        | _state_programs(memory, model, limits)
        | _block_programs(memory, limits)
        | {"empty": memory.empty}
    )


@dataclass(frozen=True, slots=True)
class _Memory:
    """Cache and state as shapes, where they lie, and the program that makes them.

    One program, where a score of eager operations would take 0.7 s of a core to compile.
    """

    mesh: Mesh | None
    kv: KVCache
    state: DecodeState
    pool: Any  # where and how the cache lies, if it must be said: the TPU kernels want heads before tokens
    empty: partial[Any]

    @classmethod
    def of(cls, params: Any, model: ModelConfig, limits: EngineLimits) -> _Memory:
        mesh, on_params = mesh_of(params), jax.tree.leaves(params)[0].sharding
        as_bits = next(iter(on_params.device_set)).platform == "cpu"
        num_devices = 1 if mesh is None else mesh.size

        def empty() -> tuple[KVCache, DecodeState]:
            kv = init_kv_cache(
                model,
                limits.num_blocks,
                limits.block_size,
                limits.kv_dtype,
                as_bits=as_bits,
                num_devices=num_devices,
                stacked=limits.stacked_layers,
            )
            return kv, init_decode_state(limits.max_num_seqs, limits.max_blocks_per_row, model.vocab_size)

        parts = [on_params, on_params] if mesh is None else [NamedSharding(mesh, p) for p in (_CACHE, _WHOLE)]
        if limits.attention == "tpu":
            parts[0] = tpu_pool_format(parts[0])
        kv, state = (
            jax.tree.map(lambda array, s=sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=s), tree)
            for tree, sharding in zip(jax.eval_shape(empty), parts, strict=True)
        )
        pool = parts[0] if limits.attention == "tpu" else None
        return cls(mesh, kv, state, pool, partial(jax.jit(empty, out_shardings=tuple(parts)).lower))

    def ints(self, length: int) -> jax.ShapeDtypeStruct:
        """The shape of a packed array."""
        return self.array((length,), jnp.int32, _WHOLE)

    def array(self, shape: tuple[int, ...], dtype: Any, parts: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = None if self.mesh is None else NamedSharding(self.mesh, parts)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def jit(self, function: Callable, donate: tuple[int, ...], num_others: int = 0) -> Any:
        """A program that gives back the cache, and so many other results after it."""
        if self.pool is None:
            return jax.jit(function, donate_argnums=donate)
        gives = (self.pool, *(None,) * num_others) if num_others else self.pool
        return jax.jit(function, donate_argnums=donate, out_shardings=gives)

    def spread(self, function: Callable, takes: tuple[Any, ...], gives: Any) -> Callable:
        """`function` of one device's parts as a function of whole arrays.

        What is said to come back whole is whole because every device computes the same; jax is not asked to prove it
        (check_vma), which it cannot in a `cond` or a `while_loop`.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False)


def _step_programs(params: Any, memory: _Memory, model: ModelConfig, limits: EngineLimits) -> Programs:
    programs: Programs = {}
    axis = Axis(1 if memory.mesh is None else memory.mesh.size)
    cut = map_specs(partition_spec, decoder_specs(model, axis.size, stacked=limits.stacked_layers))
    for num_tokens in reversed(limits.token_buckets):
        shape = step_shape(limits, num_tokens)
        function = partial(step, config=model, shape=shape, max_model_len=limits.max_model_len, axis=axis)
        function = memory.spread(function, (cut, _CACHE, _WHOLE, _WHOLE), (_CACHE, _WHOLE, _WHOLE))
        jitted = memory.jit(function, donate=(1, 2), num_others=2)
        packed = memory.ints(shape.packed_len)
        programs[f"step[{num_tokens}]"] = partial(jitted.lower, params, memory.kv, memory.state, packed)
    return programs


def _state_programs(memory: _Memory, model: ModelConfig, limits: EngineLimits) -> Programs:
    """Programs that change the decode state alone."""
    programs: Programs = {}
    for name, function, fields in (
        ("admit", admit_row, row_fields(limits.max_blocks_per_row)),
        ("set_tables", set_row_tables, table_fields(model.vocab_size)),
        (
            "count_stored",
            partial(count_stored, max_model_len=limits.max_model_len),
            count_fields(limits.max_model_len),
        ),
        ("start_beams", start_beams, {"rows": MAX_BEAM_WIDTH}),
    ):
        jitted = jax.jit(memory.spread(function, (_WHOLE, _WHOLE), _WHOLE), donate_argnums=(0,))
        programs[name] = partial(jitted.lower, memory.state, memory.ints(sum(fields.values())))
    return programs


def _block_programs(memory: _Memory, limits: EngineLimits) -> Programs:
    """Programs that move whole blocks."""
    programs: Programs = {}
    kv, ints = memory.kv, memory.ints
    function = partial(follow_beams, block_size=limits.block_size)
    function = memory.spread(function, (_CACHE, _WHOLE, _WHOLE), (_CACHE, _WHOLE))
    follow = memory.jit(function, donate=(0, 1), num_others=1)
    for size in follow_sizes(limits.max_num_seqs):
        programs[f"follow_beams[{size}]"] = partial(follow.lower, kv, memory.state, ints(2 * size))
    copy = memory.jit(memory.spread(copy_blocks, (_CACHE, _WHOLE), _CACHE), donate=(0,))
    for size in copy_sizes(limits):
        programs[f"copy[{size}]"] = partial(copy.lower, kv, ints(2 * size))
    gather = jax.jit(memory.spread(gather_blocks, (_CACHE, _WHOLE), _PAYLOAD))
    scatter = memory.jit(memory.spread(scatter_blocks, (_CACHE, _PAYLOAD, _WHOLE), _CACHE), donate=(0,))
    for size in limits.swap_buckets:
        payload = memory.array((size, *kv.block_shape), kv.layers[0].dtype, _PAYLOAD)
        programs[f"gather[{size}]"] = partial(gather.lower, kv, ints(size))
        programs[f"scatter[{size}]"] = partial(scatter.lower, kv, payload, ints(size))
    return programs


def _abstract(array: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))
