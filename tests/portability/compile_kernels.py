"""Compiles the TPU kernels for a real chip, on a machine without one, and prints what came out as lines of JSON.

    python -m tests.portability.compile_kernels v6e llama-8b qwen2-0.5b

A process of its own, because libtpu writes to stderr, keeps log files and can abort. It needs the `tpu` extra.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

# Read by libtpu when it is loaded: no server of a cloud to ask, no lock on chips that are not here (a second process
# would abort), no log files in shared places.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": tempfile.gettempdir(),
    "TPU_STDERR_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.common import is_fp8, tpu_pool_format
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.tuning import tiles_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# A prime, so that no other array of a program has as many elements as the pool; and past what fits vector memory (128
# MiB), into which XLA would move a whole pool for the kernels.
NUM_BLOCKS = 12_007


@dataclass(frozen=True)
class Model:
    """One layer's heads on one device, and the step that runs on it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_tokens: int = 64
    num_rows: int = 64
    context: int = 8192
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    in_format: bool = True


MODELS = {
    "llama-8b": Model(32, 8, 128, 16, num_tokens=2048),
    "llama-8b decode": Model(32, 8, 128, 16, context=32_768),
    "llama-8b of 4 chips": Model(8, 2, 128, 64, num_tokens=512),
    "llama-70b of 8 chips": Model(8, 1, 128, 128, num_tokens=2048, num_rows=256, context=32_768),
    "llama-2-7b": Model(32, 32, 128, 32, num_tokens=256),
    "llama-3.2-1b": Model(32, 8, 64, 16, num_tokens=2048),
    "qwen2-0.5b": Model(14, 2, 64, 32, num_tokens=512, context=32_768),
    "gemma-2-9b": Model(16, 8, 256, 16, num_tokens=1024, window=4096, softcap=50.0),
    "gpt-oss of 8 chips": Model(
        8, 1, 64, 128, num_tokens=512, kv_dtype="float8_e4m3fn", window=128, softcap=30.0, has_sinks=True
    ),
    "fp8": Model(32, 8, 128, 16, num_tokens=512, kv_dtype="float8_e4m3fn"),
    "fp8 e5m2": Model(16, 1, 128, 64, kv_dtype="float8_e5m2", context=32_768),
    "float32": Model(12, 4, 128, 16, num_tokens=256, dtype="float32", kv_dtype="float32"),
    "float32 wide": Model(4, 4, 256, 32, num_tokens=256, dtype="float32", kv_dtype="float32"),
    "default layout": Model(32, 8, 128, 16, in_format=False),
}


def device_of(chip: str) -> Any:
    """A chip that is not here."""
    return topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]


def step(model: Model, chip: str, cache: Any, q: Any, k: Any, v: Any, slots: Any, sinks: Any, *of_rows: Any) -> Any:
    """Two layers over one pool: what is written is read, and the pool comes back."""
    scales = {"k_scale": 0.5, "v_scale": 0.5} if is_fp8(model.kv_dtype) else {}
    sizes = {"num_kv_heads": model.num_kv_heads, "group": model.num_heads // model.num_kv_heads}
    sizes |= {"head_dim": model.head_dim, "block_size": model.block_size, "kv_itemsize": cache.dtype.itemsize}
    options = {"window": model.window, "softcap": model.softcap, "sinks": sinks if model.has_sinks else None}
    options |= {"scale": model.head_dim**-0.5, "tiles": tiles_for(chip, **sizes)}
    attend = partial(ragged_paged_attention, **options, **scales, backend="tpu")

    def layer(_: Any, carry: Any) -> Any:
        cache, q = carry
        cache = kv_write(cache, k, v, slots, **scales, backend="tpu")
        return cache, attend(q, cache, *of_rows)

    return jax.lax.fori_loop(0, 2, layer, (cache, q))


def moves(cache: Any, ids: Any) -> Any:
    """Copy-on-write, swap out and swap in."""
    cache = block_copy(cache, ids, ids + 20, backend="tpu")
    payload = block_gather(cache, ids, backend="tpu")
    return block_scatter(cache, payload, ids + 40, backend="tpu")


def compile_model(chip: str, name: str) -> dict[str, Any]:
    """What the compiler made of a model's step and moves."""
    model = MODELS[name]
    mesh = Mesh(np.array([device_of(chip)]), ("chip",))
    plain = NamedSharding(mesh, PartitionSpec())
    pool_format = tpu_pool_format(plain) if model.in_format else plain

    def of(shape: tuple[int, ...], dtype: str, sharding: Any = plain) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    pool = of((NUM_BLOCKS, model.block_size, model.num_kv_heads, 2 * model.head_dim), model.kv_dtype, pool_format)
    q = of((model.num_tokens, model.num_heads, model.head_dim), model.dtype)
    kv = of((model.num_tokens, model.num_kv_heads, model.head_dim), model.dtype)
    rows = model.num_rows
    shapes = [(rows, model.context // model.block_size), (rows,), (rows + 1,), (1,), (1,)]
    arguments = (pool, q, kv, kv, of((model.num_tokens,), "int32"), of((model.num_heads,), "float32"))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        stepping = jax.jit(partial(step, model, chip), donate_argnums=0, out_shardings=(pool_format, plain))
        stepped = stepping.lower(*arguments, *(of(shape, "int32") for shape in shapes)).compile()
        moving = jax.jit(moves, donate_argnums=0, out_shardings=pool_format)
        moved = moving.lower(pool, of((8,), "int32")).compile()
    return {
        "chip": chip,
        "model": name,
        "sizes": asdict(model),
        "seconds": round(time.monotonic() - began, 1),
        "step": facts_of(stepped, pool),
        "moves": facts_of(moved, pool),
    }


def facts_of(compiled: Any, pool: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Which kernels a program has, what it keeps beside its arguments, and what it does with the pool."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    of_pool = set()
    for dimensions, operation in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text):
        if math.prod(int(n) for n in dimensions.split(",")) == pool.size:
            of_pool.add(operation)
    return {
        "kernels": sorted(set(re.findall(r"%([a-z_]+)\S* = [^\n]*custom_call_target=\"tpu_custom_call\"", text))),
        "pool_bytes": pool.size * pool.dtype.itemsize,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "operations_on_the_pool": sorted(of_pool),
    }


def main() -> None:
    chip, *names = sys.argv[1:]
    for name in names or MODELS:
        print(json.dumps(compile_model(chip, name)), flush=True)


if __name__ == "__main__":
    main()
