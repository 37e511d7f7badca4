"""Every GPU kernel through Mosaic GPU's own lowering at the sizes models have, on a machine without a GPU.

What runs is all that jax does in Python and MLIR: layouts of registers, tilings and swizzles of shared memory, shapes
and alignment of copies, operands of products, the shared memory that is asked for; which instructions a generation
gets. What does not: Mosaic GPU's passes from there to PTX, which are in jax's CUDA plugin, and NVIDIA's ptxas, both of
which run when the kernel is first called.
"""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from tests.portability.abstract_gpu import on_gpu

CONTEXT = 32_768
KERNEL = "mosaic_gpu"


def of(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def pool_of(block_size: int, num_kv_heads: int, head_dim: int, dtype: str) -> jax.ShapeDtypeStruct:
    return of((65_536 // block_size, block_size, num_kv_heads, 2 * head_dim), dtype)


def for_cuda(function: Any, *arguments: Any, **jit: Any) -> str:
    """The StableHLO of a program for CUDA, its kernels lowered."""
    return jax.jit(function, **jit).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(program: str) -> list[str]:
    return re.findall(rf"custom_call @{KERNEL}\w*", program)


def attention(
    rows: int = 64,
    tokens: int = 64,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    block_size: int = 64,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    **options: Any,
) -> str:
    arguments = (
        of((tokens, heads[0], head_dim), dtype),
        pool_of(block_size, heads[1], head_dim, kv_dtype or dtype),
        of((rows, CONTEXT // block_size)),
        of((rows,)),
        of((rows + 1,)),
        of((1,)),
        of((1,)),
    )
    if kv_dtype:
        options |= {"k_scale": 0.1, "v_scale": 0.1}
    has_sinks = options.pop("sinks", False)
    call = partial(ragged_paged_attention, scale=0.1, backend="gpu", **options)
    if not has_sinks:
        return for_cuda(call, *arguments)
    return for_cuda(lambda *args: call(*args[:-1], sinks=args[-1]), *arguments, of((heads[0],), "float32"))


ATTENTION = [
    *({"rows": rows, "tokens": rows, "head_dim": width} for rows, width in itertools.product((1, 64, 256), (64, 128))),
    *({"tokens": 2048, "head_dim": width, "dtype": dtype}
      for width, dtype in itertools.product((64, 128), ("bfloat16", "float32"))),
    *({"block_size": size} for size in (16, 32, 128)),
    *({"heads": (8 * group, 8), "block_size": 16} for group in (1, 3, 7, 16)),
    *({"kv_dtype": kind, "head_dim": width}
      for kind, width in itertools.product(("float8_e4m3fn", "float8_e5m2"), (64, 128, 256))),
    {"dtype": "float32", "kv_dtype": "float8_e4m3fn"},
    {"heads": (16, 8), "head_dim": 256, "window": 1024, "softcap": 50.0},
    {"heads": (16, 8), "head_dim": 256, "dtype": "float32"},
    {"heads": (64, 8), "head_dim": 64, "window": 128, "sinks": True},
]  # fmt: skip


@pytest.mark.parametrize("sizes", ATTENTION, ids=lambda sizes: "-".join(str(value) for value in sizes.values()))
def test_attention(sizes: dict[str, Any]):
    """Two kernels: one over keys, one that merges splits."""
    assert len(kernels_in(attention(**sizes))) == 2


# Instructions and operations of MLIR that only some GPUs have.
WGMMA, MMA, THREADS_COPY, ENGINE_COPIES = (
    "wgmma.mma_async",
    "mma.sync",
    "cp.async.shared.global",
    "cp.async.bulk.tensor",
)
NOT_BEFORE_HOPPER = (WGMMA, ENGINE_COPIES, "expect_tx", "try_wait", "fence.", "elect.sync", "setmaxnreg", "stmatrix")
GENERATIONS = {
    "8.0": ((MMA, THREADS_COPY), NOT_BEFORE_HOPPER),
    "8.9": ((MMA, THREADS_COPY), NOT_BEFORE_HOPPER),
    "9.0": ((WGMMA, ENGINE_COPIES), (MMA, THREADS_COPY)),
    "10.0": ((MMA, ENGINE_COPIES), (WGMMA, THREADS_COPY)),
    "12.0": ((MMA, ENGINE_COPIES), (WGMMA, THREADS_COPY)),
}
EVERYWHERE = [
    {"rows": 1, "tokens": 1, "head_dim": 64, "block_size": 16},
    {"tokens": 2048, "heads": (24, 8), "block_size": 128},
    {"heads": (16, 8), "head_dim": 256, "window": 1024, "softcap": 50.0, "block_size": 32},
    {"heads": (64, 8), "head_dim": 64, "window": 128, "sinks": True},
    {"dtype": "float32", "head_dim": 64},
    {"kv_dtype": "float8_e4m3fn", "block_size": 16},
]
needs_mma = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU has mma and cp.async since jax 0.11")


@needs_mma
@pytest.mark.parametrize("sizes", EVERYWHERE, ids=lambda sizes: "-".join(str(value) for value in sizes.values()))
@pytest.mark.parametrize("capability", GENERATIONS)
def test_attention_is_what_each_generation_has(capability: str, sizes: dict[str, Any]):
    if sizes.get("kv_dtype") and capability == "8.0":
        pytest.skip("no instruction reads fp8")
    if sizes.get("dtype") == "float32" and capability in ("8.9", "12.0"):
        pytest.skip("float32 does not fit 99 KiB")
    with on_gpu(capability):
        program = attention(**sizes)
    assert len(kernels_in(program)) == 2
    wanted, unwanted = GENERATIONS[capability]
    assert [name for name in wanted if name not in program] == []
    assert [name for name in unwanted if name in program] == []


@needs_mma
@pytest.mark.parametrize("capability", GENERATIONS)
def test_moves_are_what_each_generation_has(capability: str):
    pool, kv = pool_of(16, 1, 64, "bfloat16"), of((256, 1, 64), "bfloat16")
    with on_gpu(capability):
        program = for_cuda(partial(kv_write, backend="gpu"), pool, kv, kv, of((256,)), donate_argnums=0)
    if capability.startswith("8"):
        assert [name for name in NOT_BEFORE_HOPPER if name in program] == []
    else:
        assert ENGINE_COPIES in program


def test_a_context_of_one_split_needs_no_second_kernel():
    arguments = (of((8, 4, 128), "bfloat16"), pool_of(64, 2, 128, "bfloat16"), of((8, 8)), of((8,)), of((9,)))
    program = for_cuda(partial(ragged_paged_attention, scale=0.1, backend="gpu"), *arguments, of((1,)), of((1,)))
    assert len(kernels_in(program)) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (64, 128), (128, 256)])
def test_moves_are_one_kernel_in_place(dtype: str, block_size: int, head_dim: int):
    """The pool goes in and comes out as one buffer: donated, aliased by the kernel, and no copy of it beside."""
    pool = pool_of(block_size, 8, head_dim, dtype)
    kv = of((256, 8, head_dim), "float32" if dtype.startswith("float8") else dtype)
    scales = {"k_scale": 0.1, "v_scale": 0.1} if dtype.startswith("float8") else {}
    ids, payload = of((32,)), of((32, *pool.shape[1:]), dtype)
    programs = {
        "kv_write": for_cuda(partial(kv_write, backend="gpu", **scales), pool, kv, kv, of((256,)), donate_argnums=0),
        "copy": for_cuda(partial(block_copy, backend="gpu"), pool, ids, ids, donate_argnums=0),
        "scatter": for_cuda(partial(block_scatter, backend="gpu"), pool, payload, ids, donate_argnums=0),
    }
    for name, program in programs.items():
        assert len(kernels_in(program)) == 1, name
        assert "tf.aliasing_output = 0" in program, f"{name}: the pool is not donated to the result"
        assert "output_operand_alias<" in program, f"{name}: the kernel does not write in place"
        size = "x".join(str(axis) for axis in pool.shape)
        moved = [line for line in program.splitlines() if f"tensor<{size}x" in line and "stablehlo" in line]
        assert all("stablehlo.reshape" in line or KERNEL in line for line in moved), f"{name}: {moved}"
    gathered = for_cuda(partial(block_gather, backend="gpu"), pool, ids)
    assert len(kernels_in(gathered)) == 1


def test_attention_reads_the_pool_where_it_lies():
    """It is reshaped, which costs nothing, and goes to the kernel: no copy, no transpose."""
    program = attention()
    size = "x".join(str(axis) for axis in pool_of(64, 8, 128, "bfloat16").shape)
    uses = [line for line in program.splitlines() if f"tensor<{size}x" in line and "stablehlo" in line]
    assert len(uses) == 1
    assert "stablehlo.reshape" in uses[0]
