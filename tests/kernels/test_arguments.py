"""Every refusal of the kernels' interfaces, by its message; and that asking for one backend imports no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention, uncovered


def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return of(shape, jnp.int32)


POOL = of((4, 16, 2, 128))
FP8_POOL = of((4, 16, 2, 128), jnp.float8_e4m3fn)
KV = of((3, 2, 64))

ATTENTION: dict[str, Any] = {
    "q": of((8, 4, 64)),
    "cache": POOL,
    "block_tables": ints(3, 5),
    "seq_lens": ints(3),
    "cu_q_lens": ints(4),
    "num_seqs": ints(1),
    "num_decode": ints(1),
}
ATTENTION_OPTIONS: dict[str, Any] = {"scale": 0.125, "backend": "reference"}

ATTENTION_REFUSALS = [
    ({"q": of((8, 256))}, r"q has shape \(8, 256\): it must be \[tokens, heads, head_dim\]"),
    ({"q": of((0, 4, 64))}, "q holds no token: one at least"),
    ({"q": of((8, 4, 128))}, "q's head_dim is 128, the cache's 64"),
    ({"q": of((8, 3, 64))}, "3 query heads over 2 kv heads: the first must be a multiple"),
    ({"q": of((8, 34, 64))}, "17 query heads share a kv head: the kernels have at most 16"),
    ({"q": of((8, 4, 64), jnp.float16)}, "queries are float16: the kernels have bfloat16, float32"),
    ({"q": of((8, 4, 64), jnp.bfloat16)}, "queries are bfloat16, the cache float32: they must be the same"),
    ({"cache": of((4, 16, 256))}, r"cache has shape \(4, 16, 256\): it must be \[blocks, tokens, kv_heads, 2"),
    ({"cache": of((1, 16, 2, 128))}, "cache has 1 blocks: 2 at least"),
    ({"cache": of((4, 16, 0, 128))}, "one kv head at least"),
    ({"cache": of((4, 16, 2, 129))}, "cache's last axis is 129: it must be even"),
    ({"cache": of((4, 24, 2, 128))}, "block_size is 24: the kernels have 16, 32, 64, 128"),
    ({"cache": of((4, 16, 2, 160))}, "head_dim is 80: the kernels have 64, 128, 256"),
    ({"cache": of((4, 16, 2, 128), jnp.uint16)}, "the cache holds uint16: .* bitcast integers that hold floats"),
    ({"block_tables": ints(3)}, r"block_tables has shape \(3,\): it must be \[sequences, blocks\]"),
    ({"block_tables": ints(3, 0)}, r"block_tables has shape \(3, 0\): no axis may be empty"),
    ({"block_tables": of((3, 5), jnp.uint32)}, r"block_tables is uint32: it must be int32; use \.astype"),
    ({"seq_lens": ints(4)}, r"seq_lens has shape \(4,\): it must be \(3,\)"),
    ({"cu_q_lens": ints(3)}, r"cu_q_lens has shape \(3,\): it must be \(4,\)"),
    ({"num_seqs": ints()}, r"num_seqs has shape \(\): it must be \(1,\)"),
    ({"num_decode": ints(2)}, r"num_decode has shape \(2,\): it must be \(1,\)"),
    ({"scale": float("inf")}, "scale is inf: it must be finite"),
    ({"window": 0}, "window is 0: 1 at least, the query's own position; None for all"),
    ({"softcap": 0.0}, "softcap is 0.0: it must be above 0 and finite; None for no cap"),
    ({"sinks": of((3,))}, r"sinks is float32\[3\]: it must be float32\[4\], one a query head"),
    ({"cache": FP8_POOL}, r"the cache holds float8_e4m3fn and was given \[\]: pass k_scale and v_scale"),
    ({"cache": FP8_POOL, "k_scale": 1.0}, r"was given \['k_scale'\]: pass k_scale and v_scale"),
    ({"cache": FP8_POOL, "k_scale": of((2,)), "v_scale": 1.0}, r"k_scale has shape \(2,\): one number for the whole"),
    ({"k_scale": 1.0, "v_scale": 1.0}, "scales are for fp8 only, leave them"),
    ({"backend": "triton"}, "backend is 'triton': it must be one of tpu, gpu, cpu, reference"),
]


def trace(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a call with arrays' shapes alone gives, as a shape; numbers and None as they are."""
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.ShapeDtypeStruct)}
    rest = {name: value for name, value in arguments.items() if name not in arrays}
    return jax.eval_shape(partial(function, **rest), **arrays)


@pytest.mark.parametrize(("changed", "message"), ATTENTION_REFUSALS)
def test_attention_refuses(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        trace(ragged_paged_attention, ATTENTION | ATTENTION_OPTIONS | changed)


def test_attention_takes_what_the_refusals_start_from():
    out = trace(ragged_paged_attention, ATTENTION | ATTENTION_OPTIONS)
    assert (out.shape, out.dtype) == (ATTENTION["q"].shape, ATTENTION["q"].dtype)


WRITE_REFUSALS = [
    ({"k": of((3, 2, 128))}, r"k has shape \(3, 2, 128\): slots and cache ask for \(3, 2, 64\)"),
    ({"v": of((4, 2, 64))}, r"v has shape \(4, 2, 64\): slots and cache ask for \(3, 2, 64\)"),
    ({"k": of((3, 2, 64), jnp.bfloat16)}, "k is bfloat16: a cache of float32 takes float32"),
    ({"v": of((3, 2, 64), jnp.float16), "cache": FP8_POOL, "k_scale": 1.0, "v_scale": 1.0},
     "v is float16: a cache of float8_e4m3fn takes bfloat16 or float32"),
    ({"slots": of((3,), jnp.int16)}, "slots is int16: it must be int32"),
    ({"slots": ints(0), "k": of((0, 2, 64)), "v": of((0, 2, 64))}, "slots is empty: one token at least"),
    ({"cache": FP8_POOL}, "pass k_scale and v_scale"),
    ({"cache": of((4, 24, 2, 128))}, "block_size is 24"),
    ({"backend": "cpu"}, "backend is 'cpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), WRITE_REFUSALS)
def test_kv_write_refuses(changed: dict[str, Any], message: str):
    arguments = {"cache": POOL, "k": KV, "v": KV, "slots": ints(3), "backend": "reference"}
    trace(kv_write, arguments)
    with pytest.raises(ValueError, match=message):
        trace(kv_write, arguments | changed)


MOVE_REFUSALS = [
    (block_copy, {"sources": ints(0)}, "sources is empty: one pair at least, padded with targets past the pool"),
    (block_copy, {"sources": ints(2, 1)}, r"sources has shape \(2, 1\): it must be \(2,\)"),
    (block_copy, {"targets": ints(3)}, r"targets has shape \(3,\): it must be \(2,\)"),
    (block_copy, {"targets": of((2,), jnp.uint8)}, "targets is uint8: it must be int32"),
    (block_copy, {"cache": of((4, 16, 128))}, "cache has shape"),
    (block_copy, {"backend": "cpu"}, "backend is 'cpu'"),
    (block_gather, {"ids": ints(0)}, "ids is empty: one block at least, padded with ids past the pool"),
    (block_gather, {"ids": of((2,))}, "ids is float32: it must be int32"),
    (block_gather, {"cache": of((4, 16, 2, 80))}, "head_dim is 40"),
    (block_gather, {"backend": "cpu"}, "backend is 'cpu'"),
    (block_scatter, {"payload": of((3, 16, 2, 128))}, r"payload has shape .*: ids and cache ask for \(2, 16, 2, 128\)"),
    (block_scatter, {"payload": of((2, 16, 2, 128), jnp.bfloat16)}, "payload is bfloat16: the cache holds float32"),
    (block_scatter, {"ids": ints(2, 1)}, r"ids has shape \(2, 1\): it must be \(2,\)"),
]


@pytest.mark.parametrize(("function", "changed", "message"), MOVE_REFUSALS)
def test_block_moves_refuse(function: Callable[..., Any], changed: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"cache": POOL, "backend": "reference"}
    arguments |= {"sources": ints(2), "targets": ints(2)} if function is block_copy else {"ids": ints(2)}
    if function is block_scatter:
        arguments["payload"] = of((2, 16, 2, 128))
    trace(function, arguments)
    with pytest.raises(ValueError, match=message):
        trace(function, arguments | changed)


def test_uncovered_tells_beforehand():
    sizes: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    dtypes = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
    assert uncovered(**sizes, **dtypes) is None
    assert uncovered(**sizes, dtype="bfloat16", kv_dtype="float8_e5m2") is None
    assert uncovered(**sizes, **dtypes, table_shape=(1024, 1024)) is None
    assert "use larger blocks" in str(uncovered(**sizes, **dtypes, backend="tpu", table_shape=(1024, 1024)))
    assert uncovered(**sizes, **dtypes, backend="tpu", table_shape=(64, 2048)) is None
    assert uncovered(**(sizes | {"head_dim": 96}), **dtypes) == "head_dim is 96: the kernels have 64, 128, 256"


def test_asking_for_the_reference_imports_no_backend(repo: Path):
    code = (
        "import sys, jax.numpy as jnp\n"
        "from pallas_kernels.block_copy.api import block_copy\n"
        "import pallas_kernels.ragged_paged_attention.api, pallas_kernels.kv_write.api\n"
        "import pallas_kernels.block_transfer.api\n"
        "ids = jnp.asarray([1], jnp.int32)\n"
        "block_copy(jnp.zeros((4, 16, 2, 128)), ids, ids + 1, backend='reference')\n"
        "print([m for m in sys.modules if 'kernel_' in m or m.startswith('jax.experimental.pallas')])\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
